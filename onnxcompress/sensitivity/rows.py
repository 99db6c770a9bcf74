"""The rows of a sensitivity analysis, one for each change of each layer, and the file that keeps them."""

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
    """A change of a layer: bits of its weight, bits of its input, or the share of zeros."""

    kind: Kind
    value: float


@dataclass(frozen=True)
class Row:
    """The cost of one change of one layer."""

    layer: str
    op: str
    weight: str
    """Name of the initializer, as in the file with BatchNorm folded."""
    parameters: int
    """Number of elements of that weight."""
    kind: Kind
    value: float
    """Bits, or share of zeros."""
    error: float
    """Squared error of the network's outputs, relative to their variance."""
    changed: float | None
    """Share of inputs whose top-1 class changes; None: no output has class scores."""


def make_variants(
    bits: Sequence[int], activation_bits: Sequence[int], sparsity: Sequence[float]
) -> list[Variant]:
    """List the changes to try on each layer, without duplicates.

    Args:
        bits: Numbers of bits of a weight, 2 to 8.
        activation_bits: Numbers of bits of a layer's input, 2 to 8.
        sparsity: Shares of zeros, between 0 and 1.

    Returns:
        The changes.

    Raises:
        OptionError: There are none, or an amount is out of range.
    """
    for name, amounts in (("weight", bits), ("activation", activation_bits)):
        for amount in amounts:
            if not 2 <= amount <= 8:
                raise OptionError(f"--{name}-bits {amount}: expected 2 to 8")
    for share in sparsity:
        if not 0 < share < 1:
            raise OptionError(f"--sparsity {share:g}: expected a share between 0 and 1")
    variants = [Variant("weight_bits", b) for b in dict.fromkeys(bits)]
    variants += [Variant("activation_bits", b) for b in dict.fromkeys(activation_bits)]
    variants += [Variant("sparsity", s) for s in dict.fromkeys(sparsity)]
    if not variants:
        raise OptionError("nothing to measure: give --weight-bits, --activation-bits or --sparsity")
    return variants


def read_rows(path: Path, digest: str) -> list[Row]:
    """Read the rows from a file that `onnxcompress sensitivity --json` wrote.

    Args:
        path: The file.
        digest: SHA-256 of the model that it must be about.

    Returns:
        The rows.

    Raises:
        InputError: The file cannot be read, is of another kind, or is about another model.
    """
    from pydantic import TypeAdapter

    try:
        saved: dict[str, Any] = json.loads(path.read_text())
        rows = TypeAdapter(list[Row]).validate_python(saved["rows"])
        measured = saved["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"--sensitivity {path}: not a sensitivity file ({one_line(error)}); write one with "
            "onnxcompress sensitivity MODEL --json > FILE"
        ) from error
    if measured != digest:
        raise InputError(
            f"--sensitivity {path}: it was measured on another model (SHA-256 {str(measured)[:12]}…, this "
            f"one has {digest[:12]}…); measure this one"
        )
    return rows
