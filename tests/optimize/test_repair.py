"""The repair of a network without a block: what reaches its steps, and the error that it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onnxcompress.account import InputSource
from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.graph.query import read
from onnxcompress.model import Model
from onnxcompress.optimize.block_drop import repair as repair_module
from onnxcompress.optimize.block_drop.options import DropBlocksOptions
from onnxcompress.optimize.block_drop.repair import Repair
from onnxcompress.optimize.calibration import Inputs
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction import residual_refit
from onnxcompress.optimize.reconstruction.feature_loss import Matched
from onnxcompress.optimize.reconstruction.finetune import Finetuned, Schedule
from onnxcompress.optimize.reconstruction.levels import feature_levels
from onnxcompress.optimize.reconstruction.tuning_inputs import TuningInputs
from onnxcompress.optimize.reconstruction.tuning_outcome import TuningOutcome
from onnxcompress.optimize.synthesis.drawn_inputs import DrawnSet
from onnxcompress.optimize.synthesis.statistics_alignment import StatisticsAlignment
from onnxcompress.progress import silent
from tests.helpers.folding import graph, weight

BODY = """a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a)
    c = Conv<pads=[1,1,1,1]>(r, w1, b1) d = Relu(c) e = Conv<pads=[1,1,1,1]>(d, w2, b2)
    s = Add(r, e) t = Relu(s) f = Conv<pads=[1,1,1,1]>(t, w3, b3) g = Relu(f) y = Conv(g, w4, b4)"""
NONE = DropBlocksOptions(blocks=1, steps=0)


def whole() -> Model:
    arrays = {"w0": 0.3 * weight(6, 3, 3, 3), "w4": weight(4, 6, 1, 1, seed=4), "b4": weight(4, seed=34)}
    arrays |= {f"w{i}": 0.2 * weight(6, 6, 3, 3, seed=i) for i in range(1, 4)}
    arrays |= {f"b{i}": 0.3 * weight(6, seed=30 + i) for i in range(4)}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", BODY, arrays))


def images(count: int = 40) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def repair(
    options: DropBlocksOptions = NONE,
    *,
    kinds: Mapping[str, int] | None = None,
    alignment: StatisticsAlignment | None = None,
    x: Tensor | None = None,
) -> Repair:
    """Ready to repair a network without its one block."""
    x = images() if x is None else x
    teacher = whole()
    if alignment is not None:
        alignment.apply(teacher)
    student = teacher.copy()
    instead = drop_blocks(student, [find_blocks(teacher).blocks[0].exit])
    sources = tuple(
        InputSource(kind, count, 0, "") for kind, count in (kinds or {"images": len(x)}).items()
    )
    inputs = Inputs(DrawnSet(x.numpy()), sources)
    matched = Matched("x", ("y", "y"), feature_levels(teacher, student, "y", instead))
    return Repair(
        options, student, teacher, Executor.from_model(teacher), matched,
        TuningInputs(inputs, x, x, inputs.shares()), alignment, "cpu", 16, silent,
    )  # fmt: skip


def features(model: Model, x: Tensor, values: Mapping[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return Executor.from_model(model).run({"x": x}, ["y"], values)["y"].double()


def lost(student: Tensor, teacher: Tensor) -> float:
    """Squared error over the energy of the teacher's features."""
    return float((student - teacher).square().sum() / teacher.square().sum())


def test_the_error_is_what_the_repaired_network_lacks_of_the_whole_ones_features() -> None:
    one = repair()
    before = lost(features(one.model, one.inputs.images), features(one.whole, one.inputs.images))
    found, _ = one.run({})
    assert found == pytest.approx(
        lost(features(one.model, one.inputs.images), features(one.whole, one.inputs.images)), rel=1e-5
    )
    assert found < 0.5 * before


def test_layers_are_refitted_on_many_images() -> None:
    """Error on images that were not seen; on 5 images it is 1.2 times as large."""
    one, held = repair(), torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    one.run({})
    assert lost(features(one.model, held), features(one.whole, held)) == pytest.approx(0.0644, rel=0.05)


@pytest.mark.parametrize(("kind", "today"), [("images", 0.0464), ("distilled", 0.0505)])
def test_made_inputs_damp_the_refitting_more_than_real_ones(
    kind: str, today: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual_refit, "choose_target", lambda *given, **named: 0.0)
    assert repair(kinds={kind: 3}, x=images(3)).run({})[0] == pytest.approx(today, rel=0.03)


def test_what_is_asked_for_reaches_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 10 real and 30 made images each source is drawn as often as the other."""
    seen: dict[str, Any] = {}

    def finetune(student: Any, teacher: Any, matched: Any, x: Any, *given: Any, **named: Any) -> Finetuned:
        seen.update(named, images=x, schedule=given[0], aside=given[1].images)
        return Finetuned(named["start"], TuningOutcome(40, 7, 7, 0.2, 0.1, 7))

    monkeypatch.setattr(repair_module, "finetune", finetune)
    options = DropBlocksOptions(blocks=1, steps=7, batch=12, learning_rate=0.03, seed=5)
    one = repair(options, kinds={"images": 10, "distilled": 30})
    one.run({})
    assert seen["schedule"] == Schedule(steps=7, batch=12, learning_rate=0.03, seed=5, captured=True)
    assert seen["shares"][:10].sum() == pytest.approx(float(seen["shares"][10:].sum()))
    assert torch.equal(seen["images"], one.inputs.images)
    assert torch.equal(seen["aside"], one.inputs.aside)
    assert {"w3", "b3", "w4", "b4"} <= seen["start"].keys()  # from refitted layers on
    repair(options).run({})
    assert seen["shares"] is None


def test_fewer_images_in_a_step_take_smaller_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the memory holds a quarter of a batch, a step is a quarter as long."""
    seen: list[Schedule] = []

    def finetune(*given: Any, **named: Any) -> Finetuned:
        seen.append(given[4])
        return Finetuned(named["start"], TuningOutcome(40, 7, 7, 0.2, 0.1, 7))

    monkeypatch.setattr(repair_module, "finetune", finetune)
    monkeypatch.setattr(repair_module, "fitting", lambda what, batch, work: work(batch // 4))
    repair(DropBlocksOptions(blocks=1, steps=7, batch=64, learning_rate=0.04)).run({})
    assert seen[0].batch == 16
    assert seen[0].learning_rate == pytest.approx(0.01)


def test_aligned_networks_come_back_as_the_networks_own() -> None:
    """Aligned again, the result lacks what the repair told; in front of the block nothing changed."""
    scale, shift = torch.linspace(0.5, 2, 6), torch.linspace(-1, 1, 6)
    alignment = StatisticsAlignment(
        {f"w{i}": scale.roll(i).reshape(-1, 1, 1, 1) for i in (0, 3)},
        {f"b{i}": (scale.roll(i), shift) for i in (0, 3)},
    )
    one = repair(replace(NONE, steps=5), alignment=alignment)
    wanted = features(one.whole, one.inputs.images)
    found, _ = one.run({})
    own, plain = one.model.graph.tensors(), whole().graph.tensors()
    for name in ("w0", "b0"):
        np.testing.assert_allclose(read(own[name]), read(plain[name]), rtol=1e-6)
    again = {n: alignment.align(n, torch.from_numpy(read(own[n]).copy())) for n in alignment.names}
    assert lost(features(one.model, one.inputs.images, again), wanted) == pytest.approx(found, rel=1e-3)
