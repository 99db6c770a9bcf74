"""Leave the tensors on which the outputs depend most in floats.

    c_t = E (y_t − y_0)² / Var y        y_0: all tensors in floats, y_t: t alone on its grid

The ratios c_t add up, nearly. Where the quantized network keeps too little of an output, the tensors with
the largest c_t lose their QuantizeLinear and DequantizeLinear, as many as it takes. One network with
switches gives all y_t:

    x ─> QuantizeLinear ─> DequantizeLinear ─┐
    └────────────────────────────────────────┴─ Where(switch of its grid) ─> readers

Weights stay integers: with a scale for each channel they cost little. Ratios are those of the guard
(`evaluation.fidelity`), of the output, or part of one, that keeps least; inputs are others than it has.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxcompress.account import Refusal
from onnxcompress.data.image_set import image_count
from onnxcompress.errors import CompressWarning
from onnxcompress.evaluation.decibels import EQUAL_DB
from onnxcompress.evaluation.fidelity import fidelity
from onnxcompress.evaluation.guard import Floors
from onnxcompress.graph.edit import remove_unread, replace_uses
from onnxcompress.graph.query import data_input, is_op, node_label, producer, sigmoid_outputs
from onnxcompress.model import Model
from onnxcompress.optimize.calibration import InputRequest, gather_inputs
from onnxcompress.optimize.effort import USUAL_PIXELS, pixels_of
from onnxcompress.optimize.executor.open_batch import file_batch
from onnxcompress.progress import Progress, silent
from onnxcompress.runtime.inference import or_one_by_one, run_each, unread_feeds
from onnxcompress.runtime.session import session

COUNT, FEWEST = 32, 8
"""Inputs to judge by: of the usual size, and of large ones."""
BATCH = 4
TRIED = 4
"""Inputs on which the tensors are compared with each other."""
SEED = 1_000_003
"""Seed of made inputs, counted from that of the pass: others than the pass learns from, and than the
guard's."""
FLOOR, GOAL = 9.0, 12.0
"""Decibels below which tensors are left in floats, and up to which. The guard warns below 7 on inputs of
its own, where it may see 2 less."""
SHARE = 0.25
"""Share of the tensors, at most, where the guard would not warn without them."""
TOGETHER = 4
"""Tensors that are tried together first, and one by one only if they count."""
SETS, ALONE = 64, 128
"""Sets of tensors that are tried together, and tensors that are tried one by one, at most: so it ends soon
on networks of hundreds of tensors, too. Of the others of a set each is taken to cost the same."""
ROUNDS = 6
"""How often the noise that may stay is halved until the goal is reached."""
SWITCHES = "onnxcompress_switches"

Runs = Mapping[str, Sequence[np.ndarray]]


@dataclass(frozen=True)
class FloatTensor:
    """A tensor that stays floats."""

    name: str
    noise: float
    """Noise of the outputs over their variation where it alone is quantized."""

    @property
    def refusal(self) -> Refusal:
        """For the account."""
        return Refusal(
            self.name,
            f"it stays floats: quantized alone, its noise would be {100 * self.noise:.2g} % of an output's "
            "variation",
            "--no-float-tensors quantizes it all the same",
        )


