"""Show the result of `drop-blocks`: a row for each block, the speedup and the error."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from onnxcompress.cli.console import learned_from, table
from onnxcompress.passes.base import PassResult

BUSY = "the machine was too busy for a wall clock: latency was taken as processor time on one thread"


def show_drop_blocks(console: Console, result: PassResult) -> None:
    """Print the table of blocks, the measured latency with its interval, and the error.

    Args:
        console: Where to print.
        result: The result of the pass.
    """
    measured = result.measured
    order = {name: place + 1 for place, name in enumerate(measured.get("order", []))}
    rows = [_row(row, order) for row in measured.get("blocks", [])]
    columns = ["block", "recoverability R", "latency share τ", "95 % interval", "score R/τ", "decision"]
    title = "Blocks (the lowest score goes first, with --blocks the lowest R; both change as blocks go)"
    console.print(table(title, columns, rows))
    if measured.get("noisy_latency"):
        console.print(
            "the machine was too busy to tell blocks apart: τ is their share of multiply-accumulates"
        )
    if measured.get("clock") == "processor":
        console.print(BUSY)
    dropped = sum(bool(row["dropped"]) for row in measured.get("blocks", []))
    console.print(
        f"dropped {dropped} blocks; features matched at {measured['feature']!r}\n"
        + "\n".join(learned_from(measured["inputs"])),
        markup=False,
    )
    _show_latency(console, measured.get("latency"))
    if "additivity" in measured:
        from onnxcompress.runtime.block_latency import additivity_text

        console.print(additivity_text(measured["additivity"]), markup=False)
    error = measured.get("feature_error")
    if error is not None:
        console.print(
            f"relative error of the features on the tuning's images: {error**0.5:.3f} (root mean square)"
        )


def _row(row: dict[str, Any], order: dict[str, int]) -> list[str]:
    name = str(row["name"])
    decision = "kept"
    if row["dropped"]:
        decision = f"dropped {order[name]}." if name in order else "dropped"
    if "recoverability" not in row:
        return [name, "", "", "", "", decision]
    share, low, high = (100 * value for value in row["latency_share"])
    return [
        name,
        f"{row['recoverability']:.4f}",
        f"{share:.2f} %",
        f"{low:.2f} to {high:.2f}",
        f"{row['score']:.3f}",
        decision,
    ]


def _show_latency(console: Console, found: dict[str, float] | None) -> None:
    if found is None:
        return
    faster = 100 * (1 - found["ratio"])
    low, high = 100 * (1 - found["high"]), 100 * (1 - found["low"])
    console.print(
        f"latency {found['before_ms']:.2f} → {found['after_ms']:.2f} ms in onnxruntime: "
        f"{faster:.1f} % less (95 % interval {low:.1f} to {high:.1f} %)",
        markup=False,
    )
