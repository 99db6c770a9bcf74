"""Show the result of `calibrate`: the estimates, their inputs, their accuracy, and dead channels."""

from __future__ import annotations

from rich.console import Console

from onnxcompress.cli.console import learned_from
from onnxcompress.formatting import counted
from onnxcompress.passes.base import PassResult
from onnxcompress.passes.calibrate import CalibrateFigures

SHOWN = 5
"""Number of tensors whose dead channels are listed."""


def show_calibrate(console: Console, result: PassResult[CalibrateFigures]) -> None:
    """Print a summary; the statistics themselves are shown by `inspect --statistics`.

    Args:
        console: Where to print.
        result: The result of the pass.
    """
    measured = result.measured
    console.print(
        f"statistics of {counted(measured.tensors, 'tensor')}: {measured.estimated} estimated, "
        f"{measured.kept} kept from BatchNorm"
    )
    for line in learned_from(result.inputs, "estimated"):
        console.print(line, markup=False)
    agreement = measured.agreement
    if agreement is not None:
        console.print(
            f"compared with BatchNorm ({counted(agreement.tensors, 'tensor')}): means off by "
            f"{agreement.mean_error:.2g} standard deviations, standard deviations "
            f"{agreement.std_ratio:.2f} times as large (medians over channels)"
        )
    dead = sorted(measured.dead.items(), key=lambda item: -len(item[1]))
    for name, channels in dead[:SHOWN]:
        console.print(f"{len(channels)} channels do not vary: {name}", markup=False)
    if len(dead) > SHOWN:
        console.print(f"channels of {len(dead) - SHOWN} more tensors do not vary (all with --json)")
    if not result.changes:
        console.print("nothing to change")
