"""The equivalence matrix: drawn graphs through every pass that claims to preserve the function."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import onnx
import pytest
from hypothesis import HealthCheck, given, seed, settings

from tests.helpers.graphs import graphs
from tests.robustness.matrix import RECIPES, check, subject_of
from tests.robustness.through_passes import Subject, invalid

pytestmark = pytest.mark.slow

EXAMPLES, SEED = 200, 2


@cache
def drawn() -> list[Subject]:
    """The same graphs for each recipe and in each run; `python -m tests.robustness.matrix` draws others."""
    found: list[Subject] = []

    @seed(SEED)
    @settings(max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(graphs())
    def keep(proto: onnx.ModelProto) -> None:
        found.append(subject_of(proto))

    keep()
    return found


CHANGED = {
    "fold-bn": 90,
    "fold-bn --copy-shared": 90,
    "equalize": 10,
    "equalize --clip per-channel": 10,
    "equalize --assumption-free": 16,
    "both, --assumption-free": 16,
    "what quantize and prune do first": 30,
    "absorb-bias": 3,
    "correct-bias, of other biases": 12,
    "channel groups, scaled": 10,
}
"""Of the graphs, how many the last pass of each recipe changes, at least."""


@pytest.mark.parametrize("recipe", RECIPES)
def test_outputs_stay(recipe: str) -> None:
    """And enough graphs are changed for that to say something."""
    changed = 0
    for subject in drawn():
        found = check(recipe, subject)
        assert found is None or found.kind == "passed", f"{found.why}\n{subject.text}"
        changed += found is not None and found.changed
    assert changed >= CHANGED[recipe]


def test_the_graphs_are_valid_and_hold_the_grid() -> None:
    """What the issue asks of the grid is drawn, so that a pass that gets it wrong is seen."""
    seen: Counter[str] = Counter()
    for subject in drawn():
        assert not invalid(subject.case.model)
        seen.update(_traits(subject.case.model))
    rare = {trait: seen[trait] for trait in WANTED if not seen[trait]}
    assert not rare, rare


WANTED = (
    "Conv", "ConvTranspose", "Gemm", "MatMul", "BatchNormalization", "If", "group", "auto_pad", "pads",
    "bias", "transA", "transB", "alpha", "beta", "Transpose", "FLOAT", "FLOAT16", "DOUBLE", "IR 3", "IR 8",
    "opset 7 to 10", "opset 11 to 17", "opset 18 on", "shared weight", "several readers", "several outputs",
)  # fmt: skip


def _traits(proto: onnx.ModelProto) -> set[str]:
    nodes, graph = proto.graph.node, proto.graph
    found = {n.op_type for n in nodes} | {a.name for n in nodes for a in n.attribute}
    kind: Any = graph.input[0].type.tensor_type.elem_type
    found |= {onnx.TensorProto.DataType.Name(kind), f"IR {proto.ir_version}"}
    opset = proto.opset_import[0].version
    found.add("opset 7 to 10" if opset < 11 else "opset 11 to 17" if opset < 18 else "opset 18 on")
    reads = Counter(name for n in nodes for name in n.input)
    layers = [n for n in nodes if n.op_type in ("Conv", "ConvTranspose", "Gemm")]
    found |= {"bias"} if any(len(n.input) > 2 for n in layers) else set()
    found |= {"shared weight"} if any(reads[n.input[1]] > 1 for n in layers) else set()
    found |= {"several readers"} if any(reads[n.output[0]] > 1 for n in nodes) else set()
    return found | ({"several outputs"} if len(graph.output) > 1 else set())