class Judge:
    """What a network's outputs keep: on the images that were given, else on made ones of another seed."""

    def __init__(self, original: Model, request: InputRequest) -> None:
        """Make the inputs, and run the network on them.

        Args:
            original: The network before it is quantized.
            request: What the pass learns from.

        Raises:
            CompressError: No inputs can be made, or the network does not run on them.
        """
        name, batch = data_input(original).name, file_batch(original) or BATCH
        usual = COUNT * USUAL_PIXELS // max(pixels_of(original), USUAL_PIXELS)
        count = max(batch, max(usual, FEWEST) // batch * batch)
        if request.images is None:
            request = replace(request, inputs="procedural", synthetic=count, seed=request.seed + SEED)
        else:
            given = request.count or image_count(request.images)
            request = replace(request, inputs="images", count=min(given, count))
        with warnings.catch_warnings():  # what it would say, the pass's own reading has said
            warnings.simplefilter("ignore", CompressWarning)
            x = gather_inputs(original, request).images.array()
        x = x[np.arange(count) % len(x)]
        others = unread_feeds(original)
        self.answers = sigmoid_outputs(original)

        def run(rows: int) -> dict[str, list[np.ndarray]]:
            self.feeds = [{name: x[i : i + rows], **others} for i in range(0, count, rows)]
            return run_each(original, self.feeds)

        self.wanted = or_one_by_one(run, batch)
        same = fidelity(self.wanted, self.wanted, self.answers).outputs
        self.unseen = any(one.unseen for one in same)
        """Whether an output says no to all of these inputs, so that what it keeps of a yes is not seen."""
        self.tried = max(TRIED // len(self.feeds[0][name]), 1)

    def kept_db(self, model: Model) -> float:
        """Measure what a quantized network keeps.

        Args:
            model: The network, quantized.

        Returns:
            Variation to noise of the output, or part of one, that keeps least, decibels.
        """
        return self.compare(self.wanted, run_each(model, self.feeds))

    def compare(self, before: Runs, after: Runs) -> float:
        """Compare outputs.

        Args:
            before: Outputs by name, one value for each run.
            after: The others.

        Returns:
            Variation to noise of the output, or part of one, that keeps least, decibels.
        """
        found = fidelity(before, after, self.answers)
        return found.worst.judged_db if found.outputs else EQUAL_DB


def leave_floats(
    model: Model, judge: Judge, kept_db: float, progress: Progress = silent
) -> list[FloatTensor]:
    """Take the quantizers that cost most out of a quantized network, in place.

    Args:
        model: The network, with QuantizeLinear and DequantizeLinear.
        judge: The inputs, and what the network gave before.
        kept_db: What it keeps as it is, decibels.
        progress: Called with the stage, the steps done and the steps in all.

    Returns:
        The tensors that stay floats now, all of them at worst.
    """
    trials = _Trials(model, judge, progress)
    count = len(trials.groups)
    most = count if kept_db < Floors().warn_db else int(SHARE * count)
    best_db = judge.compare(judge.wanted, trials.outputs((), whole=True))
    goal = min(GOAL, best_db - 1)
    may_stay = _ratio(goal) - _ratio(best_db)
    costs = trials.costs(may_stay)
    order = np.argsort(-costs, kind="stable").tolist()
    gone: list[int] = []
    for _ in range(ROUNDS):
        left = np.cumsum(costs[order][::-1])[::-1]
        gone = order[: min(int((left > may_stay).sum()), most)]
        stay = [group for group in range(count) if group not in gone]
        if len(gone) == most or judge.compare(judge.wanted, trials.outputs(stay, whole=True)) >= goal:
            break
        may_stay /= 2
    return [
        FloatTensor(name, float(costs[group]))
        for group in sorted(gone)
        for name in _take_out(model, trials.groups[group])
    ]


class _Trials:
    """Runs of a quantized network with some of its quantizers."""

    def __init__(self, model: Model, judge: Judge, progress: Progress) -> None:
        self.groups = _grids(model)
        self._judge = judge
        self._progress = progress
        switched = model.copy(lambda proto: _add_switches(proto, self.groups))
        self._session = session(switched, provider="cpu")
        self._names = [output.name for output in self._session.get_outputs()]

    def outputs(self, active: Sequence[int], whole: bool = False) -> Runs:
        """Run with the quantizers of some grids; on all inputs, or on those that tensors are tried on."""
        switches = np.zeros(len(self.groups), bool)
        switches[list(active)] = True
        feeds = self._judge.feeds if whole else self._judge.feeds[: self._judge.tried]
        values = zip(
            *(self._session.run(self._names, {**feed, SWITCHES: switches}) for feed in feeds), strict=True
        )
        return {name: list(value) for name, value in zip(self._names, values, strict=True)}

    def costs(self, may_stay: float) -> np.ndarray:
        """Measure the noise of each grid alone over the outputs' variation, by so many runs at most."""
        without = self.outputs(())

        def cost(active: Sequence[int]) -> float:
            return _ratio(self._judge.compare(without, self.outputs(active)))

        count = len(self.groups)
        size = max(TOGETHER, -(-count // SETS))
        sets = [list(range(first, min(first + size, count))) for first in range(0, count, size)]
        found, left = np.zeros(count), ALONE
        together = []
        for some in sets:
            together.append(cost(some))
            self._progress("looking for tensors that stay floats", some[-1] + 1, count)
        for at in np.argsort(together)[::-1].tolist():
            some = sets[at]
            if together[at] * count / TOGETHER >= may_stay / TOGETHER and len(some) <= left:
                left -= len(some)
                found[some] = [cost([group]) for group in some]
            else:
                found[some] = together[at] / len(some)
        return found


def _ratio(decibels: float) -> float:
    return float(10 ** (-decibels / 10))


def _grids(model: Model) -> list[list[str]]:
    """List outputs of the activations' DequantizeLinear by their grid, in the order of the graph."""
    found: dict[str, list[str]] = {}
    for node in model.graph.nodes:
        if is_op(node, "DequantizeLinear") and is_op(producer(node.inputs[0]), "QuantizeLinear"):
            found.setdefault(node.inputs[1].name, []).append(node.outputs[0].name)
    return list(found.values())


def _add_switches(proto: onnx.ModelProto, groups: Sequence[Sequence[str]]) -> None:
    """Let a switch for each grid choose between the values on it and the floats."""
    graph = proto.graph
    makers = {output: node for node in graph.node for output in node.output}
    nodes = []
    ours = {name: index for index, group in enumerate(groups) for name in group}
    for index in range(len(groups)):
        place = onnx.helper.make_tensor(f"{SWITCHES}_at_{index}", onnx.TensorProto.INT64, [], [index])
        graph.initializer.append(place)
        nodes.append(
            onnx.helper.make_node("Gather", [SWITCHES, place.name], [f"{SWITCHES}_{index}"], axis=0)
        )
    for node in graph.node:
        nodes.append(node)
        name = node.output[0] if node.output else ""
        if name in ours:
            rounded = f"{SWITCHES}_on_grid_{len(nodes)}"
            source = makers[node.input[0]].input[0]
            node.output[0] = rounded
            nodes.append(
                onnx.helper.make_node("Where", [f"{SWITCHES}_{ours[name]}", rounded, source], [name])
            )
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    graph.input.append(onnx.helper.make_tensor_value_info(SWITCHES, onnx.TensorProto.BOOL, [len(groups)]))


def _take_out(model: Model, names: Sequence[str]) -> list[str]:
    """Let the readers of these tensors read what was quantized; return the names of that."""
    tensors: Mapping[str, gs.Tensor] = model.graph.tensors()
    found = []
    for name in names:
        quantize = producer(producer(tensors[name]).inputs[0])  # type: ignore[union-attr]
        assert quantize is not None
        source = quantize.inputs[0]
        replace_uses(model, tensors[name], source)
        remove_unread(model, [tensors[name]])
        found.append(str(source.name))
    model.touch()
    return found


def float_readers(model: Model) -> frozenset[str]:
    """Find the layers that read floats.

    Args:
        model: The quantized network.

    Returns:
        Labels of the nodes none of whose data inputs is dequantized from activations.
    """
    return frozenset(
        node_label(node)
        for node in model.graph.nodes
        if not any(
            is_op(source := producer(tensor), "DequantizeLinear")
            and is_op(producer(source.inputs[0]), "QuantizeLinear")
            for tensor in node.inputs
        )
    )
