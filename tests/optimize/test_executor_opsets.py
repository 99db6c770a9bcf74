"""What changed between opsets, and what onnx's backend tests leave out, against onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from tests.optimize.test_executor import executor, images, model, runtime


def agree(text: str, feeds: Mapping[str, np.ndarray], tolerance: float = 2e-6) -> None:
    """Executor and onnxruntime within `tolerance` of the largest output, and of the same type."""
    proto = model(text)
    names = [output.name for output in proto.graph.output]
    tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
    found = executor(proto).run(tensors, names)
    for name, expected in zip(names, runtime(proto, feeds), strict=True):
        got = found[name].numpy()
        assert got.dtype == expected.dtype
        assert got.shape == expected.shape
        scale = max(float(np.abs(expected).max(initial=0)), 1.0)
        assert float(np.abs(got - expected).max(initial=0)) <= tolerance * scale


def graph_of(opset: int, body: str, shape: str = "2,4,6,5", extra: str = "", out: str = "y") -> str:
    outputs = ", ".join(f"float {name}" for name in out.split())
    return (
        f'<ir_version: 3, opset_import: ["" : {opset}]> '
        f"g (float[{shape}] x) => ({outputs}) <{extra}> {{ {body} }}"
    )


OLDER: dict[str, tuple[int, str, str]] = {
    "clip-6": (7, "y = Clip<min=-0.5, max=0.5>(x)", ""),
    "clip-6-one-bound": (10, "y = Clip<max=0.5>(x)", ""),
    "clip-11": (11, "y = Clip(x, low)", "float low = {0.1}"),
    "softmax-1": (7, "y = Softmax<axis=2>(x)", ""),
    "softmax-11": (11, "y = Softmax(x)", ""),
    "softmax-13": (13, "y = Softmax<axis=1>(x)", ""),
    "logsoftmax-11": (11, "y = LogSoftmax<axis=-1>(x)", ""),
    "hardmax-11": (11, "y = Hardmax<axis=1>(x)", ""),
    "slice-1": (9, "y = Slice<starts=[1,-3], ends=[9,-1], axes=[1,3]>(x)", ""),
    "slice-10": (
        10,
        "y = Slice(x, s, e, a, t)",
        "int64[2] s = {-1,0}, int64[2] e = {-9,9}, int64[2] a = {2,1}, int64[2] t = {-2,2}",
    ),
    "pad-2": (7, "y = Pad<pads=[0,0,1,2,0,0,0,1], value=2.5>(x)", ""),
    "pad-2-reflect": (7, 'y = Pad<pads=[0,0,1,2,0,0,0,1], mode="reflect">(x)', ""),
    "pad-11": (
        11,
        "y = Pad(x, p, v)",
        "int64[8] p = {0,1,-1,2,0,0,0,1}, float v = {-1}",
    ),
    "squeeze-1": (7, "u = Unsqueeze<axes=[0,3]>(x) y = Squeeze<axes=[0]>(u)", ""),
    "squeeze-11": (11, "u = Unsqueeze<axes=[-1]>(x) y = Squeeze(u)", ""),
    "sum-11": (11, "y = ReduceSum<axes=[1,-1], keepdims=0>(x)", ""),
    "mean-13": (13, "y = ReduceMean<axes=[2,3]>(x)", ""),
    "sum-13": (13, "y = ReduceSum(x, a)", "int64[1] a = {-1}"),
    "l2-11": (11, "y = ReduceL2<axes=[1]>(x)", ""),
    "dropout-7": (7, "y = Dropout<ratio=0.4>(x)", ""),
    "dropout-12": (12, "y = Dropout(x, r)", "float r = {0.4}"),
    "split-2": (7, "a, b = Split<axis=1, split=[1,3]>(x) c = Neg(a) y = Concat<axis=1>(b, c)", ""),
    "split-11": (11, "a, b = Split<axis=2>(x) y = Sub(a, b)", ""),
    "split-13": (13, "a, b = Split<axis=1>(x, s) y = Mul(a, b)", "int64[2] s = {1,3}"),
    "upsample-7": (7, "y = Upsample<scales=[1.0,1.0,2.0,3.0]>(x)", ""),
    "upsample-7-linear": (7, 'y = Upsample<mode="linear", scales=[1.0,1.0,2.0,2.0]>(x)', ""),
    "upsample-9": (9, "y = Upsample(x, s)", "float[4] s = {1,1,2,1.5}"),
    "resize-10": (10, "y = Resize(x, s)", "float[4] s = {1,1,0.6,1.5}"),
    "resize-10-linear": (10, 'y = Resize<mode="linear">(x, s)', "float[4] s = {1,1,2,1.5}"),
    "resize-11": (
        11,
        'y = Resize<mode="linear">(x, r, s)',
        "float[8] r = {0,0,0,0,1,1,1,1}, float[4] s = {1,1,2,2}",
    ),
    "resize-11-corners": (
        11,
        'y = Resize<mode="linear", coordinate_transformation_mode="align_corners">(x, r, n, z)',
        "float[8] r = {0,0,0,0,1,1,1,1}, float[0] n = {}, int64[4] z = {2,4,9,4}",
    ),
    "batchnorm-7": (7, "y = BatchNormalization(x, c, c, c, v)", "float[4] c, float[4] v = {1,2,3,4}"),
    "batchnorm-9": (9, "y = BatchNormalization(x, c, c, c, v)", "float[4] c, float[4] v = {1,2,3,4}"),
    "topk-1": (7, "y, i = TopK<k=2, axis=1>(x)", ""),
    "topk-10": (10, "y, i = TopK<axis=2>(x, k)", "int64[1] k = {3}"),
    "flatten-11": (11, "y = Flatten<axis=-2>(x)", ""),
    "gemm-7": (7, "f = Flatten(x) y = Gemm<alpha=0.5, beta=2.0>(f, w, c)", "float[120,3] w, float[1,3] c"),
    "gemm-11": (11, "f = Flatten(x) y = Gemm<transB=1>(f, w)", "float[3,120] w"),
    "scatter-9": (9, "y = Scatter<axis=3>(x, i, u)", "int64[1,1,1,2] i = {4,1}, float[1,1,1,2] u"),
    "groupnorm-18": (
        18,
        "y = GroupNormalization<num_groups=2>(x, s, s)",
        "float[2] s",
    ),
    "cumsum-11": (11, "y = CumSum<exclusive=1, reverse=1>(x, a)", "int64 a = {-1}"),
    "auto-pad-upper": (
        11,
        'y = Conv<auto_pad="SAME_UPPER", strides=[2,2]>(x, w)',
        "float[3,4,3,2] w",
    ),
    "auto-pad-lower": (
        11,
        'y = Conv<auto_pad="SAME_LOWER", strides=[1,2], group=2>(x, w)',
        "float[4,2,4,2] w",
    ),
    "auto-pad-valid": (11, 'y = Conv<auto_pad="VALID">(x, w)', "float[3,4,2,2] w"),
    "conv-asymmetric": (11, "y = Conv<pads=[0,1,2,0]>(x, w, b)", "float[3,4,3,3] w, float[3] b"),
    "transposed": (
        11,
        "y = ConvTranspose<strides=[3,2], output_padding=[2,1], pads=[0,1,1,0], group=2>(x, w, b)",
        "float[4,3,2,3] w, float[6] b",
    ),
    "transposed-shape": (
        11,
        "y = ConvTranspose<strides=[2,2], output_shape=[13,10]>(x, w)",
        "float[4,3,3,3] w",
    ),
    "transposed-lower": (
        11,
        'y = ConvTranspose<strides=[2,2], auto_pad="SAME_LOWER">(x, w)',
        "float[4,3,3,3] w",
    ),
    "transposed-upper": (
        11,
        'y = ConvTranspose<strides=[2,2], auto_pad="SAME_UPPER">(x, w)',
        "float[4,3,3,3] w",
    ),
    "maxpool-lower": (11, 'y = MaxPool<auto_pad="SAME_LOWER", kernel_shape=[2,3], strides=[2,2]>(x)', ""),
    "maxpool-dilated": (11, "y = MaxPool<kernel_shape=[2,2], dilations=[2,3], pads=[1,1,0,1]>(x)", ""),
    "maxpool-ceil": (11, "y = MaxPool<kernel_shape=[3,3], strides=[2,2], ceil_mode=1>(x)", ""),
    "averagepool-7": (7, "y = AveragePool<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(x)", ""),
    "averagepool-upper": (11, 'y = AveragePool<kernel_shape=[2,2], auto_pad="SAME_UPPER">(x)', ""),
    "averagepool-include": (
        11,
        "y = AveragePool<kernel_shape=[3,2], pads=[2,0,0,1], count_include_pad=1>(x)",
        "",
    ),
    "lppool": (11, "y = LpPool<kernel_shape=[3,2], strides=[1,2], pads=[1,0,1,1], p=3>(x)", ""),
    "global-lp": (11, "y = GlobalLpPool<p=3>(x)", ""),
    "lrn": (11, "y = LRN<size=3, alpha=0.3, beta=0.6, bias=1.5>(x)", ""),
}


@pytest.mark.parametrize("name", OLDER)
def test_older_forms_agree_with_onnxruntime(name: str) -> None:
    opset, body, extra = OLDER[name]
    agree(graph_of(opset, body, extra=extra), {"x": images(2, 4, 6, 5)})


def test_ceil_mode_average_pool_of_older_opsets() -> None:
    pool = "kernel_shape=[3,3], strides=[2,2], ceil_mode=1, count_include_pad=1, pads=[1,1,1,1]"
    body = f"y = AveragePool<{pool}>(x)"
    agree(graph_of(19, body).replace("ir_version: 3", "ir_version: 8"), {"x": images(2, 4, 6, 5)})
