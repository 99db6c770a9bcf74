"""What one change of one layer costs: the rows of a sensitivity analysis, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from onnxcompress.errors import InputError, OptionError, one_line

Kind = Literal["weight_bits", "activation_bits", "sparsity"]


@dataclass(frozen=True)
class Variant:
    """One change of a layer: bits of its weight, bits of what it reads, or the share of zeros."""

    kind: Kind
    value: float


@dataclass(frozen=True)
class Row:
    """What one change of one layer costs."""

    layer: str
    op: str
    weight: str
    """Name of the initializer, as in the file with BatchNorm folded."""
    parameters: int
    """Of that weight."""
    kind: Kind
    value: float
    """Bits, or share of zeros."""
    error: float
    """Of the outputs: squared error over variance."""
    changed: float | None
    """Share of inputs with another top-1 class; None: no output has class scores."""


def make_variants(
    bits: Sequence[int], activation_bits: Sequence[int], sparsity: Sequence[float]
) -> list[Variant]:
    """Raises OptionError for none, or for amounts out of range."""
    for name, amounts in (("weight", bits), ("activation", activation_bits)):
        for one in amounts:
            if not 2 <= one <= 8:
                raise OptionError(f"--{name}-bits {one}: expected 2 to 8")
    for share in sparsity:
        if not 0 < share < 1:
            raise OptionError(f"--sparsity {share:g}: expected a share between 0 and 1")
    found = [Variant("weight_bits", b) for b in dict.fromkeys(bits)]
    found += [Variant("activation_bits", b) for b in dict.fromkeys(activation_bits)]
    found += [Variant("sparsity", s) for s in dict.fromkeys(sparsity)]
    if not found:
        raise OptionError("nothing to measure: give --weight-bits, --activation-bits or --sparsity")
    return found


def read_rows(path: Path, digest: str) -> list[Row]:
    """Rows from a file that `onnxcompress sensitivity --json` wrote of the model with this SHA-256.

    Raises InputError for any other file.
    """
    from pydantic import TypeAdapter

    try:
        saved: dict[str, Any] = json.loads(path.read_text())
        rows = TypeAdapter(list[Row]).validate_python(saved["rows"])
        of = saved["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"--sensitivity {path}: no file of sensitivities ({one_line(error)}); write one with "
            "onnxcompress sensitivity MODEL --json > FILE"
        ) from error
    if of != digest:
        raise InputError(
            f"--sensitivity {path}: it was measured on another model (SHA-256 {str(of)[:12]}…, this one "
            f"has {digest[:12]}…); measure this one"
        )
    return rows
