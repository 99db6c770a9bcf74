"""A cache of pass results, keyed by content: a changed recipe repeats only the passes after the change.

    key = SHA-256 of (SHA-256 of the input model, pass, options, files that options name, software)
    folder/key/  model.onnx (+ .data), result.json, shown.npz       written elsewhere, then renamed

Software means the source of the pass's package and the versions of the libraries that compute. An entry
whose files are not as written counts as missing. The most recently used entries are kept, up to `limit`
bytes. Latency that a pass measured is part of its result: use another folder on another device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcompress.account import Change, Figures, Refusal
from onnxcompress.errors import CompressError, OptionError, one_line
from onnxcompress.evaluation.guard import GuardMeasurements
from onnxcompress.model import Model, load, save
from onnxcompress.model.tensor_storage import file_digest
from onnxcompress.passes.base import Pass, PassResult

if TYPE_CHECKING:
    from onnxcompress.data.image_set import ImageSet

LIMIT = 10_000_000_000
"""Bytes that a cache may hold."""
STALE = 24 * 3600.0
"""Seconds after which an unfinished entry counts as left by a killed process."""
_LIBRARIES = ("numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu", "torch")
_UNFINISHED = ".unfinished-"
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
        work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
        try:
            save(model, work / "model.onnx")
            if result.shown is not None:
                _write_images(work / SHOWN, result.shown)
            entry = {
                "digest": model.digest(),
                "files": {file.name: file_digest(file) for file in sorted(work.iterdir())},
                "seconds": seconds,
                "result": values,
            }
            (work / "result.json").write_text(json.dumps(entry))
            shutil.rmtree(self.folder / key, ignore_errors=True)  # a damaged entry
            os.rename(work, self.folder / key)
        except (OSError, CompressError):
            return False
        finally:
            shutil.rmtree(work, ignore_errors=True)
            self._prune(key)
        return True

    def _prune(self, newest: str) -> None:
        """Remove the least recently used entries beyond the limit, and what killed processes left."""
        entries: list[tuple[float, int, Path]] = []
        for folder in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process removes, too
                used = folder.stat().st_mtime
                if not folder.name.startswith(_UNFINISHED):
                    entries.append((used, sum(f.stat().st_size for f in folder.iterdir()), folder))
                elif time.time() - used > STALE:
                    shutil.rmtree(folder, ignore_errors=True)
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if total > self.limit and folder.name != newest:
                shutil.rmtree(folder, ignore_errors=True)
                total -= size


def step_key(digest: str, pass_: Pass) -> str:
    """Compute the cache key of applying a pass to a model, with the option files as they are now.

    Args:
        digest: Digest of the input model.
        pass_: The pass.

    Returns:
        A SHA-256 in hexadecimal.
    """
    options = pass_.options()
    for f in dataclasses.fields(pass_):
        path = getattr(pass_, f.name)
        if f.metadata.get("file") and path:
            options[f.name] = content_digest(Path(path))
    parts = {"input": digest, "pass": pass_.name, "options": options, "software": software(type(pass_))}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def writes_files(pass_: Pass) -> bool:
    """Return whether the pass may write a file on which its own key depends.

    Args:
        pass_: The pass.

    Returns:
        Whether one of its options names such a file.
    """
    kept = [f.name for f in dataclasses.fields(pass_) if f.metadata.get("file") == "kept"]
    return any(getattr(pass_, name) for name in kept)


def model_digest(model: Model) -> str:
    """Compute the SHA-256 of a model as it was read, including its external data.

    Args:
        model: The model.

    Returns:
        The digest in hexadecimal.
    """
    sha = hashlib.sha256(model.digest().encode())
    for file in sorted(model.external_files):
        sha.update(file_digest(file).encode())
    return sha.hexdigest() if model.external_files else model.digest()


def content_digest(path: Path) -> str:
    """Compute the SHA-256 of a file, or of the names and contents of a folder's files.

    Args:
        path: The file or folder.

    Returns:
        The digest in hexadecimal; `absent` where the path does not exist.
    """
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return "absent"
    sha = hashlib.sha256()
    for file in sorted(_files(path)):
        sha.update(f"{file.relative_to(path).as_posix()}\0{file_digest(file)}\0".encode())
    return sha.hexdigest()


@cache
def software(cls: type[Pass]) -> dict[str, str]:
    """Describe the code that computes a pass.

    Args:
        cls: The class of the pass.

    Returns:
        Package -> digest of its source, or library -> version.
    """
    versions = {"onnxcompress": _source_digest("onnxcompress") + _source_digest("onnxcompress.passes")}
    package = cls.__module__.partition(".")[0]
    if package != "onnxcompress":
        versions[package] = _source_digest(package)
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


@cache
def _source_digest(package: str) -> str:
    module = importlib.import_module(package)
    roots = [Path(p) for p in getattr(module, "__path__", [])] or [Path(module.__file__ or "")]
    sha = hashlib.sha256()
    for root in roots:
        for file in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
            if file.is_file():
                sha.update(file.read_bytes())
    return sha.hexdigest()


def _files(folder: Path) -> Iterator[Path]:
    for root, _, names in os.walk(folder, followlinks=False):
        yield from (Path(root, name) for name in names if Path(root, name).is_file())


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
