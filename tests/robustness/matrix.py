"""The equivalence matrix: passes that claim to preserve the function, on graphs of `tests.helpers.graphs`.

`python -m tests.robustness.matrix --examples 2000 --seed 1` draws that many graphs and prints, for each
pass, on how many it was checked, what it changed, and the shrunk graph of each failure.

absorb-bias is exact where no value lies below the statistics' reach, so here the record says just that of
the very inputs: mean ± 3 deviations are the least and the largest value of each channel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import seed as seeded

from onnxcompress.model import Model, save
from onnxcompress.passes.absorb_bias import AbsorbBias
from onnxcompress.passes.base import Pass
from onnxcompress.passes.correct_bias import CorrectBias
from onnxcompress.passes.equalize import Equalize
from onnxcompress.passes.fold_bn import FoldBatchNorm
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.statistics.record import ChannelStatistics, write_record
from tests.helpers import graphs
from tests.helpers.folding import feeds
from tests.helpers.suites import Case
from tests.robustness.through_passes import Outcome, Subject, invalid, judge

BATCH = 100
"""Graphs of one seed: hypothesis varies what it has drawn, so that many of one seed are alike."""

Apply = Callable[[Model, Subject], None]


def _of(*passes: Pass) -> Apply:
    def apply(model: Model, subject: Subject) -> None:
        for one in passes:
            one.apply(model)
            again = model.to_proto()
            assert not one.apply(model).modified, f"{one.name} changes something the second time"
            assert model.to_proto() == again, f"{one.name} writes another file the second time"

    return apply


def _prepare(model: Model, subject: Subject) -> None:
    fold_and_canonicalize(model)


def _correct(model: Model, subject: Subject) -> None:
    with TemporaryDirectory() as folder:
        reference = Path(folder, "reference.onnx")
        save(model, reference)
        CorrectBias(reference=str(reference)).apply(model)


def _absorb(model: Model, subject: Subject) -> None:
    FoldBatchNorm().apply(model)
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
    AbsorbBias().apply(model)


RECIPES: Mapping[str, Apply] = {
    "fold-bn": _of(FoldBatchNorm()),
    "fold-bn --copy-shared": _of(FoldBatchNorm(copy_shared=True)),
    "equalize": _of(Equalize()),
    "equalize --clip per-channel": _of(FoldBatchNorm(copy_shared=True), Equalize(clip="per-channel")),
    "equalize --assumption-free": _of(Equalize(assumption_free=True)),
    "both, --assumption-free": _of(
        FoldBatchNorm(copy_shared=True), Equalize(clip="per-channel", assumption_free=True)
    ),
    "what quantize and prune do first": _prepare,
    "absorb-bias": _absorb,
    "correct-bias, of itself": _correct,
}


def check(recipe: str, proto: onnx.ModelProto) -> Outcome | None:
    """One graph through one recipe; None: nothing here computes its outputs."""
    kind = onnx.helper.tensor_dtype_to_np_dtype(proto.graph.output[0].type.tensor_type.elem_type)
    tolerance = next(graphs.TOLERANCE[name] for name, one in graphs.TYPES.items() if one == kind)
    subject = Subject(Case("matrix", recipe, proto, feeds(proto)))
    assert subject.valid, f"drew an invalid model: {invalid(proto)}\n{onnx.printer.to_text(proto)}"
    if subject.runs is None:
        return None
    model = Model.from_proto(proto)
    RECIPES[recipe](model, subject)
    return judge(subject, model.to_proto(), tolerance)


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
