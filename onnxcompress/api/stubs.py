"""Write the signatures of the calls, for editors and type checkers.

python -m onnxcompress.api.stubs > onnxcompress/__init__.pyi
"""

from __future__ import annotations

import dataclasses
import re
import typing

from onnxcompress.api import CALLS
from onnxcompress.option_fields import is_required
from onnxcompress.passes.catalogue import CATALOGUE

HEAD = """# Written by `python -m onnxcompress.api.stubs`; a test holds it to the passes.
import os
from collections.abc import Sequence
from typing import Any, Literal

from onnxcompress.account import Figures
from onnxcompress.api.results import Compressed as Compressed
{imports}
from onnxcompress.evaluation.guard import Guard
from onnxcompress.pipeline.cache import Cache
from onnxcompress.progress import Progress
from onnxcompress.runtime.timing_options import TimingOptions
from onnxcompress.torch_export import export as export
from onnxcompress.version import __version__ as __version__
"""


def stubs() -> str:
    """Write the stub file.

    Returns:
        The text of `onnxcompress/__init__.pyi`.
    """
    from onnxcompress.passes import load_pass

    classes = {entry.name: load_pass(entry.name) for entry in CATALOGUE}
    lines = {f"from onnxcompress.api.{module} import {name} as {name}" for name, module in CALLS.items()}
    for cls in classes.values():
        lines.add(f"from {cls.figures.__module__} import {cls.figures.__name__}")
    functions = [_function(name.replace("-", "_"), cls) for name, cls in classes.items()]
    return HEAD.format(imports="\n".join(sorted(lines))) + "\n" + "\n".join(functions)


def _function(name: str, cls: type[typing.Any]) -> str:
    arguments = [
        "model: Any",
        "out: str | os.PathLike[str] | None = ...",
        "*",
        *(_argument(f) for f in dataclasses.fields(cls)),
        "guard: Guard | None = ...",
        "timing: TimingOptions | None = ...",
        "cache: Cache | None = ...",
        "progress: Progress = ...",
    ]
    listed = "".join(f"    {argument},\n" for argument in arguments)
    return f"def {name}(\n{listed}) -> Compressed[{cls.figures.__name__}]: ...\n"


def _argument(f: dataclasses.Field[typing.Any]) -> str:
    """An option as an argument: a file may be a path, a list any sequence."""
    kind = re.sub(r"^tuple\[(.*), \.\.\.\]", r"Sequence[\1]", str(f.type))
    if f.metadata.get("file"):
        kind = kind.replace("str", "str | os.PathLike[str]", 1)
    return f"{f.name}: {kind}" + ("" if is_required(f) else " = ...")


if __name__ == "__main__":
    print(stubs(), end="")
