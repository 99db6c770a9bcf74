"""Scores of blocks in a file, so that they are measured once."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcompress.errors import InputError
from onnxcompress.runtime.block_latency import Share


def read_scores(
    path: Path, of: Mapping[str, Any], exits: Collection[str]
) -> tuple[dict[str, Share], dict[str, dict[str, float]]] | None:
    """Latency shares, and recoverability and score, by the block's exit; None where there is no file.

    of: what the scores must be of; exits: of which blocks. Raises InputError for any other file.
    """
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
        rows = {row["exit"]: row for row in saved["blocks"]}
        same = saved["of"] == dict(of)
        shares = {e: Share(*row["latency_share"]) for e, row in rows.items()}
        scores = {e: {k: float(row[k]) for k in ("recoverability", "score")} for e, row in rows.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: no file of scores ({error}); delete it to measure anew") from error
    if not same or set(rows) != set(exits):
        raise InputError(
            f"{path}: these are scores of another model or under other options; delete it or name another"
        )
    return shares, scores


def write_scores(path: Path, of: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Raises InputError where the file cannot be written."""
    try:
        path.write_text(json.dumps({"of": dict(of), "blocks": list(rows)}, indent=1))
    except OSError as error:
        raise InputError(f"--scores {path}: cannot be written ({error.strerror})") from error
