"""What `calibrate` shows: what was estimated, from what, how far to trust it, which channels are dead."""

from __future__ import annotations

from rich.console import Console

from onnxcompress.cli.console import learned_from
from onnxcompress.passes.base import PassResult

SHOWN = 5
"""Tensors whose dead channels are listed."""


def show_calibrate(console: Console, result: PassResult) -> None:
    """A few lines; the statistics themselves are `inspect --statistics`'s to show."""
    measured = result.measured
    console.print(
        f"statistics of {measured['tensors']} tensors: {measured['estimated']} estimated, "
        f"{measured['kept']} kept as BatchNorm knows them"
    )
    for line in learned_from(measured["inputs"], "estimated"):
        console.print(line, markup=False)
    agreement = measured["agreement"]
    if agreement is not None:
        console.print(
            f"where BatchNorm knows them ({agreement['tensors']} tensors): means off by "
            f"{agreement['mean_error']:.2g} deviations, deviations {agreement['std_ratio']:.2f} times "
            "as large (medians over channels)"
        )
    dead = sorted(measured["dead"].items(), key=lambda item: -len(item[1]))
    for name, channels in dead[:SHOWN]:
        console.print(f"{len(channels)} channels do not vary: {name}", markup=False)
    if len(dead) > SHOWN:
        console.print(f"channels of {len(dead) - SHOWN} more tensors do not vary (all with --json)")
    if not result.changes:
        console.print("nothing to change")
