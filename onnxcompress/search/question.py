"""What a search is asked, and the folder that holds its answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnxcompress.errors import OptionError
from onnxcompress.evaluation.gates import Gates
from onnxcompress.search.latencies import Latencies
from onnxcompress.search.results import Results, write_bytes


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
        for path in filter(None, (self.inputs.get("images"), self.gates.images)):
            image_count(path)

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
    from onnxcompress.pipeline.cache_keys import model_file_digest

    file = asked.work / "question.json"
    values = dataclasses.asdict(asked)
    asked_about = {
        name: values[name] for name in ("gates", "inputs", "effort", "latency_seconds", "seed")
    } | {"model": model_file_digest(Path(asked.model))}
    text = json.dumps(asked_about, indent=2, sort_keys=True, default=str)
    if file.exists():
        if file.read_text("utf-8") != text:
            raise OptionError(
                f"{asked.folder}: another search was begun here, with other limits or inputs; name another "
                "folder, or delete this one"
            )
        return
    Results(asked.work)
    if others := sorted(one.name for one in asked.folder.iterdir() if one != asked.work):
        raise OptionError(f"{asked.folder}: it holds {others[0]!r}, and no search; name another folder")
    write_bytes(file, text.encode())
