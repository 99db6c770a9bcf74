"""The file that keeps the scores of blocks, so that they are measured only once."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from onnxcompress.errors import InputError
from onnxcompress.runtime.block_latency import Share


def read_scores(
    path: Path, context: Mapping[str, Any], exits: Collection[str]
) -> tuple[dict[str, Share], dict[str, dict[str, float]]] | None:
    """Read the scores of blocks.

    Args:
        path: The file.
        context: What the scores depend on (the model and options); it must be the same as in the file.
        exits: Exit tensors of the blocks that must have scores.

    Returns:
        Latency shares, and recoverability and score, both by the block's exit; None where there is no file.

    Raises:
        InputError: The file cannot be read, or has scores of another model or other options.
    """
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
        rows = {row["exit"]: row for row in saved["blocks"]}
        same = saved["of"] == dict(context)
        shares = {e: Share(*row["latency_share"]) for e, row in rows.items()}
        scores = {e: {k: float(row[k]) for k in ("recoverability", "score")} for e, row in rows.items()}
        if not all(math.isfinite(float(number)) for share in shares.values() for number in share):
            raise ValueError("a share of the latency is no number")
        if any(math.isnan(number) for row in scores.values() for number in row.values()):
            raise ValueError("a score is no number")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: not a file of block scores ({error}); delete it to measure anew"
        ) from error
    if not same or set(rows) != set(exits):
        raise InputError(
            f"{path}: the scores are of another model or of other options; delete it or name another"
        )
    return shares, scores


def write_scores(path: Path, context: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the scores of blocks.

    Args:
        path: The file.
        context: What the scores depend on (the model and options), as JSON values.
        rows: One row for each block, as JSON values.

    Raises:
        InputError: The file cannot be written.
    """
    try:
        path.write_text(json.dumps({"of": dict(context), "blocks": list(rows)}, indent=1))
    except OSError as error:
        raise InputError(f"--scores {path}: cannot be written ({error.strerror})") from error
