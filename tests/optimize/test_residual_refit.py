"""Layers behind a dropped block, refitted: the exact solution, and figures of a small residual network."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.graph.query import read
from onnxcompress.model import Model
from onnxcompress.optimize.deterministic_threads import worker_count
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction import layer_moments, residual_refit
from onnxcompress.optimize.reconstruction.residual_refit import RefitSettings, ResidualRefit
from onnxcompress.optimize.reconstruction.ridge import FOLDS, TARGET_MADE, TARGET_REAL, LayerMoments
from tests.helpers.folding import graph, weight

BODY = """a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a)
    c = Conv<pads=[1,1,1,1]>(r, w1, b1) d = Relu(c) e = Conv<pads=[1,1,1,1]>(d, w2, b2)
    s = Add(r, e) t = Relu(s)
    f = Conv<pads=[1,1,1,1]>(t, w3, b3) g = Relu(f) h = Conv<pads=[1,1,1,1]>(g, w4, b4) u = Add(t, h)
    v = Relu(u) y = Conv(v, w5, b5)"""
SHORT = """a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a)
    c = Conv<pads=[1,1,1,1]>(r, w1, b1) d = Relu(c) e = Conv<pads=[1,1,1,1]>(d, w2, b2)
    s = Add(r, e) t = Relu(s)
    y = Conv(t, w5, b5)"""


def networks(body: str) -> tuple[Model, Model, Tensor]:
    """A teacher, a student that lacks the first block, and images."""
    arrays = {"w0": weight(6, 3, 3, 3), "w5": weight(4, 6, 1, 1, seed=15), "b5": weight(4, seed=25)}
    arrays |= {f"w{i}": 0.15 * weight(6, 6, 3, 3, seed=i) for i in range(1, 5)}
    arrays |= {f"b{i}": 0.2 * weight(6, seed=30 + i) for i in range(5)}
    used = {name: value for name, value in arrays.items() if f"{name}," in body or f"{name})" in body}
    teacher = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", body, used))
    student = teacher.copy()
    drop_blocks(student, [find_blocks(teacher).blocks[0].exit])
    x = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return teacher, student, x


def values(model: Model, name: str, x: Tensor, new: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return Executor.from_model(model).run({"x": x}, [name], new)[name]


def refitted(
    teacher: Model, student: Model, x: Tensor, feature: str = "y", **settings: Any
) -> dict[str, Tensor]:
    return ResidualRefit.of(teacher, student, feature, RefitSettings(**settings)).run(x)


def loss(teacher: Model, student: Model, x: Tensor, new: dict[str, Tensor]) -> float:
    ours, theirs = values(student, "y", x, new), values(teacher, "y", x)
    return float((ours - theirs).square().mean() / theirs.var())


@pytest.mark.parametrize("batch", [7, 40])
def test_a_refitted_layer_is_the_ridge_regression_on_its_patches(batch: int) -> None:
    teacher, student, x = networks(SHORT)
    found = refitted(teacher, student, x, batch=batch, ridge=0.05)
    assert set(found) == {"w5", "b5"}
    reads = values(student, "r", x).permute(1, 0, 2, 3).flatten(1).double().numpy()
    wanted = values(teacher, "y", x).permute(1, 0, 2, 3).flatten(1).double().numpy()
    own, bias = (read(student.graph.tensors()[name]).astype(np.float64) for name in ("w5", "b5"))
    own = own.reshape(4, 6)
    rows = np.vstack([reads, np.ones(reads.shape[1])])
    gram = rows @ rows.T
    damping = 0.05 * reads.var(1).mean() * reads.shape[1] * np.diag([1.0] * 6 + [0.0])
    off = wanted - own @ reads - bias[:, None]
    delta = np.linalg.solve(gram + damping, rows @ off.T).T
    np.testing.assert_allclose(found["w5"].reshape(4, 6), own + delta[:, :-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["b5"], bias + delta[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ridge", "today"), [(TARGET_REAL, 0.0241), (TARGET_MADE, 0.0295)])
def test_refitting_recovers_what_it_did_with_all_layers_behind_the_block(
    ridge: float, today: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two images, where it matters how much the regression is damped."""
    monkeypatch.setattr(residual_refit, "choose_target", lambda *given, **named: 0.0)
    teacher, student, x = networks(BODY)
    new = refitted(teacher, student, x[:2], ridge=ridge)
    assert set(new) == {"w3", "b3", "w4", "b4", "w5", "b5"}
    own = Executor.from_model(student).parameters
    assert all(not torch.equal(new[name], own[name]) for name in new)
    assert loss(teacher, student, x[:2], {}) == pytest.approx(0.0613, rel=0.02)
    assert loss(teacher, student, x[:2], new) == pytest.approx(today, rel=0.02)


