"""The search for nodes that stay float32: errors over all batches, the shortest list that keeps a bound."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import pytest

from onnxcompress.model import Model
from onnxcompress.passes.fp16 import fp16
from onnxcompress.passes.fp16.candidates import candidates
from onnxcompress.passes.fp16.error_search import Simulation, choose
from onnxcompress.progress import silent
from tests.helpers.folding import graph, weight


def test_errors_are_of_all_batches_those_of_a_node_alone_of_the_first() -> None:
    """Only the second batch has values that overflow float16."""
    proto = graph("(float[N,3] x) => (float[N,3] y)", "y = MatMul(x, w)", {"w": weight(3, 3)})
    nodes, _ = candidates(proto)
    small = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    simulation = Simulation(proto, nodes, [small, 1e5 * small], threads=1)
    assert len(simulation.exact) == 2
    assert math.isinf(simulation.error({0}))
    alone = simulation.first_batch_error({0})
    off = (small.astype(np.float16).astype(np.float64) @ weight(3, 3).astype(np.float16)).astype(np.float16)
    exact = small.astype(np.float64) @ weight(3, 3)
    assert alone == pytest.approx(float(np.sqrt(np.square(off - exact).mean() / exact.var())), rel=0.05)


class Known:
    """Nodes of which each makes a known error; squares add up."""

    def __init__(self, errors: Sequence[float]) -> None:
        self.nodes, self.errors = list(errors), errors

    def error(self, half: Collection[int]) -> float:
        """The error with these nodes in float16."""
        return math.sqrt(sum(self.errors[i] ** 2 for i in half))

    first_batch_error = error


@pytest.mark.parametrize(
    ("bound", "kept", "error"),
    [
        (0.6, [], 0.5477),
        (0.5, [3], 0.3742),
        (0.35, [1, 3], 0.2236),
        (0.21, [1, 3, 4], 0.1),
        (0.05, [0, 1, 3, 4], 0),
    ],
)
def test_the_worst_nodes_stay_and_no_more_than_the_bound_asks_for(
    bound: float, kept: list[int], error: float
) -> None:
    simulation: Any = Known([0.1, 0.3, 0.0, 0.4, 0.2])
    found = choose(simulation, bound, silent)
    assert found.whole == pytest.approx(0.3**0.5)
    assert found.kept == kept
    assert found.error == pytest.approx(error, abs=1e-4)
    assert found.alone == ({} if not kept else dict(enumerate(simulation.errors)))


@pytest.mark.parametrize(("batch", "sizes"), [("N", [4, 4, 4, 4]), ("2", [2] * 8), ("16", [16])])
def test_sixteen_images_are_measured_on(
    batch: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four at once, or as many as the file fixes."""
    seen: list[int] = []

    def simulated(proto: Any, nodes: Any, batches: Any, threads: int = 0, **more: Any) -> Simulation:
        seen.extend(len(x) for x in batches)
        return Simulation(proto, nodes, batches, threads, **more)

    monkeypatch.setattr(fp16, "Simulation", simulated)
    text = f"(float[{batch},3,8,8] x) => (float[{batch},4,8,8] y)"
    model = Model.from_proto(graph(text, "y = Conv(x, w)", {"w": weight(4, 3, 1, 1)}))
    result = fp16.HalfPrecision(provider="cpu").apply(model)
    assert seen == sizes
    assert [used.count for used in result.inputs] == [16]
