"""Show the result of `drop-blocks`: a row for each block, the speedup and the error."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from onnxcompress.cli.console import learned_from, table
from onnxcompress.formatting import counted
from onnxcompress.optimize.block_drop.figures import BlockRow, DropBlocksFigures
from onnxcompress.optimize.reconstruction.tuning_outcome import tuning_text
from onnxcompress.passes.base import PassResult
from onnxcompress.runtime.block_latency import additivity_text, latency_text


def show_drop_blocks(console: Console, result: PassResult[DropBlocksFigures]) -> None:
    """Print the table of blocks, the measured latency with its interval, and the error.

    Args:
        console: Where to print.
        result: The result of the pass.
    """
    measured = result.measured
    order = {name: place for place, name in enumerate(measured.order or (), 1)}
    rows = [_row(row, order) for row in measured.blocks]
    columns = ["block", "recoverability R", "latency share τ", "95 % interval", "score R/τ", "decision"]
    title = "Blocks (the lowest score goes first, with --blocks the lowest R; both change as blocks go)"
    console.print(table(title, columns, rows))
    if measured.noisy_latency:
        console.print(
            "the machine was too busy to tell blocks apart: τ is their share of multiply-accumulates"
        )
    dropped = sum(row.dropped for row in measured.blocks)
    console.print(
        f"dropped {counted(dropped, 'block')}; features matched at {measured.feature!r}\n"
        + "\n".join(learned_from(result.inputs)),
        markup=False,
    )
    console.print(latency_text(measured.latency), markup=False)
    if measured.additivity is not None:
        console.print(additivity_text(measured.additivity), markup=False)
    error = measured.feature_error
    if error is not None:
        console.print(
            f"relative error of the features on inputs kept aside: {error**0.5:.3f} (root mean square)"
        )
    if measured.tuning is not None:
        console.print(tuning_text(measured.tuning))


def _row(row: BlockRow, order: Mapping[str, int]) -> list[str]:
    decision = "kept"
    if row.dropped:
        decision = f"dropped {order[row.name]}." if row.name in order else "dropped"
    if row.recoverability is None or row.latency_share is None:
        return [row.name, "", "", "", "", decision]
    share, low, high = (100 * value for value in row.latency_share)
    return [
        row.name,
        f"{row.recoverability:.4f}",
        f"{share:.2f} %",
        f"{low:.2f} to {high:.2f}",
        f"{row.score:.3f}",
        decision,
    ]
