"""Shrunk: what others' suites (`tests.helpers.suites`, `tests.helpers.embedding`) drawn graphs found."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcompress.errors import InputError
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.passes.quantize import Quantize
from onnxcompress.sensitivity.analysis import sensitivity
from tests.helpers.folding import Arrays, feeds, graph, weight
from tests.helpers.suites import Case, in_runtime
from tests.robustness.matrix import check
from tests.robustness.through_passes import Outcome, Subject, outcome

PICTURE = "(float[1,3,9,8] x) => (float[N,C,H,W] y)"


def through(recipe: str, signature: str, body: str, arrays: Arrays, *, opset: int = 17) -> Outcome:
    proto = graph(signature, body, arrays, opset=opset)
    return outcome(Subject(Case("found", recipe, proto, feeds(proto))), recipe)


@pytest.mark.parametrize(("axis", "reads"), [(1, 1), (2, 0)])
def test_equalize_takes_layers_without_channels(axis: int, reads: int) -> None:
    arrays = {"w": weight(0, 3, 1), "u": weight(2, reads, 1)}
    body = "c = Conv(x, w) r = ReduceSum(c, axis) y = Conv(r, u)"
    arrays["axis"] = np.array([axis])
    model = Model.from_proto(graph("(float[1,3,5] x) => (float[1,2,L] y)", body, arrays))
    assert not Equalize().apply(model).changes


def test_an_offset_with_a_number_for_each_row_is_no_bias() -> None:
    """As many rows as columns: quantize and prune took the rows' numbers for the columns'."""
    arrays = {"w": weight(3, 4), "d": weight(4, 1, seed=2)}
    proto = graph("(float[4,3] x) => (float[4,4] y)", "y = Gemm(x, w, d)", arrays)
    found = check("what quantize and prune do first", proto)
    assert found == Outcome("passed")
    (refusal,) = Quantize().apply(Model.from_proto(proto)).refusals
    assert refusal.rule == "its bias is not one constant for each channel"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_new_bias_has_the_type_of_the_weight(dtype: type[np.floating]) -> None:
    kind = "float16" if dtype == np.float16 else "double"
    signature = f"({kind}[2,3,5,5] x) => ({kind}[2,4,H,W] y)"
    model = Model.from_proto(graph(signature, "y = Conv(x, w)", {"w": weight(4, 3, 1, 1, dtype=dtype)}))
    fold_and_canonicalize(model)
    onnx.checker.check_model(model.to_proto(), full_check=True)


LAYER = {"w": weight(8, 3, 3, 3), "u": weight(4, 8, 1, 1, seed=1)}


@pytest.mark.parametrize("recipe", ["prune", "quantize"])
def test_a_batch_of_one_that_the_file_fixes(recipe: str) -> None:
    found = through(recipe, PICTURE, "c = Conv(x, w) r = Relu(c) y = Conv(r, u)", LAYER)
    assert (found.kind, found.changed, found.why) == ("passed", True, "")


def test_prune_of_transposed_convolutions_alone() -> None:
    found = through("prune", PICTURE, "y = ConvTranspose(x, w)", {"w": weight(3, 8, 3, 3)})
    assert (found.kind, found.changed, found.why) == ("passed", True, "")


def test_quantize_of_a_grouped_transposed_convolution() -> None:
    arrays = {"w": weight(4, 3, 1, 1), "u": weight(4, 3, 3, 3, seed=1)}
    body = "c = Conv(x, w) y = ConvTranspose<group = 2, strides = [2,2]>(c, u)"
    proto = graph(PICTURE, body, arrays)
    model = Model.from_proto(proto)
    Quantize(synthetic=8, inputs="procedural").apply(model)
    inputs = {"x": np.random.default_rng(0).random((1, 3, 9, 8), np.float32)}
    before, after = in_runtime(proto, inputs), in_runtime(model.to_proto(), inputs)
    assert before is not None
    assert after is not None
    assert np.abs(after[0] - before[0]).max() < 0.1 * np.abs(before[0]).max()


def test_quantize_of_a_constant_cast_like_data() -> None:
    """torch's newer exporter leaves them where it inlines functions."""
    arrays = LAYER | {"two": np.float64(2)}
    body = "c = Conv(x, w) k = CastLike(two, c) d = Div(c, k) e = Mul(k, d) y = Conv(e, u)"
    found = through("quantize", PICTURE, body, arrays)
    assert (found.kind, found.changed, found.why) == ("passed", True, "")


