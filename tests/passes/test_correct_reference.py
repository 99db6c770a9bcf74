"""correct-bias, where layers of the reference hold other numbers: seen through, or refused; never worse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxcompress.cli.main import main
from onnxcompress.errors import ModelError
from onnxcompress.model import Model, save
from onnxcompress.passes.absorb_bias import AbsorbBias
from onnxcompress.passes.base import PassResult, run
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.correct_bias.correct_bias import CorrectBiasFigures
from onnxcompress.passes.correct_bias.layer_matching import pairs_of
from onnxcompress.passes.correct_bias.reference import scaled_apart
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.runtime.inference import run as outputs
from tests.helpers.folding import Arrays, graph, weight
from tests.helpers.results import figures_of
from tests.passes.test_correct_bias import coarse, linear, rounded

SIGNATURE = "(float[N,4,8,8] x) => (float[N,3,8,8] y)"
BODY = "c = Conv(x, w) n = BatchNormalization(c, g, b, m, v) r = Relu(n) y = Conv(r, u, a)"


def network(seed: int = 0) -> onnx.ModelProto:
    """Conv, BatchNorm whose factors differ from channel to channel, Relu, Conv."""
    rng = np.random.default_rng(seed)
    w = weight(16, 4, 1, 1, seed=seed)
    arrays = {
        "w": w,
        "u": weight(3, 16, 1, 1, seed=seed + 1),
        "a": weight(3),
        "g": rng.uniform(0.5, 3, 16).astype(np.float32),
        "b": rng.uniform(0, 3, 16).astype(np.float32),
        "m": np.zeros(16, np.float32),
        "v": np.square(w).sum((1, 2, 3)),  # of inputs from N(0, 1)
    }
    return graph(SIGNATURE, BODY, arrays)


def noise_of(reference: onnx.ModelProto, model: onnx.ModelProto) -> float:
    x = np.random.default_rng(5).normal(size=(32, 4, 8, 8)).astype(np.float32)
    a, b = (outputs(one, {"x": x})["y"] for one in (reference, model))
    return float(np.square(a - b).mean())


def corrected(
    reference: onnx.ModelProto, twin: onnx.ModelProto, folder: Path
) -> tuple[onnx.ModelProto, PassResult[CorrectBiasFigures | None]]:
    onnx.save(reference, folder / "reference.onnx")
    model = Model.from_proto(twin)
    result = CorrectBias(reference=str(folder / "reference.onnx")).apply(model)
    return model.to_proto(), result


def test_batch_norms_that_were_folded_since(tmp_path: Path) -> None:
    reference = network()
    folded = Model.from_proto(reference)
    run([FoldBatchNorm()], folded)
    twin = rounded(folded.to_proto(), names="u")
    found, result = corrected(reference, twin, tmp_path)
    assert result.modified
    assert noise_of(reference, found) <= noise_of(reference, twin)
    kept = figures_of(result, CorrectBiasFigures).reference_snr_db
    assert kept is not None
    assert kept.after > kept.before


@pytest.mark.parametrize("passes", [[Equalize()], [Equalize(), AbsorbBias()]], ids=["equalize", "absorb"])
def test_what_moved_between_layers_since_is_repeated(
    passes: list[Equalize | AbsorbBias], tmp_path: Path
) -> None:
    reference = network()
    onnx.save(reference, tmp_path / "reference.onnx")
    from onnxcompress.model import load

    made = load(tmp_path / "reference.onnx")
    run([FoldBatchNorm(), *passes], made)
    twin = rounded(made.to_proto(), names="u")
    found, result = corrected(reference, twin, tmp_path)
    assert result.modified, result.refusals
    assert noise_of(reference, found) < noise_of(reference, twin)


def test_what_cannot_be_repeated_is_refused(tmp_path: Path) -> None:
    made = Model.from_proto(network())
    run([FoldBatchNorm(), Equalize()], made)
    twin = rounded(made.to_proto(), names="u")
    found, result = corrected(network(seed=3), twin, tmp_path)
    assert found == twin
    (refusal,) = result.refusals
    assert "equalize came between" in refusal.rule or "fold-bn came between" in refusal.rule


def test_channels_that_another_tool_scaled_are_refused(tmp_path: Path) -> None:
    reference = Model.from_proto(network())
    FoldBatchNorm().apply(reference)
    made = reference.copy()
    Equalize().apply(made)  # no provenance
    twin = rounded(made.to_proto(), bits=8, names="wu")
    found, result = corrected(reference.to_proto(), twin, tmp_path)
    assert found == twin
    assert [r.rule for r in result.refusals] == [
        "its channels are scaled or shifted against the reference's"
    ] * 2


def test_statistics_that_differ_are_refused(tmp_path: Path) -> None:
    reference = Model.from_proto(network())
    FoldBatchNorm().apply(reference)
    made = reference.copy()
    AbsorbBias().apply(made)  # no provenance, and weights that are equal
    twin = rounded(made.to_proto(), names="w")
    found, result = corrected(reference.to_proto(), twin, tmp_path)
    assert found == twin
    assert "scaled or shifted" in str(result.refusals[0])


def test_batch_norms_that_only_the_model_has_are_refused(tmp_path: Path) -> None:
    reference = Model.from_proto(network())
    FoldBatchNorm().apply(reference)
    _, result = corrected(reference.to_proto(), rounded(network(), names="w"), tmp_path)
    (refusal,) = result.refusals
    assert "it has 1 BatchNorms, the reference 0" in refusal.rule


def shifted() -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A network, and one of coarse weights whose bias is right where the record's means are wrong."""
    reference = Model.from_proto(network())
    FoldBatchNorm().apply(reference)
    twin = Model.from_proto(rounded(reference.to_proto(), bits=3, names="u"))
    from onnxcompress.statistics.record import read_record, write_record

    for one in (reference, twin):
        record = read_record(one)
        write_record(one, {n: type(s)(s.mean * 0 + 50, s.std, s.source) for n, s in record.items()})
    return reference.to_proto(), twin.to_proto()


