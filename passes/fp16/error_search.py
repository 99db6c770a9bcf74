"""Measure the error of the outputs when some nodes compute in float16, and choose which stay float32.

onnxruntime's CPU kernels compute a float16 model in float32 and do not even round between them: an overflow
on a GPU does not show there. So float16 is simulated on the float32 graph: for a node i in float16 each of
its float tensors t becomes

    t' = g_i ? float32(float16(t)) : t

where the gate g_i is a further input of the graph. One session serves all choices of nodes; a gate is a
bool. Sums inside an operator stay float32, as cuDNN and cuBLAS have them by default; but those of a mean or
a norm count as float16, which overflow on some devices (REDUCTIONS):

    mean = float16(Σ x) / float16(n)          norm = √ float16(Σ x²)

    error(S) = max over outputs y:  √( mean (y_S − y)² / var y )        infinite where y_S is not finite

In place of outputs of other types (classes, masks) the last floats on the way to them are measured.

Choosing the nodes that stay float32: if error(all) is too large, nodes are ranked by the error({i}) of each
alone on one batch, and bisection finds the shortest beginning of that ranking that must stay float32 for
the rest to keep the bound. It assumes that errors shrink as more nodes stay; the final choice is measured.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from onnxcompress.errors import ModelError, one_line
from onnxcompress.evaluation.accuracy import image_input
from onnxcompress.model.validation import node_reads
from onnxcompress.passes.fp16.candidates import FLOAT, HALF, Candidate, element_types
from onnxcompress.progress import Progress
from onnxcompress.runtime.inference import unread_feeds
from onnxcompress.runtime.session import session

_GATE = "onnxcompress.gate"
REDUCTIONS = ("ReduceMean", "ReduceL2", "ReduceLogSum", "LpPool", "GlobalLpPool")
"""Reductions that divide, take a root or a logarithm at their end. Kernels that add in float16 overflow
before that: a mean is zero or NaN on CUDA (microsoft/onnxconverter-common issues 299 and 323)."""


class Simulation:
    """A float32 model in which any candidate can be switched to float16."""

    def __init__(
        self,
        proto: onnx.ModelProto,
        nodes: Sequence[Candidate],
        batches: Sequence[np.ndarray],
        threads: int = 0,
        *,
        half_ends: bool = False,
    ) -> None:
        """Create one session with a gate for each candidate, and run it in float32.

        Args:
            proto: The float32 model, with one input.
            nodes: The candidates.
            batches: Inputs, in batches as the network takes them.
            threads: Threads of onnxruntime; 0: its default.
            half_ends: Whether inputs and outputs are float16, too.
        """
        self.nodes, self.half_ends = nodes, half_ends
        self.given = self.batches = batches
        self.input, self.others = image_input(proto).name, unread_feeds(proto)
        made = gated(proto, nodes)
        made.graph.output.extend(map(helper.make_empty_tensor_value_info, _last_floats(proto)))
        self.session = session(made, provider="cpu", threads=threads, optimize=False)
        self.outputs = [o.name for o in self.session.get_outputs() if o.type == "tensor(float)"]
        self.exact = self._run((), batches, self.outputs)
        self.ends_error = 0.0
        """Error with all candidates in float32, by inputs and outputs that are float16."""
        if half_ends:
            self.batches = [_through_half(x) for x in batches]
            self.ends_error = self.error(())

    def error(self, half: Collection[int]) -> float:
        """Measure the error with some candidates in float16.

        Args:
            half: Their places in `nodes`.

        Returns:
            The error, as from `worst_error`.
        """
        return worst_error(self.exact, self._seen(half, self.batches))

    def first_batch_error(self, half: Collection[int]) -> float:
        """Measure the error on the first batch only.

        Args:
            half: Places in `nodes` of the candidates in float16.

        Returns:
            The error, as from `worst_error`.
        """
        return worst_error(self.exact[:1], self._seen(half, self.batches[:1]))

    def exact_values(self, names: Sequence[str]) -> list[list[np.ndarray]]:
        """Compute outputs in float32, whatever their types.

        Args:
            names: Names of outputs of the network.

        Returns:
            Their values in each batch.
        """
        return self.exact if names == self.outputs else self._run((), self.given, names)

    def _seen(self, half: Collection[int], batches: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Return outputs of each batch as they leave the network."""
        found = self._run(half, batches, self.outputs)
        return [[_through_half(y) for y in values] for values in found] if self.half_ends else found

    def _run(
        self, half: Collection[int], batches: Sequence[np.ndarray], names: Sequence[str]
    ) -> list[list[np.ndarray]]:
        """Return outputs of each batch."""
        gates = {f"{_GATE}{i}": np.array(i in half) for i in range(len(self.nodes))}
        fixed = self.others | gates
        try:
            with np.errstate(over="ignore"):
                return [self.session.run(names, {self.input: x, **fixed}) for x in batches]
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise ModelError(f"measuring float16: the run failed ({one_line(error)})") from error