@pytest.mark.parametrize("ridge", [TARGET_REAL, 1e6])
def test_few_images_are_not_learned_by_heart(ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """On images that were not seen, the λ chosen is better than the least and than none."""
    teacher, student, _ = networks(BODY)
    generator = torch.Generator().manual_seed(3)
    smooth = torch.nn.functional.interpolate(torch.randn(70, 3, 2, 2, generator=generator), size=(8, 8))
    x, unseen = smooth[:6], smooth[6:]
    chosen = loss(teacher, student, unseen, refitted(teacher, student, x))
    monkeypatch.setattr(residual_refit, "choose_target", lambda *given, **named: 0.0)
    assert chosen < 0.95 * loss(teacher, student, unseen, refitted(teacher, student, x, ridge=ridge))


AHEAD = """a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a)
    c = Conv<pads=[1,1,1,1]>(r, w1, b1) d = Relu(c) e = Conv<pads=[1,1,1,1]>(d, w2, b2)
    s = Add(r, e) t = Relu(s)
    p = Conv(t, w5, b5) g = Relu(t) h = Clip(g, low, high) y = Add(p, h)"""
"""A projection that comes before the other side of its sum."""


def test_a_projection_makes_up_for_what_the_other_side_will_lose() -> None:
    """Its target is what the teacher computes there, and what the other side lacks."""
    arrays = {"w0": weight(6, 3, 3, 3), "w5": weight(6, 6, 1, 1, seed=15), "b5": weight(6, seed=25)}
    arrays |= {f"w{i}": 0.15 * weight(6, 6, 3, 3, seed=i) for i in (1, 2)}
    arrays |= {f"b{i}": 0.2 * weight(6, seed=30 + i) for i in range(3)}
    arrays |= {"low": np.float32(0.3).reshape(()), "high": np.float32(1).reshape(())}
    teacher = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,6,8,8] y)", AHEAD, arrays))
    student = teacher.copy()
    drop_blocks(student, [find_blocks(teacher).blocks[0].exit])
    x = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found = refitted(teacher, student, x, ridge=0.05)
    assert set(found) == {"w5", "b5"}
    reads = values(student, "r", x).permute(1, 0, 2, 3).flatten(1).double().numpy()
    theirs, lost = (
        values(teacher, "p", x),
        values(teacher, "h", x) - values(student, "h", x),
    )
    assert lost.square().mean() > 1e-3
    wanted = (theirs + lost).permute(1, 0, 2, 3).flatten(1).double().numpy()
    own, bias = (read(student.graph.tensors()[name]).astype(np.float64) for name in ("w5", "b5"))
    own = own.reshape(6, 6)
    rows = np.vstack([reads, np.ones(reads.shape[1])])
    damping = 0.05 * reads.var(1).mean() * reads.shape[1] * np.diag([1.0] * 6 + [0.0])
    delta = np.linalg.solve(rows @ rows.T + damping, rows @ (wanted - own @ reads - bias[:, None]).T).T
    np.testing.assert_allclose(found["w5"].reshape(6, 6), own + delta[:, :-1], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["b5"], bias + delta[:, -1], rtol=1e-3, atol=1e-4)


def test_nothing_is_refitted_in_front_of_the_block() -> None:
    teacher, student, x = networks(BODY)
    assert {"w3", "w4"} <= set(refitted(teacher, student, x, "u")) <= {"w3", "b3", "w4", "b4"}
    assert not refitted(teacher, teacher.copy(), x)


def test_moments_of_batches_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a wide layer those of one batch take tens of megabytes."""
    made: list[weakref.ref[LayerMoments]] = []
    most, original = 0, layer_moments._moments

    def counted(*given: Any) -> LayerMoments:
        nonlocal most
        found = original(*given)
        made.append(weakref.ref(found))
        most = max(most, sum(one() is not None for one in made))
        return found

    monkeypatch.setattr(layer_moments, "_moments", counted)
    teacher, student, x = networks(BODY)
    refitted(teacher, student, x, batch=2)
    assert 0 < most <= FOLDS * (worker_count() + 2) < FOLDS * len(x) // 2


def test_the_places_follow_the_seed() -> None:
    """Of larger images 128 places are drawn."""
    teacher, student, _ = networks(BODY)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first, again, other = (refitted(teacher, student, x, seed=seed)["w4"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