def test_outputs_never_get_further_away(tmp_path: Path) -> None:
    reference, twin = shifted()
    onnx.save(reference, tmp_path / "reference.onnx")
    model = Model.from_proto(twin)
    with pytest.raises(ModelError, match="output 'y' further from the reference's"):
        CorrectBias(reference=str(tmp_path / "reference.onnx")).apply(model)
    assert model.to_proto() == twin


def test_the_command_writes_nothing_then(tmp_path: Path) -> None:
    for name, proto in zip(("reference", "twin"), shifted(), strict=True):
        save(Model.from_proto(proto), tmp_path / f"{name}.onnx")
    arguments = [str(tmp_path / name) for name in ("twin.onnx", "out.onnx", "reference.onnx")]
    assert main(["correct-bias", *arguments[:2], "--reference", arguments[2]]) == 1
    assert not (tmp_path / "out.onnx").exists()


def test_images_that_judge_are_not_learned_from(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    np.savez(tmp_path / "images.npz", x=pixels)
    arrays = {"w": weight(8, 3, 1, 1)}
    reference = graph("(float[N,3,8,8] x) => (float[N,8,8,8] y)", "y = Conv(x, w)", arrays)
    onnx.save(reference, tmp_path / "reference.onnx")
    model = Model.from_proto(
        graph("(float[N,3,8,8] x) => (float[N,8,8,8] y)", "y = Conv(x, w)", {"w": coarse(arrays["w"])})
    )
    one = CorrectBias(
        reference=str(tmp_path / "reference.onnx"), inputs="images", images=str(tmp_path / "images.npz")
    )
    assert one.apply(model).inputs[0].count == 12


@pytest.mark.parametrize("change", ["rounded", "pruned", "scaled", "scaled inputs"])
def test_factors_of_channels_are_told_from_other_changes(change: str) -> None:
    model = Model.from_proto(
        graph(SIGNATURE, "y = Conv<pads = [1,1,1,1]>(x, w)", {"w": weight(3, 4, 3, 3)})
    )
    layer = linear(model)
    w = layer.weight
    made = {
        "rounded": coarse(w, 3),
        "pruned": np.where(np.abs(w) < np.median(np.abs(w)), 0, w + 0.02 * weight(3, 4, 3, 3, seed=9)),
        "scaled": coarse(w * np.array([0.8, 1.1, 1.3]).reshape(3, 1, 1, 1), 8),
        "scaled inputs": coarse(w * np.array([0.8, 1.1, 1.3, 0.5]).reshape(1, 4, 1, 1), 8),
    }[change]
    assert scaled_apart(layer, made) == change.startswith("scaled")


def test_the_smallest_change_of_a_weight_of_zeros_is_one() -> None:
    """Its norm is 0 in double precision, as that of no change."""
    arrays: Arrays = {"w": np.zeros((2, 3, 1, 1)), "b": np.ones(2)}
    signature, body = "(double[N,3,4,4] x) => (double[N,2,4,4] y)", "y = Conv(x, w, b)"
    reference = Model.from_proto(graph(signature, body, arrays))
    same, other = (
        Model.from_proto(graph(signature, body, arrays | {"w": value}))
        for value in (arrays["w"], np.nextafter(arrays["w"], np.inf))
    )
    assert pairs_of(reference, same) == ([], [])
    (pair,), refusals = pairs_of(reference, other)
    assert not refusals
    assert pair.layer.label == "y"