def worst_error(
    exact: Sequence[Sequence[np.ndarray]], approximate: Sequence[Sequence[np.ndarray]]
) -> float:
    """Compute `relative_error` of outputs that came batch by batch, whatever their axes mean.

    Args:
        exact: The outputs of each batch in float32.
        approximate: The outputs of each batch with nodes in float16.

    Returns:
        The error; infinite where an output changes its shape, because it depends on values that changed.
    """
    pairs = [pair for a, b in zip(exact, approximate, strict=True) for pair in zip(a, b, strict=True)]
    if any(a.shape != b.shape for a, b in pairs):
        return math.inf
    whole = [
        [np.concatenate([value.reshape(-1) for value in values]) for values in zip(*runs, strict=True)]
        for runs in (exact, approximate)
    ]
    return relative_error(*whole)


def relative_error(exact: Sequence[np.ndarray], approximate: Sequence[np.ndarray]) -> float:
    """Compute the root mean square error of the worst output, relative to the deviation of `exact`.

    Args:
        exact: The outputs in float32.
        approximate: The outputs to compare, of the same shapes.

    Returns:
        The error; infinite where a value is not finite any more.
    """
    worst = 0.0
    for a, b in zip(exact, approximate, strict=True):
        there = np.isfinite(a)
        a, b = a[there].astype(np.float64), b[there].astype(np.float64)
        if not np.isfinite(b).all():
            return math.inf
        if not a.size:
            continue
        off = float(np.square(a - b).mean())
        scale = float(a.var()) or float(np.square(a).mean())
        worst = max(worst, math.sqrt(off / scale) if scale > 0 else math.inf if off else 0.0)
    return worst


@dataclass
class Float32Nodes:
    """The candidates that stay float32, by places in the list."""

    kept: list[int]
    whole: float
    """Error with all candidates in float16."""
    error: float
    """Error with the converted ones in float16."""
    alone: dict[int, float] = field(default_factory=dict)
    """Error with each alone in float16, on one batch; measured only where `whole` was too large."""


def choose(simulation: Simulation, bound: float, progress: Progress) -> Float32Nodes:
    """Choose the candidates that must stay float32 for the error to keep a bound.

    Args:
        simulation: The model.
        bound: Largest error, relative to the deviation of the outputs.
        progress: Called with the stage, the candidates done and the candidates in all.

    Returns:
        The candidates, and the errors measured.
    """
    count = len(simulation.nodes)
    whole = simulation.error(range(count))
    if whole <= bound:
        return Float32Nodes([], whole, whole)
    alone = {}
    for i in range(count):
        alone[i] = simulation.first_batch_error({i})
        progress("measuring float16", i + 1, count)
    ranked = sorted(alone, key=lambda i: -alone[i])
    low, high, error = sum(e > bound for e in alone.values()), count, 0.0
    while low < high:
        middle = (low + high) // 2
        found = simulation.error(set(ranked[middle:]))
        if found <= bound:
            high, error = middle, found
        else:
            low = middle + 1
    return Float32Nodes(sorted(ranked[:high]), whole, error if high < count else 0.0, alone)


def _through_half(values: np.ndarray) -> np.ndarray:
    """Round float32 values to float16; others stay as they are."""
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32) if values.dtype == np.float32 else values


def _last_floats(proto: onnx.ModelProto) -> list[str]:
    """Return the float32 tensors of which outputs of other types are made: these are measured instead."""
    types = element_types(proto)
    given = {o.name for o in proto.graph.output}
    fixed = {t.name for t in proto.graph.initializer}
    wanted = {name for name in given if types.get(name) != FLOAT}
    found: list[str] = []
    for node in reversed(proto.graph.node):
        if wanted.isdisjoint(node.output) or node.op_type in ("Shape", "Size"):
            continue
        floats = [name for name in node.input if types.get(name) == FLOAT]
        found += [name for name in floats if name not in given | fixed]
        wanted.update(name for name in node_reads(node) if name not in floats)
    return list(dict.fromkeys(found))


