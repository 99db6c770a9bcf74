"""The passes, and what it takes to write and to run one. Importing this imports none of them."""

from __future__ import annotations

from importlib import import_module

from onnxcompress.account import Change, Figures, InputSource, Refusal
from onnxcompress.option_fields import option
from onnxcompress.passes.base import Pass, PassResult, run
from onnxcompress.passes.catalogue import CATALOGUE, Entry
from onnxcompress.passes.proto import apply_to_proto
from onnxcompress.progress import Progress, silent

__all__ = [
    "CATALOGUE",
    "Change",
    "Entry",
    "Figures",
    "InputSource",
    "Pass",
    "PassResult",
    "Progress",
    "Refusal",
    "apply_to_proto",
    "load_pass",
    "option",
    "run",
    "silent",
]


def load_pass(name: str) -> type[Pass]:
    """Import the class of a pass, of the catalogue or of another package.

    Args:
        name: The pass's name in kebab case, as on the command line.

    Returns:
        The class.

    Raises:
        KeyError: There is no pass of that name.
        RuntimeUnavailable: The package that declares the pass is broken.
    """
    entry = next((e for e in CATALOGUE if e.name == name), None)
    if entry is None:
        from onnxcompress.passes.plugins import load_plugin

        return load_plugin(name)
    found: type[Pass] = getattr(import_module(f"onnxcompress.passes.{entry.module}"), entry.cls)
    return found
