"""Any operator between two layers: onnx's backend node cases, put where passes have something to do.

    x --layer--> BatchNormalization --> the case's model --> layer --> y

The layers are pointwise convolutions, of matrices Gemm; x has three channels, as images do. The case's
first float tensor is what the BatchNormalization gives, other inputs are initializers with the case's
values. So every operator of ONNX, with the attributes that others thought worth testing, lies on the way
of fold-bn, equalize, absorb-bias, prune and quantize.

Numbers of the first layer and of the BatchNormalization are small multiples of powers of two: their product
and sum are exact, folded or not, and operators that round or compare see the very same values.
Does not handle: cases whose first float input has less than two axes or an open shape; sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.suites import Case, backend_cases

CHANNELS = 3
OPSET = 17
"""Of cases that use no operator of the default domain."""
READ = 4
"""Output channels of the layers behind."""


def embedded_cases() -> Iterator[Case]:
    """The node cases that can lie between layers."""
    for case in backend_cases("node"):
        found = embed(case)
        if found is not None:
            yield found


def embed(case: Case) -> Case | None:
    """One case between layers; None where it cannot be."""
    model = onnx.ModelProto.FromString(case.model.SerializeToString())
    graph = model.graph
    entry = next((i for i in graph.input if _float_shape(i, least=2)), None)
    if entry is None or any(not isinstance(v, np.ndarray) for v in case.feeds.values()):
        return None
    shape = _float_shape(entry, least=2)
    for info in [i for i in graph.input if i is not entry and i.name in case.feeds]:
        graph.initializer.append(numpy_helper.from_array(case.feeds[info.name], info.name))
        graph.input.remove(info)
    if len(graph.input) != 1:
        return None
    rng = np.random.default_rng(len(graph.node[0].op_type))
    before = _layer_before(graph, rng, entry.name, shape)
    behind = [
        _layer_behind(graph, rng, output, found)
        for output in list(graph.output)
        if (found := _float_shape(output, least=2)) and 0 not in found
    ]
    if not behind:
        return None
    nodes = [*before, *graph.node, *behind]
    copies = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del graph.node[:]
    graph.node.extend(copies)
    size = (shape[0], CHANNELS, *shape[2:])
    graph.input[0].CopyFrom(helper.make_tensor_value_info("between_x", TensorProto.FLOAT, size))
    if model.ir_version < 4:
        graph.input.extend(
            helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in graph.initializer
        )
    if all(opset.domain for opset in model.opset_import):
        model.opset_import.add(domain="", version=OPSET)
    x = rng.integers(-16, 17, size).astype(np.float32) / 8
    return Case("node, between layers", case.name, model, {"between_x": x})


def _layer_before(
    graph: onnx.GraphProto, rng: np.random.Generator, name: str, shape: tuple[int, ...]
) -> list[onnx.NodeProto]:
    """Layer and BatchNormalization that make the tensor `name`."""
    channels, flat = shape[1], len(shape) == 2
    size = (CHANNELS, channels) if flat else (channels, CHANNELS, *[1] * (len(shape) - 2))
    per_channel = (1, channels) if flat else (channels, *[1] * (len(size) - 1))
    arrays = {
        "w": rng.integers(-4, 5, size) / 4 * 2.0 ** rng.integers(-3, 4, per_channel),
        "b": rng.integers(-4, 5, channels) / 4,
        "gamma": rng.choice([-1, 0.5, 1, 2], channels),
        "beta": rng.integers(-4, 5, channels) / 4,
        "mean": rng.integers(-4, 5, channels) / 4,
        "variance": rng.choice([0.25, 1, 4], channels),
    }
    _store(graph, arrays)
    op = "Gemm" if flat else "Conv"
    names = [f"between_{key}" for key in ("gamma", "beta", "mean", "variance")]
    return [
        helper.make_node(op, ["between_x", "between_w", "between_b"], ["between_z"]),
        helper.make_node("BatchNormalization", ["between_z", *names], [name], epsilon=0.0),
    ]


def _layer_behind(
    graph: onnx.GraphProto, rng: np.random.Generator, output: onnx.ValueInfoProto, shape: tuple[int, ...]
) -> onnx.NodeProto:
    """A layer that reads an output of the case and becomes the output."""
    channels, flat, key = shape[1], len(shape) == 2, output.name
    size = (channels, READ) if flat else (READ, channels, *[1] * (len(shape) - 2))
    _store(graph, {f"w_{key}": rng.normal(size=size), f"b_{key}": rng.normal(size=READ)})
    made = f"between_y_{key}"
    inputs = [output.name, f"between_w_{key}", f"between_b_{key}"]
    node = helper.make_node("Gemm" if flat else "Conv", inputs, [made])
    output.CopyFrom(helper.make_tensor_value_info(made, TensorProto.FLOAT, (shape[0], READ, *shape[2:])))
    return node


def _store(graph: onnx.GraphProto, arrays: dict[str, Any]) -> None:
    for key, values in arrays.items():
        tensor = numpy_helper.from_array(np.asarray(values, np.float32), f"between_{key}")
        graph.initializer.append(tensor)


def _float_shape(info: onnx.ValueInfoProto, least: int) -> tuple[int, ...]:
    """The shape of a single precision tensor of at least `least` axes, all fixed; else empty."""
    kind = info.type.tensor_type
    if kind.elem_type != TensorProto.FLOAT or not kind.HasField("shape"):
        return ()
    dims = tuple(d.dim_value for d in kind.shape.dim)
    fixed = all(d.HasField("dim_value") for d in kind.shape.dim)
    return dims if fixed and len(dims) >= least else ()
