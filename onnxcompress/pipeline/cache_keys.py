"""Keys of cache entries: SHA-256 of all that an entry depends on.

    the result of a pass     the input model, pass, options, files that options name, software
    intermediate values      their kind, the parts that the pass names, software

Software means the source of the pass's package and the versions of the libraries that compute.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from onnxcompress.data.image_files import files_of
from onnxcompress.model import Model, load
from onnxcompress.model.tensor_storage import file_digest
from onnxcompress.passes.base import Pass

HASHED = 1_000_000_000
"""Bytes of a folder that are read for its digest, at most."""
_LIBRARIES = ("numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu", "torch")


def step_key(digest: str, pass_: Pass, judged_by: str = "") -> str:
    """Compute the cache key of applying a pass to a model, with the option files as they are now.

    Args:
        digest: Digest of the input model.
        pass_: The pass.
        judged_by: Digest of the images that are kept to judge results by; empty: none are.

    Returns:
        A SHA-256 in hexadecimal.
    """
    options = pass_.options()
    for f in dataclasses.fields(pass_):
        path = getattr(pass_, f.name)
        if f.metadata.get("file") and path:
            is_model = f.metadata.get("metavar") == "ONNX"
            options[f.name] = (model_file_digest if is_model else content_digest)(Path(path))
    parts = {"input": digest, "pass": pass_.name, "options": options, "software": software(type(pass_))}
    parts |= {"judged_by": judged_by} if judged_by else {}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def values_key(kind: str, parts: Mapping[str, Any]) -> str:
    """Compute the cache key of values that a pass computes on its way.

    Args:
        kind: What they are.
        parts: All that they depend on, but the software, as JSON values.

    Returns:
        A SHA-256 in hexadecimal.
    """
    whole = {"kind": kind, "parts": dict(parts), "software": software(Pass)}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


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


def model_file_digest(path: Path) -> str:
    """Compute the SHA-256 of a model's file, including its external data.

    Args:
        path: The ONNX file.

    Returns:
        The digest in hexadecimal; `absent` where there is no such file.

    Raises:
        ModelError: It is no model, or its external data is missing.
    """
    return model_digest(load(path)) if path.is_file() else content_digest(path)


def content_digest(path: Path) -> str:
    """Compute the SHA-256 of a file, or of the names and contents of a folder's files, links followed.

    Of folders with more than HASHED bytes sizes and times of change stand for the contents: a training set
    takes longer to read than most passes to run.

    Args:
        path: The file or folder.

    Returns:
        The digest in hexadecimal; `absent` where the path does not exist.
    """
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return "absent"
    sha, found = hashlib.sha256(), {file: file.stat() for file in sorted(files_of(path)) if file.is_file()}
    large = sum(known.st_size for known in found.values()) > HASHED
    for file, known in found.items():
        content = f"{known.st_size} {known.st_mtime_ns}" if large else file_digest(file)
        sha.update(os.fsencode(f"{file.relative_to(path).as_posix()}\0{content}\0"))
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
