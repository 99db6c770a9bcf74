"""The record in a file's metadata of the passes that made it."""

from __future__ import annotations

import json
from typing import Any

PROVENANCE = "onnxcompress.provenance"
"""Key in metadata_props: JSON list of {pass, options, version, input_sha256, inputs}, oldest first."""


def parse_provenance(text: str) -> list[dict[str, Any]]:
    """Read the entries of a provenance.

    Args:
        text: The value in the metadata.

    Returns:
        The entries, oldest first; none where the text is not a provenance.
    """
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError):  # RecursionError: nested too deep
        return []
    valid = isinstance(entries, list) and all(isinstance(e, dict) and "pass" in e for e in entries)
    return entries if valid else []
