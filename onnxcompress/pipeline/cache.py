"""A cache of pass results, keyed by content: a changed recipe repeats only the passes after the change.

    folder/key/  model.onnx (+ .data), result.json, shown.npz       written elsewhere, then renamed
                 values.npz, result.json                            values that a pass computed on its way

`cache_keys` has the keys. An entry whose files are not as written counts as missing. The most recently
used entries are kept, up to `limit` bytes. Latency that a pass measured is part of its result: use another
folder on another device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcompress.account import Change, Figures, Refusal
from onnxcompress.errors import CompressError, OptionError, one_line
from onnxcompress.evaluation.guard import GuardMeasurements
from onnxcompress.model import Model, load, save
from onnxcompress.model.tensor_storage import file_digest
from onnxcompress.optimize.intermediate_results import Values
from onnxcompress.passes.base import PassResult
from onnxcompress.pipeline.cache_keys import values_key

if TYPE_CHECKING:
    from onnxcompress.data.image_set import ImageSet

LIMIT = 10_000_000_000
"""Bytes that a cache may hold."""
STALE = 24 * 3600.0
"""Seconds after which an unfinished entry counts as left by a killed process."""
_UNFINISHED = ".unfinished-"
VALUES = "values.npz"
SHOWN = "shown.npz"
"""A sample of the inputs that the pass learned from (`PassResult.shown`)."""


@dataclass(frozen=True)
class Entry:
    """The result of a pass on a model, in a cache."""

    folder: Path
    result: PassResult[Figures | None]
    digest: str
    """`Model.digest` of the model that the pass made."""
    seconds: float
    """Time that the pass took."""

    def load(self, name: str) -> Model:
        """Load the model that the pass made.

        Args:
            name: The name that the model gets, instead of that of the cache's file.

        Returns:
            The model, with the digest that it had when it was stored.
        """
        model = load(self.folder / "model.onnx")
        model.name = name
        model.input_digest = lambda: self.digest
        return model


class Cache:
    """A folder of results of passes."""

    def __init__(self, folder: str | os.PathLike[str], limit: int = LIMIT) -> None:
        """Open the folder, or create it.

        Args:
            folder: The folder.
            limit: Bytes that the entries may take; the least recently used are removed beyond it.

        Raises:
            OptionError: The folder cannot be created or written.
        """
        self.folder = Path(folder)
        self.limit = limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"--cache {folder}: cannot be made ({error.strerror})") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise OptionError(f"--cache {folder}: cannot be written")

    def find(self, key: str, figures: type[Figures]) -> Entry | None:
        """Look up an entry.

        Args:
            key: The key, as from `step_key`.
            figures: Class of the figures of the pass.

        Returns:
            The entry, or None where it is missing or damaged.
        """
        folder = self.folder / key
        try:
            saved = json.loads((folder / "result.json").read_text())
            whole = all(file_digest(folder / name) == sha for name, sha in saved["files"].items())
            if not whole:
                return None
            shown = _read_images(folder / SHOWN) if SHOWN in saved["files"] else None
            result = dataclasses.replace(_read_result(saved["result"], figures), shown=shown)
            os.utime(folder)
            return Entry(folder, result, saved["digest"], saved["seconds"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def store(self, key: str, model: Model, result: PassResult[Figures | None], seconds: float) -> bool:
        """Store the result of a pass.

        Args:
            key: The key, as from `step_key`.
            model: The model that the pass made.
            result: The result of the pass.
            seconds: Time that the pass took.

        Returns:
            Whether it was stored; False where that is impossible, for example on a full disk, or where the
            figures cannot be restored.
        """
        values = _restorable(result)
        if values is None:
            return False

        def write(folder: Path) -> None:
            save(model, folder / "model.onnx")
            if result.shown is not None:
                _write_images(folder / SHOWN, result.shown)
            entry = {
                "digest": model.digest(),
                "files": {file.name: file_digest(file) for file in sorted(folder.iterdir())},
                "seconds": seconds,
                "result": values,
            }
            (folder / "result.json").write_text(json.dumps(entry))

        return self._write(key, write)

    def find_values(self, kind: str, parts: Mapping[str, Any]) -> Values | None:
        """Look up values that a pass computed on its way (`intermediate_results`).

        Args:
            kind: What they are.
            parts: All that they depend on, but the software.

        Returns:
            The values; None where they are missing or damaged.
        """
        import numpy as np

        folder = self.folder / values_key(kind, parts)
        try:
            saved = json.loads((folder / "result.json").read_text())
            if file_digest(folder / VALUES) != saved["files"][VALUES]:
                return None
            with np.load(folder / VALUES, allow_pickle=False) as found:
                values = dict(found)
            os.utime(folder)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return values

    def store_values(self, kind: str, parts: Mapping[str, Any], values: Values) -> None:
        """Keep values that a pass computed on its way; nothing is kept where that is impossible.

        Args:
            kind: What they are.
            parts: All that they depend on, but the software.
            values: The values.
        """
        import numpy as np

        def write(folder: Path) -> None:
            np.savez(folder / VALUES, allow_pickle=False, **values)
            entry = {"kind": kind, "files": {VALUES: file_digest(folder / VALUES)}}
            (folder / "result.json").write_text(json.dumps(entry))

        self._write(values_key(kind, parts), write)

    def usage(self) -> tuple[int, int]:
        """Measure what the cache holds.

        Returns:
            The number of entries, and their bytes.
        """
        entries = self._entries()
        return len(entries), sum(size for _, size, _ in entries)

    def clear(self) -> None:
        """Delete all entries; other files in the folder stay."""
        for _, _, folder in self._entries():
            shutil.rmtree(folder, ignore_errors=True)

    def _write(self, key: str, write: Callable[[Path], None]) -> bool:
        """Write an entry as a whole or not at all, and return whether it was written."""
        work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
        try:
            write(work)
            shutil.rmtree(self.folder / key, ignore_errors=True)  # a damaged entry
            os.rename(work, self.folder / key)
        except (OSError, CompressError):
            return False
        finally:
            shutil.rmtree(work, ignore_errors=True)
            self._prune(key)
        return True

    def _entries(self) -> list[tuple[float, int, Path]]:
        """List the entries: when they were last used, their bytes and folders."""
        entries: list[tuple[float, int, Path]] = []
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process removes, too
                if not folder.name.startswith(_UNFINISHED) and (folder / "result.json").exists():
                    size = sum(f.stat().st_size for f in folder.iterdir())
                    entries.append((folder.stat().st_mtime, size, folder))
        return entries

    def _prune(self, newest: str) -> None:
        """Remove the least recently used entries beyond the limit, and what killed processes left."""
        for folder in self.folder.glob(f"{_UNFINISHED}*"):
            with contextlib.suppress(OSError):  # another process removes, too
                if time.time() - folder.stat().st_mtime > STALE:
                    shutil.rmtree(folder, ignore_errors=True)
        entries = self._entries()
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if total > self.limit and folder.name != newest:
                shutil.rmtree(folder, ignore_errors=True)
                total -= size


def _write_images(file: Path, images: ImageSet) -> None:
    import numpy as np

    names = np.array(images.names)
    np.savez(file, x=images.x, names=names, preprocess=np.array(str(images.preprocess)))


def _read_images(file: Path) -> ImageSet:
    import numpy as np

    from onnxcompress.data.image_set import ImageSet
    from onnxcompress.data.preprocess import Preprocess

    with np.load(file, allow_pickle=False) as found:
        preprocess = Preprocess.parse(str(found["preprocess"]))
        return ImageSet(found["x"], None, tuple(found["names"].tolist()), preprocess)


def _restorable(result: PassResult[Figures | None]) -> dict[str, Any] | None:
    """Convert a result to JSON values; None, with a warning, where they would not restore its figures."""
    values = dataclasses.asdict(dataclasses.replace(result, shown=None))
    reason = "they would be restored with other values or types"
    try:
        restored = _read_result(json.loads(json.dumps(values)), type(result.figures))
        if restored.measured == result.measured:
            return values
    except (TypeError, ValueError, NameError, RuntimeError) as error:  # NameError: imported for types only
        reason = one_line(error)
    warnings.warn(f"the result is not kept: its {type(result.figures).__name__}: {reason}", stacklevel=2)
    return None


def _read_result(values: dict[str, Any], figures: type[Figures]) -> PassResult[Figures | None]:
    from pydantic import TypeAdapter

    from onnxcompress.evaluation.fidelity import Fidelity  # noqa: F401  annotates GuardMeasurements

    measured, shapes = values["measured"], values["input_shape"]
    return PassResult(
        TypeAdapter(list[Change]).validate_python(values["changes"]),
        TypeAdapter(list[Refusal]).validate_python(values["refusals"]),
        None if measured is None else TypeAdapter(figures).validate_python(measured),
        guard=TypeAdapter(GuardMeasurements | None).validate_python(values["guard"]),
        input_shape=None if shapes is None else {name: tuple(shape) for name, shape in shapes.items()},
    )
