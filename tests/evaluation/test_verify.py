"""Random inputs and output differences."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxcompress.errors import CompressWarning, ModelError, OptionError
from onnxcompress.evaluation.equivalence import difference, difference_of
from onnxcompress.runtime.inference import random_feeds, run


def parse(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')


def scaled(factor: float, output: str = "y", kind: str = "float") -> onnx.ModelProto:
    return parse(f"""
        net ({kind}[N,3] x) => ({kind}[N,3] {output})
        <float f = {{{factor}}}> {{ g = CastLike(f, x)  {output} = Mul(x, g) }}
    """)


# random inputs


def test_types_and_ranges() -> None:
    kinds = ["float", "double", "float16", "bool", "int8", "uint8", "int32", "int64"]
    inputs = ", ".join(f"{kind}[N,50] i_{kind}" for kind in kinds)
    model = parse(f"net ({inputs}) => (float[N,50] y) {{ y = Relu(i_float) }}")
    feeds = random_feeds(model, batch=4)
    assert {name: a.dtype.name for name, a in feeds.items()} == {
        f"i_{k}": {"float": "float32", "double": "float64"}.get(k, k) for k in kinds
    }
    assert all(a.shape == (4, 50) for a in feeds.values())
    assert feeds["i_int64"].min() >= 0
    assert feeds["i_int64"].max() < 8
    assert feeds["i_uint8"].max() > 100
    assert feeds["i_int8"].min() < 0
    assert abs(float(feeds["i_float"].mean())) < 0.5


def test_seed_decides() -> None:
    model = scaled(1)
    first, again, other = (random_feeds(model, seed=s)["x"] for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_weights_listed_as_inputs_are_not_fed() -> None:
    model = scaled(1)
    model.graph.input.append(onnx.helper.make_tensor_value_info("f", onnx.TensorProto.FLOAT, [1]))
    assert list(random_feeds(model)) == ["x"]


def test_a_dimension_named_as_the_batch_is_the_batch() -> None:
    model = parse("net (float[N,N,3] x) => (float[N,N,3] y) { y = Relu(x) }")
    assert random_feeds(model, batch=5)["x"].shape == (5, 5, 3)


def test_open_dimensions_and_unknown_names() -> None:
    model = parse("net (float[N,3,H,4] x) => (float[N,3,H,4] y) { y = Relu(x) }")
    with pytest.warns(CompressWarning, match="input 'x': Nx3xHx4 leaves sizes open"):
        assert random_feeds(model)["x"].shape == (2, 3, 224, 4)
    with pytest.raises(OptionError, match="the model's inputs are x"):
        random_feeds(model, shapes={"z": (1, 3, 4, 4)})
    assert random_feeds(model, shapes={"x": (1, 3, 9, 4)})["x"].shape == (1, 3, 9, 4)


def test_strings_are_refused() -> None:
    model = parse("net (string[N] x) => (string[N] y) { y = Identity(x) }")
    with pytest.raises(ModelError, match="input 'x': type string is not handled"):
        random_feeds(model)


# differences


@pytest.mark.parametrize("kind", ["float", "double", "float16"])
def test_a_model_does_not_differ_from_itself(kind: str) -> None:
    model = scaled(3, kind=kind)
    found = difference(model, model, random_feeds(model))
    assert (found.max_abs, found.max_rel) == (0, 0)


def test_relative_to_the_largest_output_of_the_reference() -> None:
    feeds = {"x": np.array([[1, -4, 2]], np.float32)}
    found = difference(scaled(1), scaled(1.5), feeds)
    assert found.max_abs == 2
    assert found.max_rel == 0.5
    assert found.output == "y"
    assert found.per_output == {"y": (2, 0.5)}


def test_outputs_with_other_names_go_by_order() -> None:
    feeds = {"x": np.ones((1, 3), np.float32)}
    assert difference(scaled(1), scaled(1, output="z"), feeds).max_abs == 0


def test_worst_output_is_named() -> None:
    a = {"p": np.array([10.0]), "q": np.array([1.0])}
    b = {"p": np.array([11.0]), "q": np.array([1.5])}
    found = difference_of(a, b)
    assert (found.output, found.max_rel, found.max_abs) == ("q", 0.5, 1.0)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([np.nan, 1.0], [np.nan, 1.0], 0),
        ([np.inf, 1.0], [np.inf, 1.0], 0),
        ([np.nan, 1.0], [0.0, 1.0], np.inf),
        ([1.0, 1.0], [np.nan, 1.0], np.inf),
        ([np.inf, 1.0], [-np.inf, 1.0], np.inf),
        ([0.0, 0.0], [0.0, 1.0], np.inf),
    ],
)
def test_what_is_not_finite(a: list[float], b: list[float], expected: float) -> None:
    found = difference_of({"y": np.array(a, np.float32)}, {"y": np.array(b, np.float32)})
    assert found.max_rel == expected


def test_outputs_of_another_form() -> None:
    with pytest.raises(ModelError, match=r"output 'y': shapes \[2\] and \[3\] differ"):
        difference_of({"y": np.ones(2)}, {"y": np.ones(3)})
    with pytest.raises(ModelError, match="1 and 2 outputs"):
        difference_of({"y": np.ones(2)}, {"y": np.ones(2), "z": np.ones(2)})


def test_a_failed_run_is_one_line() -> None:
    with pytest.raises(ModelError, match="the run failed") as caught:
        run(scaled(1), {"x": np.ones((1, 7), np.float32)})
    assert "\n" not in str(caught.value)
