"""Sparse tensors read as what they are, wherever and however the file holds them."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxcompress.errors import ModelError
from onnxcompress.graph.constant_folding import constant_attribute
from onnxcompress.graph.query import read
from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.passes.base import Pass
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fp16 import HalfPrecision
from onnxcompress.passes.prune import Prune
from onnxcompress.passes.quantize import Quantize
from onnxcompress.runtime.inference import run as outputs
from tests.helpers.folding import feeds, graph, weight

WEIGHT = np.where(np.abs(weight(8, 3, 3, 3)) > 0.8, weight(8, 3, 3, 3), 0).astype(np.float32)
SIGNATURE = "(float[N,3,8,8] x) => (float[N,8,8,8] y)"


def tensor(values: np.ndarray, name: str, raw: bool) -> onnx.TensorProto:
    kind = helper.np_dtype_to_tensor_dtype(values.dtype)
    if raw:
        return numpy_helper.from_array(values, name)
    return helper.make_tensor(name, kind, values.shape, values.reshape(-1).tolist())


def sparse(
    values: np.ndarray, name: str, *, raw_values: bool, raw_indices: bool, coordinates: bool
) -> onnx.SparseTensorProto:
    where = np.nonzero(values)
    indices = np.stack(where, 1) if coordinates else np.flatnonzero(values)
    made = onnx.SparseTensorProto(dims=values.shape)
    made.values.CopyFrom(tensor(values[where], name, raw_values))
    made.indices.CopyFrom(tensor(indices.astype(np.int64), f"{name}_at", raw_indices))
    return made


def network(made: onnx.SparseTensorProto) -> onnx.ModelProto:
    proto = graph(SIGNATURE, "y = Conv<pads = [1,1,1,1]>(x, w)", {"w": WEIGHT})
    del proto.graph.initializer[:]
    proto.graph.sparse_initializer.append(made)
    return proto


FORMS = [
    dict(zip(("raw_values", "raw_indices", "coordinates"), one, strict=True))
    for one in product((0, 1), repeat=3)
]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("kind", ["float32", "float16", "float64", "int8", "int64"])
def test_each_encoding_gives_the_values(form: dict[str, bool], kind: str) -> None:
    values = np.round(WEIGHT * 10).astype(kind)
    proto = network(sparse(values, "w", **form))
    found = read(Model.from_proto(proto).graph.tensors()["w"])
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_executor_computes_with_them(form: dict[str, bool]) -> None:
    import torch

    proto = network(sparse(WEIGHT, "w", **form))
    x = feeds(proto)["x"]
    found = Executor.from_model(Model.from_proto(proto)).run({"x": torch.from_numpy(x)}, ["y"])["y"]
    np.testing.assert_allclose(found.numpy(), outputs(proto, {"x": x})["y"], atol=1e-5)


@pytest.mark.parametrize("raw", [False, True])
def test_the_value_of_a_constant(raw: bool) -> None:
    proto = graph(SIGNATURE, "w = Identity(v) y = Conv<pads = [1,1,1,1]>(x, w)", {"v": WEIGHT})
    del proto.graph.initializer[:]
    made = sparse(WEIGHT, "v", raw_values=raw, raw_indices=raw, coordinates=False)
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["v"], sparse_value=made))
    model = Model.from_proto(proto)
    assert model.to_proto() == proto
    found = constant_attribute(model.graph.nodes[0])
    assert found is not None
    np.testing.assert_array_equal(found, WEIGHT)
    result = Quantize(synthetic=8).apply(model)
    assert (result.figures.output_snr_db or {})["y"] > 30


@pytest.mark.parametrize(
    ("one", "limit"),
    [
        (Quantize(synthetic=8), 10.0),
        (Prune(reconstruct=False, sparsity=0.7), 5.0),
        (HalfPrecision(), 50.0),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_passes_change_a_sparse_weight(one: Pass, limit: float) -> None:
    proto = network(sparse(WEIGHT, "w", raw_values=True, raw_indices=True, coordinates=False))
    model = Model.from_proto(proto)
    assert one.apply(model).modified
    after = model.to_proto()
    assert not after.graph.sparse_initializer
    x = feeds(proto)["x"]
    wanted, found = (outputs(p, {"x": x})["y"] for p in (proto, after))
    assert 10 * np.log10(wanted.var() / np.square(wanted - found).mean()) > limit


def test_a_batch_norm_folds_into_a_sparse_weight() -> None:
    ones = {name: weight(8, seed=3) ** 2 + 0.5 for name in "gbmv"}
    body = "c = Conv<pads = [1,1,1,1]>(x, w) y = BatchNormalization(c, g, b, m, v)"
    proto = graph(SIGNATURE, body, {"w": WEIGHT, **ones})
    del proto.graph.initializer[0]
    proto.graph.sparse_initializer.append(
        sparse(WEIGHT, "w", raw_values=True, raw_indices=True, coordinates=True)
    )
    model = Model.from_proto(proto)
    assert FoldBatchNorm().apply(model).measured.folded == 1
    after = model.to_proto()
    onnx.checker.check_model(after)
    x = feeds(proto)["x"]
    np.testing.assert_allclose(outputs(after, {"x": x})["y"], outputs(proto, {"x": x})["y"], atol=1e-5)


def test_what_is_not_touched_stays_sparse() -> None:
    proto = network(sparse(WEIGHT, "w", raw_values=True, raw_indices=False, coordinates=False))
    model = Model.from_proto(proto)
    read(model.graph.tensors()["w"])
    assert model.copy().to_proto() == proto


@pytest.mark.parametrize("fault", ["beyond", "negative", "too few"])
def test_indices_that_fit_no_shape_are_refused(fault: str) -> None:
    made = sparse(WEIGHT, "w", raw_values=True, raw_indices=True, coordinates=False)
    at = numpy_helper.to_array(made.indices).copy()
    at[0] = WEIGHT.size if fault == "beyond" else -1
    made.indices.CopyFrom(numpy_helper.from_array(at[1:] if fault == "too few" else at, "at"))
    with pytest.raises(ModelError, match="index"):
        Model.from_proto(network(made))
    assert made.values.data_type == TensorProto.FLOAT
