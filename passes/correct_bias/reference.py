"""The reference of `correct-bias`, brought to the form that the model was in before its weights changed.

A bias can be compared only where both files split the network's function between their layers alike:

 1. passes that move factors or offsets between layers (MOVING) came between the two files: they are applied
    to the reference, too, with the options in the model's provenance. That is exact, because each entry
    names the SHA-256 of the model that went in; where it is not the reference's, the pair is refused;
 2. the reference has BatchNorms and the model has not: they are folded, as the passes before pruning and
    quantizing fold them;
 3. what is left shows in the numbers (`scaled_apart`, `statistics_differ`): other tools equalize, too.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxcompress.account import Refusal
from onnxcompress.errors import CompressError
from onnxcompress.graph.batch_norm import is_batch_norm
from onnxcompress.graph.linear_layer import Linear
from onnxcompress.model import Model
from onnxcompress.passes import load_pass
from onnxcompress.passes.base import run
from onnxcompress.passes.fold_bn.fold_and_canonicalize import fold_and_canonicalize
from onnxcompress.statistics.record import ChannelStatistics

MOVING = ("equalize", "absorb-bias")
"""Passes that change the weights of layers although the network computes the same."""
EXPLAINED = 0.6
"""Share of a weight's change that factors of its channels must explain to be taken for its cause."""
NOISE = 1e-4
"""Change of a weight, relative to its norm, that is rounding."""
SWEEPS = 20
"""Iterations of the alternating least squares."""
SAME = 2e-3
"""Difference of two statistics, in deviations of the channel, that is rounding."""


def bring_along(reference: Model, model: Model) -> Refusal | None:
    """Do to the reference, in place, what was done to the model before its weights changed (rules 1, 2).

    Args:
        reference: The model before its weights were changed; it is edited.
        model: The model that was made from it.

    Returns:
        None, or why the two cannot be compared.
    """
    done = _since(reference, model)
    last = max((at for at, entry in enumerate(done) if entry["pass"] in MOVING), default=-1)
    for entry in done[: last + 1]:
        if not _apply(reference, entry):
            rule = f"{entry['pass']} came between the reference and this model, and cannot be repeated"
            return Refusal(model.name, rule, f"give as --reference what {done[last]['pass']} wrote")
    norms = [sum(map(is_batch_norm, one.graph.nodes)) for one in (reference, model)]
    if norms[0] > norms[1]:
        fold_and_canonicalize(reference)
        norms[0] = sum(map(is_batch_norm, reference.graph.nodes))
    if norms[0] != norms[1]:
        rule = (
            f"it has {norms[1]} BatchNorms, the reference {norms[0]}: their layers hold different numbers"
        )
        return Refusal(model.name, rule, "run fold-bn on both first")
    return None


def _since(reference: Model, model: Model) -> list[dict[str, Any]]:
    """Return the entries of the model's provenance that the reference's does not begin with."""
    theirs, own = reference.provenance(), model.provenance()
    common = 0
    while common < min(len(theirs), len(own)) and theirs[common] == own[common]:
        common += 1
    return own[common:]


def _apply(reference: Model, entry: dict[str, Any]) -> bool:
    """Repeat a pass of the provenance on the model that it was applied to; False where that is another."""
    try:
        cls = load_pass(entry["pass"])
        repeatable = cls.preserves_function or cls.name in MOVING
        if not repeatable or reference.digest() != entry.get("input_sha256"):
            return False
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["options"].items()}
        run([cls(**options)], reference)
    except (CompressError, KeyError, TypeError, AttributeError):  # an entry that another version wrote
        return False
    return True


def statistics_differ(known: ChannelStatistics | None, own: ChannelStatistics | None) -> bool:
    """Return whether records of a layer's output show that its channels were scaled or shifted (rule 3).

    Args:
        known: The reference's record of it, if any.
        own: The model's record of it, if any.

    Returns:
        Whether they differ by more than rounding; False where they cannot be compared.
    """
    if known is None or own is None or known.source != own.source or known.mean.shape != own.mean.shape:
        return False
    unit = np.maximum(known.std, own.std).clip(1e-12)
    return bool(
        max(np.abs((known.mean - own.mean) / unit).max(), np.abs((known.std - own.std) / unit).max()) > SAME
    )


def scaled_apart(layer: Linear, weight: np.ndarray) -> bool:
    """Return whether factors of channels explain most of the change of a layer's weight (rule 3).

    Fits `weight[o, i, k] = s[o] W[o, i, k] t[i]` by alternating least squares over the weights that are
    not zero, and compares what that leaves, per degree of freedom, with the change itself. Rounding and
    pruning leave s and t near 1, or differ from one weight to the next.

    Args:
        layer: The layer of the reference.
        weight: The weight of its twin, stored as the layer's own.

    Returns:
        Whether they explain it.
    """
    old, new = (layer.view(np.asarray(w, np.float64)) for w in (layer.weight, np.ascontiguousarray(weight)))
    kept = (old != 0) & (new != 0)
    count, free = int(kept.sum()), layer.outputs + layer.inputs - layer.groups
    old, new = np.where(kept, old, 0.0), np.where(kept, new, 0.0)
    change = float(np.square(new - old).sum())
    if count < 2 * free or change <= (NOISE**2) * float(np.square(old).sum()):
        return False
    inputs = np.ones((layer.groups, 1, old.shape[2], 1))
    for _ in range(SWEEPS):
        outputs = _ratio(new, old * inputs, (2, 3))
        inputs = _ratio(new, old * outputs, (1, 3))
    left = float(np.square(new - outputs * old * inputs).sum())
    return left / (count - free) < (1 - EXPLAINED) * change / count


def _ratio(new: np.ndarray, old: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Return the factors of the other axes that bring `old` nearest to `new`; 1 where `old` is zero."""
    over, under = (np.sum(part, axes, keepdims=True) for part in (new * old, old * old))
    return np.where(under > 0, over / np.where(under > 0, under, 1.0), 1.0)