@pytest.mark.parametrize("recipe", ["quantize", "prune"])
def test_values_that_are_not_finite_are_refused(recipe: str) -> None:
    found = through(recipe, PICTURE, "c = Conv(x, w) r = Sqrt(c) y = Conv(r, u)", LAYER)
    assert found.kind == "refused"
    assert "tensor 'r' is not finite on these images" in found.why


@pytest.mark.parametrize(("batch", "kind"), [(1, "passed"), (2, "refused")])
def test_a_tensor_without_the_batch_is_refused_unless_that_is_one_image(batch: int, kind: str) -> None:
    body = "c = Conv(x, w) s = ReduceMean<keepdims = 0>(c) d = Sub(c, s) y = Conv(d, u)"
    found = through("quantize", PICTURE.replace("[1,3", f"[{batch},3"), body, LAYER)
    assert found.kind == kind
    assert kind == "passed" or "tensor 's' of shape [] does not hold one image after the other" in found.why


def test_indices_of_one_image_run_at_its_batch() -> None:
    arrays = {"w": weight(1, 3, 1, 1), "at": np.array([[[[5, 7], [13, 15]]]]), "u": weight(4, 1, 1, 1)}
    body = "c = Conv(x, w) m = MaxUnpool<kernel_shape = [2,2], strides = [2,2]>(c, at) y = Conv(m, u)"
    found = through("prune", "(float[1,3,2,2] x) => (float[1,4,4,4] y)", body, arrays)
    assert found.kind == "passed", found.why


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signature", "body", "kind", "why"),
    [
        (
            "(float[N,3,1,8] x) => (float[N,3,1,8] y)",
            "c = Conv(x, w) s = Add(c, x) y = Conv(s, w)",
            "passed",
            "",
        ),
        (
            "(float[N,3,8,8] x) => (float[N,3,1,1] y)",
            "c = Conv(x, w) s = Add(c, x) y = GlobalAveragePool(s)",
            "passed",
            "",
        ),
    ],
    ids=["one pixel high", "nothing left to train"],
)
def test_drop_blocks_of_very_small_networks(
    signature: str, body: str, kind: str, why: str, quick_clock: None
) -> None:
    found = through("drop-blocks", signature, body, {"w": weight(3, 3, 1, 1)})
    assert (found.kind, found.why, found.changed) == (kind, why, kind == "passed")


def test_prune_refuses_what_would_not_be_finite_any_more() -> None:
    """A channel that is constant without its weights: onnxruntime's variance of it is a little below 0."""
    weights = np.full((3, 3, 1, 1), 1e-3) * np.array([1, 900, 1000]).reshape(3, 1, 1, 1)
    arrays = {"w": weights.astype(np.float32), "b": np.array([0.1, 1, 0], np.float32)}
    arrays["u"] = weight(4, 3, 1, 1, seed=1)
    body = "c = Conv(x, w, b) m = MeanVarianceNormalization(c) y = Conv(m, u)"
    found = through("prune", "(float[3,3,3,1] x) => (float[3,4,3,1] y)", body, arrays)
    assert found.kind == "refused"
    assert "output 'y' would not be finite any more" in found.why


@pytest.mark.parametrize("recipe", ["quantize", "prune", "drop-channels", "drop-blocks", "correct-bias"])
def test_squares_that_overflow_are_refused_with_the_layer(recipe: str) -> None:
    """Between two layers values reach 1e25, which float32 holds, and whose squares it does not."""
    arrays = {"w": 1e25 * weight(8, 3, 3, 3), "u": 1e-25 * weight(8, 8, 3, 3, seed=1)}
    arrays |= {"v": weight(8, 8, 3, 3, seed=2), "z": weight(4, 8, 1, 1, seed=3)}
    body = """c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, u) s = Relu(d)
        e = Conv<pads=[1,1,1,1]>(s, v) t = Add(e, s) y = Conv(t, z)"""
    found = through(recipe, "(float[N,3,9,8] x) => (float[N,4,H,W] y)", body, arrays)
    assert found.kind in ("passed", "refused"), found.why


def test_sensitivity_to_rounding_where_squares_overflow() -> None:
    arrays = {"w": 1e25 * weight(8, 3, 3, 3), "u": 1e-25 * weight(4, 8, 1, 1, seed=1)}
    model = Model.from_proto(graph(PICTURE, "c = Conv(x, w) r = Relu(c) y = Conv(r, u)", arrays))
    request = InputRequest(None, inputs="procedural", synthetic=4)
    with pytest.raises(InputError, match="too large for its squares to be summed up"):
        sensitivity(model, request, bits=(4,), activation_bits=(), sparsity=(), workers=1)
