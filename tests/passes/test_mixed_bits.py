"""Budgets: the bits and zeros that they give are the best there are, and `quantize` keeps to them."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from onnxcompress.account import Figures
from onnxcompress.data.image_set import load_images
from onnxcompress.data.preprocess import Preprocess
from onnxcompress.errors import InputError, OptionError
from onnxcompress.model import Model, load
from onnxcompress.optimize.calibration import InputRequest
from onnxcompress.passes import PassResult
from onnxcompress.passes.base import run
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.passes.quantize import Quantize
from onnxcompress.passes.quantize.figures import Budget, QuantizeFigures
from onnxcompress.runtime.inference import run as run_model
from onnxcompress.sensitivity.analysis import Sensitivity, account, sensitivity
from onnxcompress.sensitivity.bit_allocation import curves, error_at, mixed_bits, sparsity_budget
from onnxcompress.sensitivity.rows import Kind, Row
from tests.helpers.folding import Arrays, graph, weight
from tests.helpers.results import figures_of


def measured(model: Model, *arguments: Any, **options: Any) -> Sensitivity:
    """The sensitivities of a network as the command measures them: folded and canonicalized first."""
    own = model.copy()
    fold_and_canonicalize(own)
    return sensitivity(own, *arguments, **options)


RESNET = "resnet20-fashion.onnx"
QUICK = Quantize(
    preprocess="fashion-mnist",
    inputs="layerwise",
    synthetic=48,
    activation_bits=0,
    first_last=0,
    reconstruct=False,
)


def rows_of(errors: dict[str, dict[float, float]], kind: Kind = "weight_bits") -> list[Row]:
    return [
        Row(name, "Conv", name, 10, kind, value, error, None)
        for name, curve in errors.items()
        for value, error in curve.items()
    ]


def random_rows(seed: int, count: int = 5) -> tuple[list[Row], dict[str, int]]:
    rng = np.random.default_rng(seed)
    sizes = {f"w{i}": int(rng.integers(10, 1000)) for i in range(count)}
    height = {name: float(rng.lognormal(0, 2)) for name in sizes}
    return rows_of({n: {b: height[n] * 4.0**-b for b in (2, 4, 8)} for n in sizes}), sizes


@pytest.mark.parametrize("seed", range(4))
def test_mixed_bits_are_nearly_the_best_of_all(seed: int) -> None:
    rows, sizes = random_rows(seed)
    known = curves(rows, "weight_bits")
    budget = 4.3 * sum(sizes.values())

    def total(bits: tuple[int, ...]) -> float:
        return sum(error_at(known[n], b) for n, b in zip(sizes, bits, strict=True))

    fitting = [
        bits
        for bits in itertools.product(range(2, 9), repeat=len(sizes))
        if sum(n * b for n, b in zip(sizes.values(), bits, strict=True)) <= budget
    ]
    found = mixed_bits(rows, sizes, dict.fromkeys(sizes, 2), 8, budget)
    assert tuple(found.values()) in fitting
    assert total(tuple(found.values())) <= 1.5 * min(map(total, fitting))
    assert total(tuple(found.values())) < 0.7 * total((4,) * len(sizes))


def test_floors_and_the_most_are_kept_and_a_budget_below_is_refused() -> None:
    rows, sizes = random_rows(0)
    floors = dict.fromkeys(sizes, 2) | {"w0": 8}
    found = mixed_bits(rows, sizes, floors, 5, 100.0 * sum(sizes.values()))
    assert found == dict.fromkeys(sizes, 5) | {"w0": 8}
    with pytest.raises(OptionError, match=r"the least is .* --first-last 0"):
        mixed_bits(rows, sizes, floors, 5, 2.0 * sum(sizes.values()))
    with pytest.raises(InputError, match="two numbers of bits at least"):
        mixed_bits(rows_of({"w0": {4: 1.0}}), {"w0": 10}, {"w0": 2}, 8, 50.0)


def test_stored_bits_are_four_or_eight() -> None:
    rows, sizes = random_rows(1)
    budget = 6.0 * sum(sizes.values())
    found = mixed_bits(rows, sizes, dict.fromkeys(sizes, 2), 8, budget, small_types=True)
    assert set(found.values()) == {4, 8}
    assert sum(sizes[n] * b for n, b in found.items()) <= budget


@pytest.mark.parametrize("overall", [0.0, 0.37, 0.6, 0.9])
def test_zeros_are_spread_with_the_least_error(overall: float) -> None:
    """No zeros can move from one layer to another and lower the sum."""
    sizes = {"a": 100, "b": 300, "c": 50}
    shares = (0.5, 0.7, 0.9)
    height = {"a": 1.0, "b": 0.2, "c": 5.0}
    curve = {n: {s: h * s**4 for s in shares} for n, h in height.items()}
    found = sparsity_budget(rows_of(curve, "sparsity"), sizes, overall)
    assert sum(found[n] * sizes[n] for n in sizes) == pytest.approx(overall * 450)

    def error(name: str, share: float) -> float:
        return float(np.interp(share, (0, *shares), (0, *curve[name].values())))

    for one, other in itertools.permutations(sizes, 2):
        less, more = found[one] - 1 / sizes[one], found[other] + 1 / sizes[other]
        if less >= 0 and more <= 0.9:
            moved = error(one, less) + error(other, more)
            assert moved >= error(one, found[one]) + error(other, found[other]) - 1e-12
    with pytest.raises(OptionError, match=r"up to 0\.90 in all"):
        sparsity_budget(rows_of(curve, "sparsity"), sizes, 0.95)
    with pytest.raises(InputError, match="'d': its error was not measured"):
        sparsity_budget(rows_of(curve, "sparsity"), {"d": 1}, 0.5)


def error_of(model: Model, exact: np.ndarray, x: np.ndarray) -> float:
    return float(
        np.square(run_model(model.to_proto(), {"input": x})["logits"] - exact).mean() / exact.var()
    )


@pytest.mark.slow
def test_mixed_bits_beat_as_many_uniform_ones(models: Path) -> None:
    """Rounded to nearest, where no layer makes up for another; on real images."""
    preprocess = Preprocess.parse("fashion-mnist")
    x = load_images(models / "fashion-test2k.npz", preprocess=preprocess, count=100).array()
    exact = run_model(load(models / RESNET).to_proto(), {"input": x})["logits"]
    errors, average = [], 0.0
    for choice in ({"weight_bits": 4}, {"bits_budget": 0.0}):
        model = load(models / RESNET)
        choice = {"bits_budget": average} if "bits_budget" in choice else choice
        (result,) = run([replace(QUICK, **choice)], model)
        rows = figures_of(result, QuantizeFigures).layers
        sizes = [weight_size(model, row.name) for row in rows]
        average = sum(r.weight_bits * n for r, n in zip(rows, sizes, strict=True)) / sum(sizes)
        errors.append(error_of(model, exact, x))
    assert average <= 4
    assert len(budget_of(result).layers_by_bits) > 1
    assert errors[1] < 0.7 * errors[0]


def budget_of(result: PassResult[Figures | None]) -> Budget:
    budget = figures_of(result, QuantizeFigures).budget
    assert budget is not None
    return budget


def weight_size(model: Model, label: str) -> int:
    node = next(n for n in model.graph.nodes if n.name == label)
    return int(np.prod(node.inputs[1].inputs[0].inputs[0].shape))


def small(opset: int = 17, outputs: int = 8) -> Model:
    body = "c = Conv(x, w) r = Relu(c) d = Conv(r, v) s = Relu(d) e = Conv(s, u) y = GlobalAveragePool(e)"
    arrays: Arrays = {"w": weight(32, 3, 3, 3), "v": weight(32, 32, 3, 3, seed=1)}
    arrays["u"] = weight(outputs, 32, 1, 1, seed=2)
    text = f"(float[N,3,8,8] x) => (float[N,{outputs},1,1] y)"
    return Model.from_proto(graph(text, body, arrays, opset=opset))


@pytest.mark.slow
def test_a_file_gives_what_measuring_gives_and_a_seed_the_same_bytes(tmp_path: Path) -> None:
    source = small()
    request = InputRequest(inputs="procedural", synthetic=12)
    found = measured(source, request, (2, 4, 8))
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(account(found, source.digest())))
    one = Quantize(inputs="procedural", synthetic=12, bits_budget=4.5, first_last=0)
    bits, bytes_ = [], []
    for choice in (one, one, replace(one, sensitivity=str(path), overflow_safe=False)):
        model = small()
        (result,) = run([choice], model)
        bits.append([row.weight_bits for row in figures_of(result, QuantizeFigures).layers])
        bytes_.append(model.to_proto().SerializeToString(deterministic=True))
        assert budget_of(result).average_bits <= 4.5
    assert bits[0] == bits[1] == bits[2]
    assert len(set(bits[0])) > 1
    assert bytes_[0] == bytes_[1]
    with pytest.raises(InputError, match="measured on another model"):
        run([replace(one, sensitivity=str(path))], small(outputs=9))


def test_first_and_last_keep_eight_bits() -> None:
    model = small()
    (result,) = run([Quantize(inputs="procedural", synthetic=12, bits_budget=4.5)], model)
    bits = [row.weight_bits for row in figures_of(result, QuantizeFigures).layers]
    assert (bits[0], bits[2]) == (8, 8)
    assert bits[1] == 4


def test_a_size_in_small_types_is_that_of_the_file() -> None:
    megabytes = (32 * 32 * 9 / 2 + 32 * 27 + 8 * 32) / 1e6
    one = Quantize(inputs="procedural", synthetic=8, activation_bits=0, small_types=True)
    model = small(opset=21)
    (result,) = run([replace(one, size_budget=megabytes)], model)
    stored = [t for t in model.to_proto().graph.initializer if t.name.endswith("_quantized")]
    sizes = {t.name: len(t.raw_data) for t in stored if t.data_type != onnx.TensorProto.INT32}
    assert sum(sizes.values()) == pytest.approx(megabytes * 1e6)
    assert budget_of(result).megabytes == pytest.approx(megabytes)
    with pytest.raises(OptionError, match="the least is"):
        run([replace(one, size_budget=0.9 * megabytes)], small(opset=21))


def test_a_budgets_figures_are_per_weight_and_in_millions_of_bytes() -> None:
    """Of both budgets the smaller one counts."""
    sizes = [32 * 27, 32 * 32 * 9, 8 * 32]
    one = Quantize(inputs="procedural", synthetic=8, bits_budget=4.5, size_budget=1.0)
    (result,) = run([one], small())
    figures = figures_of(result, QuantizeFigures)
    budget, bits = budget_of(result), [row.weight_bits for row in figures.layers]
    total = sum(b * n for b, n in zip(bits, sizes, strict=True))
    assert budget.budget_bits == pytest.approx(4.5)
    assert budget.average_bits == pytest.approx(total / sum(sizes))
    assert budget.megabytes == pytest.approx(total / 8e6)
    assert budget.layers_by_bits == {4: 1, 8: 2}
    assert 0 < budget.estimated_error < 0.1
    small_one = replace(one, bits_budget=8.0, size_budget=4.5 * sum(sizes) / 8e6)
    (result,) = run([small_one], small())
    assert budget_of(result).budget_bits == pytest.approx(4.5)
    assert budget_of(result).layers_by_bits == {4: 1, 8: 2}


def test_the_estimated_error_is_the_sum_of_what_each_layer_costs(tmp_path: Path) -> None:
    path, model = tmp_path / "rows.json", small()
    curve = {2: 0.5, 4: 0.04, 8: 0.001}
    convs = [node for node in model.graph.nodes if node.op == "Conv"]
    rows = [
        Row(n.name, "Conv", n.inputs[1].name, n.inputs[1].values.size, "weight_bits", bits, error, None)
        for n in convs
        for bits, error in curve.items()
    ]
    path.write_text(json.dumps({"rows": [vars(row) for row in rows], "sha256": model.digest()}))
    one = Quantize(inputs="procedural", synthetic=8, bits_budget=4.0, first_last=0, sensitivity=str(path))
    (result,) = run([one], model)
    bits = [row.weight_bits for row in figures_of(result, QuantizeFigures).layers]
    expected = sum(error_at({float(b): e for b, e in curve.items()}, b) for b in bits)
    assert budget_of(result).estimated_error == pytest.approx(expected)
    assert budget_of(result).sensitivity == str(path)


def test_between_measured_bits_an_error_falls_by_the_same_factor_each() -> None:
    assert error_at({2: 0.16, 4: 0.01, 8: 1e-4}, 3) == pytest.approx(0.04)
    assert error_at({4: 1.0, 8: 1e-4}, 5) == pytest.approx(0.1)
    assert error_at({4: 1.0, 8: 1e-4}, 8) == 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits_budget": 1.0}, "--bits-budget 1: expected 2 to 8"),
        ({"size_budget": -1.0}, "--size-budget -1"),
        ({"sensitivity": "a.json"}, "give a budget with it"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, float | str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        replace(QUICK, **options).check()  # type: ignore[arg-type]
