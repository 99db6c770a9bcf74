"""Choose the sparsity of each layer so that the whole network reaches a given sparsity.

    {name of the weight: share of its entries that become 0}

`uniform` gives all layers the same sparsity, `by_magnitude` what one threshold for all magnitudes gives
them (magnitudes are comparable after equalization), `by_cost` what costs least by measured errors.

`total` counts all weights of the network, those of layers that stay dense included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcompress.errors import OptionError
from onnxcompress.sensitivity.bit_allocation import sparsity_budget
from onnxcompress.sensitivity.rows import Row

LARGEST = 0.98
"""Largest share of zeros of a layer: some of its weights must stay."""
GRID = np.linspace(0.02, LARGEST, 49)
"""Sparsities at which costs are compared."""
POWER = 3
"""Exponent with which a cost grows with the sparsity, below the first that was measured."""


def uniform(sizes: Mapping[str, int], total: int, sparsity: float) -> dict[str, float]:
    """Give each layer the same sparsity.

    Args:
        sizes: Name of each prunable weight -> number of elements.
        total: Number of elements of all weights of the network.
        sparsity: Share of zeros of the whole network, from 0 to 1.

    Returns:
        Name of the weight -> share of zeros.

    Raises:
        OptionError: The prunable weights are too few.
    """
    return dict.fromkeys(sizes, share_of(sum(sizes.values()), total, sparsity))


def by_magnitude(magnitudes: Mapping[str, np.ndarray], total: int, sparsity: float) -> dict[str, float]:
    """Give each layer the share of its magnitudes below one threshold for all layers.

    Args:
        magnitudes: Name of each prunable weight -> its magnitudes.
        total: Number of elements of all weights of the network.
        sparsity: Share of zeros of the whole network, from 0 to 1.

    Returns:
        Name of the weight -> share of zeros.

    Raises:
        OptionError: The prunable weights are too few.
    """
    share = share_of(sum(m.size for m in magnitudes.values()), total, sparsity)
    threshold = np.quantile(np.concatenate([m.reshape(-1) for m in magnitudes.values()]), share)
    return {name: min(float((m < threshold).mean()), LARGEST) for name, m in magnitudes.items()}


def by_cost(
    costs: Mapping[str, Sequence[float]],
    levels: Sequence[float],
    sizes: Mapping[str, int],
    total: int,
    sparsity: float,
) -> dict[str, float]:
    """Give each layer the sparsity with which the sum of the layers' errors is least (`sparsity_budget`).

    Between the levels the logarithm of a cost is interpolated linearly; below the first level the cost is a
    power of the sparsity.

    Args:
        costs: Name of each prunable weight -> its error at each of the levels.
        levels: The measured sparsities, rising.
        sizes: Name of the weight -> number of elements.
        total: Number of elements of all weights of the network.
        sparsity: Share of zeros of the whole network, from 0 to 1.

    Returns:
        Name of the weight -> share of zeros.

    Raises:
        OptionError: The prunable weights are too few.
    """
    share = share_of(sum(sizes[name] for name in costs), total, sparsity)
    rows = [
        Row(name, "", name, sizes[name], "sparsity", float(level), float(cost), None)
        for name, known in costs.items()
        for level, cost in zip(GRID, _curve(known, levels), strict=True)
    ]
    return sparsity_budget(rows, {name: sizes[name] for name in costs}, share)


def _curve(cost: Sequence[float], levels: Sequence[float]) -> np.ndarray:
    """Interpolate the cost on GRID."""
    known = np.log(np.maximum.accumulate(np.maximum(np.asarray(cost, np.float64), 1e-30)))
    curve = np.interp(GRID, levels, known)
    below, beyond = levels[0] > GRID, levels[-1] < GRID
    curve[below] = known[0] + POWER * np.log(GRID[below] / levels[0])
    slope = (known[-1] - known[-2]) / (levels[-1] - levels[-2])
    curve[beyond] = known[-1] + slope * (GRID[beyond] - levels[-1])
    return np.asarray(np.exp(curve))


def share_of(weights: int, total: int, sparsity: float) -> float:
    """Compute the sparsity that the prunable weights need so that the whole network reaches `sparsity`.

    Args:
        weights: Number of elements of the prunable weights.
        total: Number of elements of all weights of the network.
        sparsity: Share of zeros of the whole network, from 0 to 1.

    Returns:
        The share of zeros of the prunable weights, at most LARGEST.

    Raises:
        OptionError: The prunable weights are too few.
    """
    share = sparsity * total / max(weights, 1)
    if share > LARGEST:
        raise OptionError(
            f"--sparsity {sparsity}: only {weights} of {total} weights may become 0; at most "
            f"{LARGEST * weights / total:.2f} can be reached"
        )
    return share
