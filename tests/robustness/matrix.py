"""The equivalence matrix: passes that claim to preserve the function, on graphs of `tests.helpers.graphs`.

`python -m tests.robustness.matrix --examples 2000 --seed 1` draws that many graphs and prints, for each
pass, on how many it was checked, what it changed, and the shrunk graph of each failure.

absorb-bias is exact where no value lies below the statistics' reach, so here the record says just that of
the very inputs: mean ± 3 deviations are the least and the largest value of each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import onnx
import onnx_graphsurgeon as gs
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded

from onnxcompress.errors import ModelError
from onnxcompress.graph.edit import set_values
from onnxcompress.graph.query import input_at, is_output, node_label, read, value_readers
from onnxcompress.model import Model, load, save
from onnxcompress.passes.absorb_bias import AbsorbBias
from onnxcompress.passes.base import Pass
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.statistics.record import ChannelStatistics, write_record
from tests.helpers import graphs
from tests.helpers.channel_scaling import scale_groups
from tests.helpers.folding import feeds
from tests.helpers.suites import Case
from tests.robustness.through_passes import Outcome, Subject, invalid, judge

BATCH = 100
"""Graphs of one seed: hypothesis varies what it has drawn, so that many of one seed are alike."""

Apply = Callable[[Model, Subject], bool]
"""Applies the passes in place; whether the last of them changed something."""


def _of(*passes: Pass) -> Apply:
    def apply(model: Model, subject: Subject) -> bool:
        modified = False
        for one in passes:
            modified = one.apply(model).modified
            again = model.to_proto()
            assert not one.apply(model).modified, f"{one.name} changes something the second time"
            assert model.to_proto() == again, f"{one.name} writes another file the second time"
        return modified

    return apply


def _prepare(model: Model, subject: Subject) -> bool:
    return bool(fold_and_canonicalize(model))


def _correct(model: Model, subject: Subject) -> bool:
    """Of a model with other biases and weights next to the reference's own: it computes the same again."""
    FoldBatchNorm().apply(model)
    _record(model, subject)
    with TemporaryDirectory() as folder:
        reference = Path(folder, "reference.onnx")
        save(model, reference)
        own = _shift_biases(model)
        try:
            result = CorrectBias(reference=str(reference)).apply(model)
        except ModelError as error:  # such as double convolutions
            if "onnxruntime cannot load it" not in str(error):
                raise
            model.become(load(reference))
            return False
    left = {refusal.node for refusal in result.refusals}
    for node, bias, values in own:  # what was left alone, and says so, is none of its faults
        if node_label(node) in left:
            set_values(bias, values)
    model.touch()
    return result.modified


def _shift_biases(model: Model) -> list[tuple[gs.Node, gs.Tensor, np.ndarray]]:
    """Change the constant biases of layers, and their weights in the last digit; returns the biases."""
    own, moved = [], set()
    for node in model.graph.nodes:
        if node.op not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        weight, bias = node.inputs[1], input_at(node, 2)
        constant = isinstance(weight, gs.Constant) and isinstance(bias, gs.Constant)
        if constant and len(value_readers(bias)) == 1 and not is_output(model, bias):
            values = read(bias)
            if weight.name not in moved:
                moved.add(weight.name)
                set_values(weight, np.nextafter(read(weight), weight.values.dtype.type(np.inf)))
            own.append((node, bias, values))
            shift = 0.5 + 0.1 * np.arange(values.size).reshape(values.shape)
            set_values(bias, (values + shift).astype(values.dtype))
    model.touch()
    return own


def _absorb(model: Model, subject: Subject) -> bool:
    FoldBatchNorm().apply(model)
    _record(model, subject)
    return AbsorbBias().apply(model).modified


def _scale(model: Model, subject: Subject) -> bool:
    """By random factors, all channels that are said to be scalable."""
    FoldBatchNorm(copy_shared=True).apply(model)
    return scale_groups(model) > 0


