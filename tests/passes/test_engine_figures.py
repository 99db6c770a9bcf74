"""Figures that `prune` and `quantize` tell, against the files that they made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from onnxcompress.account import StageSeconds
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.query import read
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import gather_inputs
from onnxcompress.passes.base import run
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.prune.figures import PruneFigures
from onnxcompress.passes.quantize import Quantize
from onnxcompress.passes.quantize.figures import QuantizeFigures
from onnxcompress.passes.quantize.output_noise import output_snr
from onnxcompress.runtime.inference import run as run_model
from tests.helpers.folding import graph, weight
from tests.helpers.results import figures_of

BODY = """a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a)
    d = Conv<group=8, pads=[1,1,1,1]>(r, w1, b1) s = Relu(d)
    c = Conv(s, w2, b2) q = GlobalAveragePool(c) f = Flatten(q) y = Gemm<transB=1>(f, w3, b3)"""
SIZES = {"w0": 216, "w1": 72, "w2": 128, "w3": 80}


def network() -> Model:
    shapes = {"w0": (8, 3, 3, 3), "w1": (8, 1, 3, 3), "w2": (16, 8, 1, 1), "w3": (5, 16)}
    arrays = {name: weight(*shape, seed=at) for at, (name, shape) in enumerate(shapes.items())}
    arrays |= {f"b{at}": weight(n, seed=9 + at) for at, n in enumerate((8, 8, 16, 5))}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,5] y)", BODY, arrays))


def test_signal_to_noise_is_of_the_variance_whatever_the_mean() -> None:
    """A tenth of the weights' part more is noise of a hundredth of the variance, with the means alike."""
    arrays = {"w": weight(3, 4), "b": np.full(4, 100, np.float32)}
    model = Model.from_proto(graph("(float[N,3] x) => (float[N,4] y)", "y = Gemm(x, w, b)", arrays))
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    x -= x.mean(0)
    louder = model.copy()
    set_values(louder.graph.tensors()["w"], 1.1 * arrays["w"])
    theirs = x.numpy() @ arrays["w"]
    expected = 10 * np.log10(np.var(theirs + 100) / np.mean((0.1 * theirs) ** 2))
    assert expected == pytest.approx(20, abs=0.5)
    assert output_snr(model, louder, x)["y"] == pytest.approx(expected, abs=0.01)


def noise_db(before: Model, after: Model, tensor: str, x: np.ndarray) -> float:
    """Of one tensor, over the variance, in onnxruntime."""
    values = []
    for model in (before, after):
        proto = model.to_proto()
        del proto.graph.output[:]
        proto.graph.output.add(name=tensor)
        values.append(run_model(proto, {"x": x})[tensor].astype(np.float64))
    return float(10 * np.log10(values[0].var() / np.square(values[1] - values[0]).mean()))


def test_prune_tells_of_each_layer_what_its_output_lost() -> None:
    """The sparsity, and the noise behind all layers up to it, on the inputs that it learned from."""
    before, after = network(), network()
    one = Prune(inputs="procedural", synthetic=16, sparsity=0.5)
    (result,) = run([one], after)
    figures = figures_of(result, PruneFigures)
    x = gather_inputs(before, one.request).images.array()[:16]
    rows = {row.weight: row for row in figures.layers or ()}
    assert rows.keys() == {"w0", "w2", "w3"}
    for name, tensor in (("w0", "a"), ("w2", "c"), ("w3", "y")):
        values = read(after.graph.tensors()[name])
        assert rows[name].sparsity == pytest.approx(1 - np.count_nonzero(values) / values.size, abs=0.02)
        assert rows[name].snr_db == pytest.approx(noise_db(before, after, tensor, x), abs=0.5)
    zeros = sum(int((read(after.graph.tensors()[n]) == 0).sum()) for n in SIZES)
    assert (figures.zeros, figures.weights) == (zeros, sum(SIZES.values()))
    assert figures.sparsity == pytest.approx(zeros / sum(SIZES.values()))
    assert figures.output_snr_db == pytest.approx({"y": noise_db(before, after, "y", x)}, abs=0.5)


def test_the_summary_of_prune_has_shares_in_percent_and_megabytes() -> None:
    arrays = {"w": weight(500, 1000)}
    body = "f = Flatten(x) y = MatMul(f, w)"
    model = Model.from_proto(graph("(float[N,500,1,1] x) => (float[N,1000] y)", body, arrays))
    (result,) = run([Prune(reconstruct=False, sparsity=0.75, storage="sparse")], model)
    figures = figures_of(result, PruneFigures)
    assert figures.bytes.dense == 2_000_000
    assert figures.bytes.sparse == 5 * 125_000  # four bytes for a value, one for the gap before it
    assert result.changes[-1].what.startswith(
        f"75.0% of 500000 weights are zero: 2.00 MB dense, {figures.bytes.deflated / 1e6:.2f} MB deflated, "
        "0.62 MB sparse; "
    )


def test_quantize_tells_of_each_layer_its_scales_and_noise() -> None:
    before, after = network(), network()
    one = Quantize(inputs="procedural", synthetic=16, weight_bits=4, activation_bits=0, first_last=0)
    (result,) = run([one], after)
    x = gather_inputs(before, one.request).images.array()[:16]
    rows = figures_of(result, QuantizeFigures).layers
    assert [row.weight_bits for row in rows] == [4, 8, 4, 4]  # a depthwise layer keeps its bits
    for row, tensor in zip(rows, ("a", "d", "c", "y"), strict=True):
        assert row.snr_db == pytest.approx(noise_db(before, after, tensor, x), abs=0.5)
        node = next(n for n in after.graph.nodes if tensor in [t.name for t in n.outputs])
        scales = read(node.inputs[1].inputs[0].inputs[1])
        assert row.weight_scale == pytest.approx((scales.min(), scales.max()))
        assert (row.input_bits, row.input_scale, row.input_range) == (0, None, None)


@pytest.mark.parametrize("one", [Prune(sparsity=0.5), Quantize()])
def test_time_is_told_by_stage(one: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by 100 s while inputs are gathered, and by 1 s else."""
    module = f"onnxcompress.passes.{one.name}.engine"
    now = [0.0]
    gather = gather_inputs

    def gathered(*given: Any, **named: Any) -> Any:
        now[0] += 100
        return gather(*given, **named)

    def clock() -> float:
        now[0] += 1
        return now[0]

    monkeypatch.setattr(f"{module}.gather_inputs", gathered)
    monkeypatch.setattr(f"{module}.time.perf_counter", clock)
    options = {"inputs": "procedural", "synthetic": 4}
    (result,) = run([type(one)(**options)], network())
    seconds = getattr(result.measured, "seconds")  # noqa: B009
    assert isinstance(seconds, StageSeconds)
    assert seconds.inputs >= 100
    assert seconds.layers is not None
    assert 0 < seconds.layers < 100