def gated(proto: onnx.ModelProto, nodes: Sequence[Candidate]) -> onnx.ModelProto:
    """Copy the model, with a bool input for each candidate that rounds its tensors to float16.

    Args:
        proto: The model.
        nodes: The candidates.

    Returns:
        The copy.
    """
    made = onnx.ModelProto()
    made.CopyFrom(proto)
    graph = made.graph
    chosen = {c.index: (i, c) for i, c in enumerate(nodes)}
    old = list(graph.node)
    del graph.node[:]
    for at, node in enumerate(old):
        if at in chosen:
            graph.node.extend(_gated_node(node, *chosen[at]))
        else:
            graph.node.append(node)
    graph.input.extend(
        helper.make_tensor_value_info(f"{_GATE}{i}", onnx.TensorProto.BOOL, []) for i in range(len(nodes))
    )
    if made.ir_version < 4:  # IR 3 wants initializers among the inputs; 4 says the same without
        made.ir_version = 4
    return made


def _gated_node(node: onnx.NodeProto, number: int, candidate: Candidate) -> Iterable[onnx.NodeProto]:
    before: list[onnx.NodeProto] = []
    after: list[onnx.NodeProto] = []
    own = onnx.NodeProto()
    own.CopyFrom(node)
    for i in candidate.inputs:
        own.input[i] = f"{_GATE}{number}.in{i}"
        before += _rounded(node.input[i], own.input[i], number)
    for i in candidate.outputs:
        own.output[i] = f"{_GATE}{number}.out{i}"
        half = own.output[i]
        if node.op_type in REDUCTIONS:
            half = f"{half}.reduced"
            after += _reduced(own, half)
        after += _rounded(own.output[i], node.output[i], number, half)
    return [*before, own, *after]


def _rounded(source: str, target: str, number: int, half: str = "") -> list[onnx.NodeProto]:
    """Round a tensor where the gate is open; `half`: the tensor to round, where that is another one."""
    return [
        *_half(half or source, f"{target}.back"),
        helper.make_node("Where", [f"{_GATE}{number}", f"{target}.back", source], [target]),
    ]


def _half(source: str, target: str) -> list[onnx.NodeProto]:
    """Round a tensor to float16."""
    return [
        helper.make_node("Cast", [source], [f"{target}.half"], to=HALF),
        helper.make_node("Cast", [f"{target}.half"], [target], to=FLOAT),
    ]


def _scalar(value: float, target: str) -> onnx.NodeProto:
    """Write a float32 constant."""
    tensor = onnx.numpy_helper.from_array(np.array(value, np.float32))
    return helper.make_node("Constant", [], [target], value=tensor)


def _reduced(node: onnx.NodeProto, target: str) -> list[onnx.NodeProto]:
    """Compute what a reduction gives where its sum is float16, from its exact output."""
    exact = node.output[0]
    if node.op_type == "ReduceLogSum":
        whole = helper.make_node("Exp", [exact], [f"{target}.sum"])
        logarithm = helper.make_node("Log", [f"{target}.rounded"], [target])
        return [whole, *_half(f"{target}.sum", f"{target}.rounded"), logarithm]
    if node.op_type != "ReduceMean":
        power = float(next((helper.get_attribute_value(a) for a in node.attribute if a.name == "p"), 2))
        return [
            _scalar(power, f"{target}.power"),
            helper.make_node("Pow", [exact, f"{target}.power"], [f"{target}.sum"]),
            *_half(f"{target}.sum", f"{target}.rounded"),
            _scalar(1 / power, f"{target}.root"),
            helper.make_node("Pow", [f"{target}.rounded", f"{target}.root"], [target]),
        ]
    return [
        helper.make_node("Size", [node.input[0]], [f"{target}.all"]),
        helper.make_node("Size", [exact], [f"{target}.left"]),
        helper.make_node("Div", [f"{target}.all", f"{target}.left"], [f"{target}.ratio"]),
        helper.make_node("Cast", [f"{target}.ratio"], [f"{target}.count"], to=FLOAT),
        helper.make_node("Mul", [exact, f"{target}.count"], [f"{target}.sum"]),
        *_half(f"{target}.sum", f"{target}.rounded"),
        *_half(f"{target}.count", f"{target}.count_rounded"),
        helper.make_node("Div", [f"{target}.rounded", f"{target}.count_rounded"], [target]),
    ]
