"""Passes of other packages, by the entry point group `onnxcompress.passes`.

    [project.entry-points."onnxcompress.passes"]        (their pyproject.toml)
    shrink-biases = "their_package.biases:ShrinkBiases"

The entry's name is the pass's name; it becomes a command and a recipe key like those of the catalogue,
which win where names are equal. A package is imported when its pass is used, not to list it.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from onnxcompress.errors import RuntimeUnavailable
from onnxcompress.passes.catalogue import CATALOGUE

if TYPE_CHECKING:
    from onnxcompress.passes.base import Pass

GROUP = "onnxcompress.passes"


@cache
def plugins() -> dict[str, str]:
    """Names of the passes of other packages -> where each comes from, in order of names."""
    return {name: f"Of the package {_package(entry)}." for name, entry in sorted(_entries().items())}


def load_plugin(name: str) -> type[Pass]:
    """The class of another package's pass. Raises KeyError, RuntimeUnavailable where it cannot be used."""
    from onnxcompress.passes.base import Pass

    entry = _entries()[name]
    try:
        found = entry.load()
    except Exception as error:  # whatever a package does when it is imported
        raise RuntimeUnavailable(
            f"pass {name!r} of the package {_package(entry)} cannot be imported: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Pass) and found.name == name):
        raise RuntimeUnavailable(
            f"pass {name!r} of the package {_package(entry)}: {entry.value} is no Pass of that name"
        )
    return found


@cache
def _entries() -> dict[str, EntryPoint]:
    known = {e.name for e in CATALOGUE}
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name not in known:
            found.setdefault(entry.name, entry)
    return found


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value.partition(":")[0]
