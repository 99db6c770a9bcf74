"""Show the results, changes and refusals of a pass at the terminal."""

from __future__ import annotations

from importlib import import_module

from rich.console import Console

from onnxcompress.account import Figures
from onnxcompress.cli.console import learned_from, show_refusals
from onnxcompress.formatting import number as number
from onnxcompress.formatting import size as size
from onnxcompress.passes.base import CONVERTED, Pass, PassResult

RENDERERS = {
    "calibrate": ("calibrate", "show_calibrate"),
    "drop-blocks": ("drop_blocks", "show_drop_blocks"),
    "drop-channels": ("drop_channels", "show_drop_channels"),
    "fp16": ("fp16", "show_fp16"),
    "quantize": ("quantize", "show_quantize"),
}
"""Module of this package and its function, by pass; other passes show only their changes."""


def show_result(
    console: Console, pass_: Pass, result: PassResult[Figures | None], *, verbose: bool = False
) -> None:
    """Print the result of a pass.

    Args:
        console: Where to print.
        pass_: The pass.
        result: Its result.
        verbose: List each change and each refusal.
    """
    renderer = RENDERERS.get(pass_.name)
    if renderer is None:
        show_changes(console, result)
    else:
        module, function = renderer
        getattr(import_module(f"onnxcompress.cli.results.{module}"), function)(console, result)
    if renderer is not None:
        for change in result.changes:
            if change.what.startswith(CONVERTED):
                console.print(change.what, markup=False)
    if verbose:
        for change in result.changes:
            console.print(f"  {change.node}: {change.what}", markup=False)
    show_refusals(console, result.refusals, all=verbose)


def show_changes(console: Console, result: PassResult[Figures | None]) -> None:
    """Print the changes, counted by kind, and the inputs that were learned from.

    Args:
        console: Where to print.
        result: The result of the pass.
    """
    kinds: dict[str, int] = {}
    for change in result.changes:
        kinds[change.what] = kinds.get(change.what, 0) + 1
    for what, count in kinds.items():
        console.print(what if count == 1 else f"{count} × {what}", markup=False)
    if not result.changes:
        console.print("nothing to change")
    for line in learned_from(result.inputs):
        console.print(line, markup=False)
