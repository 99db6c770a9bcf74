"""Passes of other packages, registered by the entry point group `onnxcompress.passes`.

    [project.entry-points."onnxcompress.passes"]        (their pyproject.toml)
    shrink-biases = "their_package.biases:ShrinkBiases"

The name of the entry is the name of the pass; it becomes a command and a recipe key like those of the
catalogue, which take precedence where names are equal. Listing the passes imports no package; a package is
imported when its pass is used.
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
    """List the passes of other packages.

    Returns:
        Name of the pass -> a sentence that names its package, sorted by name.
    """
    return {name: f"From the package {_package(entry)}." for name, entry in sorted(_entries().items())}


def load_plugin(name: str) -> type[Pass]:
    """Import the pass of another package.

    Args:
        name: Name of the pass, one of `plugins()`.

    Returns:
        The class of the pass.

    Raises:
        KeyError: No installed package has a pass of this name.
        RuntimeUnavailable: The package cannot be imported, or its entry is not a `Pass` of this name.
    """
    from onnxcompress.passes.base import Pass

    entry = _entries()[name]
    try:
        loaded = entry.load()
    except Exception as error:  # whatever a package does when it is imported
        raise RuntimeUnavailable(
            f"pass {name!r} of the package {_package(entry)} cannot be imported: {error}"
        ) from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass) and loaded.name == name):
        raise RuntimeUnavailable(
            f"pass {name!r} of the package {_package(entry)}: {entry.value} is not a Pass of that name"
        )
    return loaded


@cache
def _entries() -> dict[str, EntryPoint]:
    known = {e.name for e in CATALOGUE}
    entries: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name not in known:
            entries.setdefault(entry.name, entry)
    return entries


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value.partition(":")[0]
