"""A cache of what passes made, keyed by content: an interrupted or edited recipe redoes what changed.

    key = SHA-256 of (SHA-256 of the model before, pass, options, files that options name, software)
    folder/key/  model.onnx (+ .data), result.json, shown.npz       written beside and renamed: whole or not

Software is the source of the pass's package and the versions of the libraries that compute. An entry whose
files are not what was written is taken for absent. The entries used last are kept, up to `limit` bytes.
Latency that a pass measured is part of its result: on another device, use another folder.
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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxcompress.account import Change, Refusal
from onnxcompress.errors import CompressError, OptionError
from onnxcompress.model import Model, load, save
from onnxcompress.model.tensor_storage import file_digest
from onnxcompress.passes.base import Pass, PassResult

if TYPE_CHECKING:
    from onnxcompress.data.image_set import ImageSet

LIMIT = 10_000_000_000
"""Bytes that a cache may hold."""
STALE = 24 * 3600.0
"""Seconds after which an unfinished entry is one of a process that was killed."""
_LIBRARIES = ("numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu", "torch")
_UNFINISHED = ".unfinished-"
SHOWN = "shown.npz"
"""What the pass shows of what it learned from (`PassResult.shown`)."""


@dataclass(frozen=True)
class Entry:
    """What a pass made of a model, in a cache."""

    folder: Path
    result: PassResult
    digest: str
    """Of the model that it made, as `Model.digest` had it."""
    seconds: float
    """What the pass took."""

    def load(self, name: str) -> Model:
        """The model; as if it had never been a file of the cache."""
        model = load(self.folder / "model.onnx")
        model.name = name
        model.input_digest = lambda: self.digest
        return model


class Cache:
    """A folder of entries."""

    def __init__(self, folder: str | os.PathLike[str], limit: int = LIMIT) -> None:
        """Raises OptionError where the folder cannot be made or written."""
        self.folder = Path(folder)
        self.limit = limit
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OptionError(f"--cache {folder}: cannot be made ({error.strerror})") from error
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise OptionError(f"--cache {folder}: cannot be written")

    def find(self, key: str) -> Entry | None:
        """The entry of this key, if it is there and whole."""
        folder = self.folder / key
        try:
            found = json.loads((folder / "result.json").read_text())
            whole = all(file_digest(folder / name) == sha for name, sha in found["files"].items())
            entry = Entry(folder, _result(found["result"]), found["digest"], found["seconds"])
            if whole and SHOWN in found["files"]:
                entry.result.shown = _read_images(folder / SHOWN)
            os.utime(folder)
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return entry if whole else None

    def store(self, key: str, model: Model, result: PassResult, seconds: float) -> bool:
        """Keep what a pass made; False where that was impossible, as on a full disk."""
        work = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
        try:
            save(model, work / "model.onnx")
            if result.shown is not None:
                _write_images(work / SHOWN, result.shown)
            found = {
                "digest": model.digest(),
                "files": {file.name: file_digest(file) for file in sorted(work.iterdir())},
                "seconds": seconds,
                "result": dataclasses.asdict(dataclasses.replace(result, shown=None)),
            }
            (work / "result.json").write_text(json.dumps(found))
            shutil.rmtree(self.folder / key, ignore_errors=True)  # one that is not whole
            os.rename(work, self.folder / key)
        except (OSError, CompressError, TypeError):  # TypeError: a pass measured what is no JSON
            return False
        finally:
            shutil.rmtree(work, ignore_errors=True)
            self._prune(key)
        return True

    def _prune(self, newest: str) -> None:
        """Remove what was used longest ago, beyond the limit, and what a killed process left."""
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


def step_key(digest: str, one: Pass) -> str:
    """The key of applying a pass to the model with this digest, by the files as they are now."""
    options = one.options()
    for f in dataclasses.fields(one):
        path = getattr(one, f.name)
        if f.metadata.get("file") and path:
            options[f.name] = content_digest(Path(path))
    parts = {"input": digest, "pass": one.name, "options": options, "software": software(type(one))}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def writes_files(one: Pass) -> bool:
    """Whether the pass may write a file that its own key depends on."""
    kept = [f.name for f in dataclasses.fields(one) if f.metadata.get("file") == "kept"]
    return any(getattr(one, name) for name in kept)


def model_digest(model: Model) -> str:
    """SHA-256 of a model as it was read, with its external data."""
    sha = hashlib.sha256(model.digest().encode())
    for file in sorted(model.external_files):
        sha.update(file_digest(file).encode())
    return sha.hexdigest() if model.external_files else model.digest()


def content_digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files and their names; of a path that is not there, `absent`."""
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
    """What computes: a digest of the package's source that the pass is of, and versions of libraries."""
    found = {"onnxcompress": _source_digest("onnxcompress") + _source_digest("onnxcompress.passes")}
    package = cls.__module__.partition(".")[0]
    if package != "onnxcompress":
        found[package] = _source_digest(package)
    for name in _LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


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


def _result(values: dict[str, Any]) -> PassResult:
    return PassResult(
        [Change(**c) for c in values["changes"]],
        [Refusal(**r) for r in values["refusals"]],
        values["measured"],
    )
