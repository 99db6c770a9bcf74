"""Pruned layers tuned together: what must be followed, figures of a small network."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from onnxcompress.model import Model
from onnxcompress.optimize.executor import Executor
from onnxcompress.optimize.gradient_steps import Adam
from onnxcompress.optimize.reconstruction.global_tuning import (
    LEARNING_RATE,
    finetune_sparse,
    subnetwork_from,
)
from onnxcompress.quantization.qdq_plan import Bits, make_plan
from tests.helpers.folding import graph, weight

BODY = """a = Conv<pads=[1,1,1,1]>(x, w0, b0) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, w1, b1) s = Relu(c)
    d = Conv(s, w2, b2) t = Relu(d) q = GlobalAveragePool(t) f = Flatten(q) y = Gemm<transB=1>(f, w3, b3)"""


def network() -> Model:
    sizes = {0: (6, 3, 3, 3), 1: (6, 6, 3, 3), 2: (6, 6, 1, 1), 3: (4, 6)}
    arrays = {f"w{i}": 0.4 * weight(*size, seed=i) for i, size in sizes.items()}
    arrays |= {f"b{i}": 0.2 * weight(size[0], seed=10 + i) for i, size in sizes.items()}
    return Model.from_proto(graph("(float[N,3,8,8] x) => (float[N,4] y)", BODY, arrays))


def tuned(*, off: float = 0.0, **options: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Half the weights behind `a` gone, then tuned; relative errors of outputs and levels on other inputs.

    off: what the student's inputs have too much.
    """
    model = network()
    executor = Executor.from_model(model)
    where = subnetwork_from(model, "a")
    assert (where.levels, where.outputs) == (("c", "d", "q"), ("y",))
    pruned = {n: v for n, v in executor.parameters.items() if n[0] in "wb" and n[1] != "0"}
    pruned |= {n: torch.where(v.abs() < v.abs().median(), 0.0, v) for n, v in pruned.items() if n[0] == "w"}
    values = 2 * torch.randn(160, 6, 8, 8, generator=torch.Generator().manual_seed(0))
    x, held = values[:96], values[96:]
    new = finetune_sparse(
        model, make_plan(model, Bits(8, None, None)), where, x, x + off, pruned, **options
    )
    assert all(torch.equal(new[n] == 0, v == 0) for n, v in pruned.items() if n[0] == "w")
    names = ["y", "d"]
    with torch.no_grad():
        theirs = executor.run({"a": held}, names)
        ours = executor.run({"a": held + off}, names, new)
    errors = {n: float((ours[n] - theirs[n]).square().mean() / theirs[n].var()) for n in names}
    return new, errors


def test_tuning_leaves_what_it_did_of_the_error() -> None:
    before, after = tuned(steps=0)[1], tuned(steps=100)[1]
    assert (before["y"], before["d"]) == pytest.approx((0.839, 0.1055), rel=0.02)
    assert after["y"] == pytest.approx(0.0499, rel=0.1)
    assert after["d"] == pytest.approx(0.1064, rel=0.04)  # 0.1157 without the levels


def test_the_student_reads_its_own_inputs() -> None:
    """All of them too large by the same: its biases make up for much of that, seeing it."""
    assert tuned(off=0.5, steps=100)[1]["y"] == pytest.approx(0.0521, rel=0.1)


def test_batches_follow_the_seed() -> None:
    first, again, other = (tuned(steps=3, seed=seed)[0]["w1"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_rates_rise_then_fall_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    original = Adam.step

    def step(self: Adam, slopes: Any, share: float) -> None:
        rates.append([share * rate for rate in self.rates])
        original(self, slopes, share)

    monkeypatch.setattr(Adam, "step", step)
    new, _ = tuned(steps=40)
    wanted = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * step / 38)) for step in range(38)]
    assert len(rates[0]) == len(new)
    assert [max(one) / max(rates[1]) for one in rates] == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    assert LEARNING_RATE / 10 < max(rates[1]) < LEARNING_RATE
