"""Show the result of `drop-channels`: a row for each group, the speedup and the error."""

from __future__ import annotations

from rich.console import Console

from onnxcompress.cli.console import learned_from, number, table
from onnxcompress.formatting import counted
from onnxcompress.optimize.channel_drop.figures import ChannelGroupRow, DropChannelsFigures
from onnxcompress.optimize.reconstruction.tuning_outcome import tuning_text
from onnxcompress.passes.base import PassResult
from onnxcompress.runtime.block_latency import latency_text


def show_drop_channels(console: Console, result: PassResult[DropChannelsFigures]) -> None:
    """Print the table of groups, the measured latency with its interval, and the error.

    Args:
        console: Where to print.
        result: The result of the pass.
    """
    measured = result.measured
    columns = ["group", "channels", "kept", "parameters", "MACs", "predicted error"]
    console.print(table("Groups of channels", columns, [_row(row) for row in measured.groups]))
    cut = sum(row.kept < row.channels for row in measured.groups)
    console.print(
        f"cut {cut} of {counted(len(measured.groups), 'group')}; features matched at {measured.feature!r}\n"
        + "\n".join(learned_from(result.inputs)),
        markup=False,
    )
    console.print(latency_text(measured.latency), markup=False)
    for what, change in (("MACs", measured.macs), ("parameters", measured.parameters)):
        if change is not None:
            less = 100 * (1 - change.after / max(change.before, 1))
            console.print(f"{what} {number(change.before)} → {number(change.after)}: {less:.1f} % less")
    error = measured.feature_error
    if error is not None:
        console.print(
            f"relative error of the features on inputs kept aside: {error**0.5:.3f} (root mean square)"
        )
    if measured.tuning is not None:
        console.print(tuning_text(measured.tuning))


def _row(row: ChannelGroupRow) -> list[str]:
    error = "" if row.error is None else f"{row.error:.2g}"
    return [row.name, str(row.channels), str(row.kept), number(row.parameters), number(row.macs), error]