def _record(model: Model, subject: Subject) -> None:
    """Statistics of the very inputs: mean ± 3 deviations are the least and largest value of a channel."""
    proto = model.to_proto()
    shown = [t.name for node in model.graph.nodes for t in node.outputs if t.name]
    there = {o.name for o in proto.graph.output}
    proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in shown if n not in there)
    assert subject.runs is not None
    found = subject.runs(proto, subject.case.feeds)
    names = [o.name for o in proto.graph.output]
    record = {}
    for name, value in zip(names, found or [], strict=False):
        if value.ndim > 1 and value.dtype.kind == "f":
            axes = (0, *range(2, value.ndim))
            low, high = value.min(axes).astype(np.float64), value.max(axes).astype(np.float64)
            rounding = 1e-6 * np.maximum(abs(low), abs(high))  # of a record in float32
            mean, std = (low + high) / 2, (high - low) / 6 + rounding
            record[name] = ChannelStatistics(mean.astype(np.float32), std.astype(np.float32))
    write_record(model, record)


RECIPES: Mapping[str, Apply] = {
    "fold-bn": _of(FoldBatchNorm()),
    "fold-bn --copy-shared": _of(FoldBatchNorm(copy_shared=True)),
    "equalize": _of(FoldBatchNorm(copy_shared=True), Equalize()),
    "equalize --clip per-channel": _of(FoldBatchNorm(copy_shared=True), Equalize(clip="per-channel")),
    "equalize --assumption-free": _of(FoldBatchNorm(), Equalize(assumption_free=True)),
    "both, --assumption-free": _of(
        FoldBatchNorm(copy_shared=True), Equalize(clip="per-channel", assumption_free=True)
    ),
    "what quantize and prune do first": _prepare,
    "absorb-bias": _absorb,
    "correct-bias, of other biases": _correct,
    "channel groups, scaled": _scale,
}


def subject_of(proto: onnx.ModelProto) -> Subject:
    """A graph with inputs; several recipes may share it, and then its outputs are computed once."""
    return Subject(Case("matrix", proto.graph.name, proto, feeds(proto)))


def check(recipe: str, graph: onnx.ModelProto | Subject) -> Outcome | None:
    """One graph through one recipe; None: nothing computes its outputs. `changed`: by the last pass."""
    subject = graph if isinstance(graph, Subject) else subject_of(graph)
    proto = subject.case.model
    kind = onnx.helper.tensor_dtype_to_np_dtype(proto.graph.output[0].type.tensor_type.elem_type)
    tolerance = next(graphs.TOLERANCE[name] for name, one in graphs.TYPES.items() if one == kind)
    assert subject.valid, f"drew an invalid model: {invalid(proto)}\n{onnx.printer.to_text(proto)}"
    if subject.runs is None:
        return None
    model = Model.from_proto(proto)
    changed = RECIPES[recipe](model, subject)
    return replace(judge(subject, model.to_proto(), tolerance), changed=changed)


@dataclass
class Tally:
    """Of one recipe."""

    checked: int = 0
    changed: int = 0
    failures: list[str] = field(default_factory=list)


def tally(recipe: str, examples: int, seed: int) -> Tally:
    """Draw graphs and check them, BATCH from each seed; the first failure is shrunk and told."""
    found = Tally()

    def property_(proto: onnx.ModelProto) -> None:
        result = check(recipe, proto)
        found.checked += result is not None
        found.changed += result is not None and result.changed
        assert result is None or result.kind == "passed", f"{result.why}\n{onnx.printer.to_text(proto)}"

    how = settings(
        max_examples=BATCH, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    try:
        for number in range(-(-examples // BATCH)):
            seeded(seed + number)(how(given(graphs.graphs())(property_)))()
    except Exception as error:  # whatever a pass raises; hypothesis has shrunk the graph
        notes = getattr(error, "__notes__", [])
        found.failures.append("\n".join([f"{type(error).__name__}: {error}", *notes]))
    return found


@click.command()
@click.option("--examples", default=500, show_default=True, help="Graphs for each recipe.")
@click.option("--seed", default=0, show_default=True, help="The first; each 100 graphs have one.")
@click.option("--only", type=click.Choice(list(RECIPES)), help="This recipe.")
def main(examples: int, seed: int, only: str | None) -> None:
    """Print the matrix."""
    print("| pass | graphs | changed | failed |\n|---|---|---|---|")
    for recipe in [only] if only else RECIPES:
        found = tally(recipe, examples, seed)
        print(f"| {recipe} | {found.checked} | {found.changed} | {len(found.failures)} |", flush=True)
        for failure in found.failures:
            print(failure)


if __name__ == "__main__":
    main()
