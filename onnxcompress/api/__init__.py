"""One call for each command, on a path, a ModelProto or an onnx_ir model: what `import onnxcompress` gives.

    onnxcompress.quantize(model, …) --Pipeline--> Compressed    a typed result, and a page in a notebook
    onnxcompress.compare(a, b, …) --evaluation--> Comparison

The signatures are in `onnxcompress/__init__.pyi`, which `python -m onnxcompress.api.stubs` writes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

CALLS = {
    "benchmark": "measuring",
    "compare": "measuring",
    "evaluate": "measuring",
    "inspect": "measuring",
    "layer_sensitivity": "measuring",
    "run": "compressing",
    "search_best": "searching",
    "sweep": "searching",
    "synthesize": "making",
}
"""Function -> its module in this package. `search` and `sensitivity` are names of packages already."""


def call(name: str) -> Callable[..., Any] | None:
    """Look up the function of a command.

    Args:
        name: Name of the function: a pass's name with `_` for `-`, or one of `CALLS`.

    Returns:
        The function; None where there is none of this name.
    """
    if name in CALLS:
        found: Callable[..., Any] = getattr(import_module(f"onnxcompress.api.{CALLS[name]}"), name)
        return found
    from onnxcompress.passes.catalogue import CATALOGUE

    if any(entry.name.replace("-", "_") == name for entry in CATALOGUE):
        from onnxcompress.api.compressing import pass_function

        return pass_function(name.replace("_", "-"))
    return None
