"""The passes, and what it takes to write and to run one. Importing this imports none of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from onnxcompress.passes.catalogue import CATALOGUE, Entry

if TYPE_CHECKING:
    from onnxcompress.account import Change as Change
    from onnxcompress.account import Figures as Figures
    from onnxcompress.account import InputSource as InputSource
    from onnxcompress.account import Refusal as Refusal
    from onnxcompress.option_fields import option as option
    from onnxcompress.passes.base import Pass as Pass
    from onnxcompress.passes.base import PassResult as PassResult
    from onnxcompress.passes.base import run as run
    from onnxcompress.passes.proto import apply_to_proto as apply_to_proto
    from onnxcompress.progress import Progress as Progress
    from onnxcompress.progress import silent as silent

__all__ = ["CATALOGUE", "Entry", "load_pass"]

_HOMES = {
    "account": ("Change", "Figures", "InputSource", "Refusal"),
    "option_fields": ("option",),
    "passes.base": ("Pass", "PassResult", "run"),
    "passes.proto": ("apply_to_proto",),
    "progress": ("Progress", "silent"),
}
"""Module -> the names that this package gives of it, imported when they are asked for: a command line that
only lists the passes needs none of them."""


def __getattr__(name: str) -> object:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(import_module(f"onnxcompress.{home}"), name)
    globals()[name] = found
    return found


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
