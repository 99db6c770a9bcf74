"""What a search is asked, and the folder that holds its answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

from onnxcompress.errors import OptionError, require
from onnxcompress.evaluation.gates import Gates
from onnxcompress.search.latencies import Latencies
from onnxcompress.search.results import Results, write_bytes

QUESTION = "question.json"


@dataclass(frozen=True)
class Search:
    """What to search for, and how long."""

    model: str
    folder: Path
    gates: Gates = field(default_factory=Gates)
    """Limits, and how results are measured."""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    """Options that say what passes learn from, such as images and preprocess."""
    trials: int = 40
    """Proxies to look at."""
    repairs: int = 6
    """Candidates that are repaired in full."""
    seconds: float | None = None
    """Time for all of it; None: no limit."""
    effort: str = "auto"
    """Effort of full repair."""
    latency_seconds: float = 2.0
    """Time for the latency of a proxy's structure; the front's is measured for five times as long each."""
    seed: int = 0

    def check(self) -> None:
        """Check the limits and where images are, before anything is written. Raises CompressError."""
        from onnxcompress.data.image_set import image_count

        self.gates.check()
        if not isfinite(self.latency_seconds):
            raise OptionError(f"--latency-seconds {self.latency_seconds}: expected seconds")
        if images := self.inputs.get("images"):
            image_count(images)
        if self.gates.images:
            image_count(self.gates.images, labels=self.gates.max_drop is not None)

    @property
    def work(self) -> Path:
        """Folder of what is on the way."""
        return self.folder / "work"

    @property
    def latencies(self) -> Latencies:
        """What measures latencies."""
        return Latencies(self.work, self.model, self.gates, self.latency_seconds)


def claim(asked: Search) -> None:
    """Begin a search in its folder, or go on with the one that was begun there with the same question.

    Args:
        asked: What to search for.

    Raises:
        OptionError: The folder holds another search, or other files.
    """
    text = check_folder(asked)
    Results(asked.work)
    write_bytes(asked.work / QUESTION, text.encode())


def check_folder(asked: Search) -> str:
    """Check that a folder is new, or holds this search.

    Args:
        asked: What to search for.

    Returns:
        The question as the folder keeps it.

    Raises:
        OptionError: The folder holds another search, or other files.
    """
    from onnxcompress.pipeline.cache_keys import content_digest, model_file_digest

    file = asked.work / QUESTION
    values = dataclasses.asdict(asked)
    asked_about = {
        name: values[name] for name in ("gates", "inputs", "effort", "latency_seconds", "seed")
    } | {"model": model_file_digest(Path(asked.model))}
    images = {"inputs": asked.inputs.get("images"), "gates": asked.gates.images}
    asked_about["images"] = {name: path and content_digest(Path(path)) for name, path in images.items()}
    text = json.dumps(asked_about, indent=2, sort_keys=True, default=str)
    if file.exists():
        if file.read_text("utf-8") != text:
            raise OptionError(
                f"{asked.folder}: another search was begun here, with other limits, inputs or images; name "
                "another folder, or delete this one"
            )
        return text
    folders = [folder for folder in (asked.folder, asked.work) if folder.is_dir()]
    there = [one for folder in folders for one in folder.iterdir()]
    others = sorted(one.name for one in there if one != asked.work or not one.is_dir())
    if others:
        raise OptionError(f"{asked.folder}: it holds {others[0]!r}, and no search; name another folder")
    return text


@contextmanager
def alone(asked: Search) -> Iterator[None]:
    """Hold the folder of a search, until it ends or its process dies.

    Args:
        asked: The search, which has claimed its folder.

    Yields:
        Nothing.

    Raises:
        OptionError: Another process searches there.
        RuntimeUnavailable: The package `filelock` is not installed.
    """
    require("search", "filelock")
    from filelock import FileLock, Timeout

    try:
        held = FileLock(asked.work / "lock").acquire(timeout=0)
    except Timeout:
        raise OptionError(f"{asked.folder}: another search is at work here; wait until it ends") from None
    with held:
        yield
