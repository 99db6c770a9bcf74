"""Layers behind a dropped block, refitted: the exact solution, and figures of a small residual network."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from onnxcompress.graph.block_removal import drop_blocks
from onnxcompress.graph.blocks import find_blocks
from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.reconstruction.residual_refit import (
    RIDGE,
    RIDGE_SYNTHETIC,
    Reconstruction,
    segments,
)
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


def networks(body: str) -> tuple[Model, Executor, Executor, Tensor]:
    """A student that lacks the first block, with its teacher and images."""
    arrays = {"w0": weight(6, 3, 3, 3), "w5": weight(4, 6, 1, 1, seed=15), "b5": weight(4, seed=25)}
    arrays |= {f"w{i}": 0.15 * weight(6, 6, 3, 3, seed=i) for i in range(1, 5)}
    arrays |= {f"b{i}": 0.2 * weight(6, seed=30 + i) for i in range(5)}
    used = {name: value for name, value in arrays.items() if f"{name}," in body or f"{name})" in body}
    teacher = Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4,8,8] y)", body, used))
    student = teacher.copy()
    drop_blocks(student, [find_blocks(teacher).blocks[0].exit])
    x = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return student, Executor.from_model(student), Executor.from_model(teacher), x


def loss(student: Executor, teacher: Executor, x: Tensor, new: dict[str, Tensor]) -> float:
    with torch.no_grad():
        ours, theirs = student.run({"x": x}, ["y"], new)["y"], teacher.run({"x": x}, ["y"])["y"]
    return float((ours - theirs).square().mean() / theirs.var())


@pytest.mark.parametrize("batch", [7, 40])
def test_a_refitted_layer_is_the_ridge_regression_on_its_patches(batch: int) -> None:
    model, student, teacher, x = networks(SHORT)
    found = Reconstruction(student, teacher, segments(model, "y"), batch=batch, ridge=0.05).run(x)
    assert set(found) == {"w5", "b5"}
    with torch.no_grad():
        reads = student.run({"x": x}, ["r"])["r"].permute(1, 0, 2, 3).flatten(1).double().numpy()
        wanted = teacher.run({"x": x}, ["y"])["y"].permute(1, 0, 2, 3).flatten(1).double().numpy()
    own, bias = (student.parameters[name].double().numpy() for name in ("w5", "b5"))
    own = own.reshape(4, 6)
    rows = np.vstack([reads, np.ones(reads.shape[1])])
    gram = rows @ rows.T
    damping = 0.05 * np.diag(gram)[:-1].mean() * np.diag([1.0] * 6 + [0.0])
    off = wanted - own @ reads - bias[:, None]
    delta = np.linalg.solve(gram + damping, rows @ off.T).T
    np.testing.assert_allclose(found["w5"].reshape(4, 6), own + delta[:, :-1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found["b5"], bias + delta[:, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("ridge", "today"), [(RIDGE, 0.0241), (RIDGE_SYNTHETIC, 0.0314)])
def test_refitting_recovers_what_it_did_with_all_layers_behind_the_block(
    ridge: float, today: float
) -> None:
    """Of two images, where it matters how much the regression is damped."""
    model, student, teacher, x = networks(BODY)
    new = Reconstruction(student, teacher, segments(model, "y"), ridge=ridge).run(x[:2])
    assert set(new) == {"w3", "b3", "w4", "b4", "w5", "b5"}
    assert all(not torch.equal(new[name], student.parameters[name]) for name in new)
    assert loss(student, teacher, x[:2], {}) == pytest.approx(0.0613, rel=0.02)
    assert loss(student, teacher, x[:2], new) == pytest.approx(today, rel=0.02)


def test_nothing_is_refitted_in_front_of_the_block() -> None:
    model, student, teacher, x = networks(BODY)
    refit = Reconstruction(student, teacher, segments(model, "y"))
    assert refit.segments[refit.first_changed()].start == "r"
    assert "w0" not in refit.run(x)
    whole = Reconstruction(teacher, teacher, segments(model, "y"))
    assert whole.first_changed() == len(whole.segments)


def test_the_places_follow_the_seed() -> None:
    """Of larger images 128 places are drawn."""
    model, student, teacher, _ = networks(BODY)
    x = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    first, again, other = (
        Reconstruction(student, teacher, segments(model, "y"), seed=seed).run(x)["w4"] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
