"""Small valid networks that hostile files are made of: each operator family that the passes look at."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

HEAD = '<ir_version: 8, opset_import: ["": 17]> g (float[N,3,8,8] x) => (float[N,K] y)'
TEXTS = {
    "residual": f"""{HEAD} {{
        a = Conv<pads=[1,1,1,1]>(x, w0) n = BatchNormalization(a, g, b, m, v) r = Relu(n)
        c = Conv<pads=[1,1,1,1]>(r, w1) d = Add(c, r) e = Relu(d) p = GlobalAveragePool(e)
        f = Flatten(p) y = Gemm<transB=1>(f, w2, bias) }}""",
    "depthwise": f"""{HEAD} {{
        a = Conv<pads=[1,1,1,1]>(x, w0) n = BatchNormalization(a, g, b, m, v)
        low = Constant<value_float=0.0>() high = Constant<value_float=6.0>()
        r = Clip(n, low, high) c = Conv<group=4>(r, wd)
        z = Concat<axis=1>(c, c) q = ConvTranspose<group=2>(z, wt) s = Sigmoid(q) p = GlobalAveragePool(s)
        two = Constant<value_ints=[0, -1]>() f = Reshape(p, two) y = MatMul(f, wm) }}""",
    "computed": f"""{HEAD} {{
        i = Identity(w1) a = Conv(x, w0) t = BatchNormalization(a, g, b, m, v) c = Conv(t, i)
        s = Shape(c) zero = Constant<value_int=0>() one = Gather<axis=0>(s, zero)
        flag = Constant<value = bool {{1}}>()
        k = If(flag) <then_branch = th () => (float[N,4,H,W] o) {{ o = Relu(c) }},
                      else_branch = el () => (float[N,4,H,W] u) {{ u = Conv(c, i) }}>
        p = ReduceMean<axes=[2, 3], keepdims=0>(k) y = Gemm<beta=0.5, transB=1>(p, w2, bias) }}""",
    "quantized": f"""{HEAD} {{
        xq = QuantizeLinear(x, sc, zp) xd = DequantizeLinear(xq, sc, zp) dq = DequantizeLinear(wq, sc, wz)
        a = Conv<pads=[1,1,1,1]>(xd, dq) n = BatchNormalization(a, g, b, m, v) r = Relu(n)
        k = MaxPool<kernel_shape=[2,2]>(r) p = AveragePool<kernel_shape=[4,4]>(k) f = Flatten(p)
        y = Gemm<transB=1>(f, w2, bias) }}""",
}


def network(name: str) -> onnx.ModelProto:
    """One of `TEXTS` with seeded weights; the larger ones have raw data that `load` leaves in the file."""
    proto = onnx.parser.parse_model(TEXTS[name])
    read = {i for node in proto.graph.node for i in node.input}
    read |= {i for n in proto.graph.node for a in n.attribute for inner in a.g.node for i in inner.input}
    proto.graph.initializer.extend(
        numpy_helper.from_array(values, key) for key, values in _weights().items() if key in read
    )
    onnx.checker.check_model(proto)
    return proto


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "w0": normal(4, 3, 3, 3), "w1": normal(4, 4, 3, 3), "w2": normal(5, 4), "bias": normal(5),
        "wd": normal(4, 1, 3, 3), "wt": normal(8, 2, 2, 2), "wm": normal(4, 5),
        "g": normal(4), "b": normal(4), "m": normal(4), "v": rng.uniform(0.5, 2, 4).astype(np.float32),
        "sc": np.array(0.1, np.float32), "zp": np.array(0, np.uint8), "wz": np.array(0, np.int8),
        "wq": rng.integers(-100, 100, (4, 3, 3, 3)).astype(np.int8),
    }  # fmt: skip
