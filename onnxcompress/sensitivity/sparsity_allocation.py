"""How sparse each layer is to be, so that all of them together reach a share of zeros.

    {name of the weight: share of its entries that become 0}

`uniform` gives all layers the same, `by_magnitude` what one threshold for all magnitudes gives them
(comparable where they were equalized first), `by_cost` what is cheapest by measured costs.

`total` counts all weights of the network: those of layers that stay dense as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxcompress.errors import OptionError
from onnxcompress.sensitivity.bit_allocation import sparsity_budget
from onnxcompress.sensitivity.rows import Row

LARGEST = 0.98
"""Share of zeros of a layer, at most: some of it must stay."""
GRID = np.linspace(0.02, LARGEST, 49)
POWER = 3
"""Of the sparsity, that a cost grows with below the first that was measured."""


def uniform(sizes: Mapping[str, int], total: int, sparsity: float) -> dict[str, float]:
    """The same for each layer. Raises OptionError where the layers have too few weights for it."""
    return dict.fromkeys(sizes, share_of(sum(sizes.values()), total, sparsity))


def by_magnitude(magnitudes: Mapping[str, np.ndarray], total: int, sparsity: float) -> dict[str, float]:
    """The share of each layer's magnitudes below the threshold that all have in common."""
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
    """The cheapest (`budget.sparsity_budget`). costs: of each layer at the sparsities `levels`, which rise.

    In between, a cost's logarithm is linear; below the first level it is a power of the sparsity.
    """
    share = share_of(sum(sizes[name] for name in costs), total, sparsity)
    rows = [
        Row(name, "", name, sizes[name], "sparsity", float(level), float(cost), None)
        for name, known in costs.items()
        for level, cost in zip(GRID, _curve(known, levels), strict=True)
    ]
    return sparsity_budget(rows, {name: sizes[name] for name in costs}, share)


def _curve(cost: Sequence[float], levels: Sequence[float]) -> np.ndarray:
    """The cost on GRID."""
    known = np.log(np.maximum.accumulate(np.maximum(np.asarray(cost, np.float64), 1e-30)))
    found = np.interp(GRID, levels, known)
    below, beyond = levels[0] > GRID, levels[-1] < GRID
    found[below] = known[0] + POWER * np.log(GRID[below] / levels[0])
    slope = (known[-1] - known[-2]) / (levels[-1] - levels[-2])
    found[beyond] = known[-1] + slope * (GRID[beyond] - levels[-1])
    return np.asarray(np.exp(found))


def share_of(weights: int, total: int, sparsity: float) -> float:
    """Of the weights that may become 0, so that of all of them `sparsity` do."""
    share = sparsity * total / max(weights, 1)
    if share > LARGEST:
        raise OptionError(
            f"--sparsity {sparsity}: only {weights} of {total} weights may become 0; at most "
            f"{LARGEST * weights / total:.2f} can be reached (--depthwise, --no-skip-first-last allow more)"
        )
    return share
