"""Moments of functions of a Gaussian: clipping in closed form, others by integration. See `propagation`."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs

from onnxcompress.graph.query import attribute

Function = Callable[[np.ndarray], np.ndarray]
"""An element-wise function, of arrays of shape (channels, points)."""
Pair = tuple[np.ndarray, np.ndarray]
"""Mean and variance, both (channels,) float64."""

QUADRATURE = 401
"""Points from −8 to 8 deviations; the trapezoidal rule is then exact to 1e-6 for these functions."""


def clipped(mean: np.ndarray, variance: np.ndarray, low: object, high: object) -> Pair:
    """Compute the moments of Gaussians clipped to [low, high].

    Source: Nagel et al., ICCV 2019, §4.2.1; the formulas stand in `propagation`.

    Args:
        mean: Means, shape (channels,).
        variance: Variances, shape (channels,), at least 0.
        low: Lower bound, a number or shape (channels,); may be -inf.
        high: Upper bound, a number or shape (channels,); may be inf.

    Returns:
        Mean and variance of the clipped variables, shape (channels,) each.
    """
    from scipy.special import ndtr  # slow to import

    sigma = np.sqrt(variance)
    safe = np.where(sigma > 0, sigma, 1.0)
    first, second = np.zeros_like(mean), np.zeros_like(mean)
    cuts = []
    for bound, side in ((low, -1.0), (high, 1.0)):
        end = np.broadcast_to(np.asarray(bound, np.float64), mean.shape)
        finite = np.where(np.isfinite(end), end, 0.0)
        at = np.where(np.isfinite(end), (finite - mean) / safe, side * np.inf)
        below, density = ndtr(at), np.where(np.isfinite(at), _density(at), 0.0)
        beyond = below if side < 0 else 1 - below
        first += finite * beyond - side * safe * density
        second += finite**2 * beyond - side * safe * (mean + finite) * density
        cuts.append(below)
    first += mean * (cuts[1] - cuts[0])
    second += (mean**2 + safe**2) * (cuts[1] - cuts[0])
    fixed = np.clip(mean, np.asarray(low, np.float64), np.asarray(high, np.float64))
    first = np.where(sigma > 0, first, fixed)
    return first, np.where(sigma > 0, np.maximum(second - first**2, 0.0), 0.0)


def integrate(mean: np.ndarray, variance: np.ndarray, function: Function) -> Pair:
    """Compute the moments of a function of Gaussians, over a grid of QUADRATURE points.

    Args:
        mean: Means, shape (channels,).
        variance: Variances, shape (channels,), at least 0.
        function: Element-wise function of an array of shape (channels, points).

    Returns:
        Mean and variance of the function's values, shape (channels,) each.
    """
    z = np.linspace(-8, 8, QUADRATURE)
    weights = _density(z) / _density(z).sum()
    values = function(mean[:, None] + np.sqrt(variance)[:, None] * z)
    first = values @ weights
    return first, np.maximum(values**2 @ weights - first**2, 0.0)


def _density(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))


def _hard(alpha: float, beta: float) -> Function:
    return lambda x: np.clip(alpha * x + beta, 0, 1)


FUNCTIONS: dict[str, Callable[[gs.Node], Function]] = {
    "Abs": lambda node: np.abs,
    "Neg": lambda node: np.negative,
    "Sigmoid": lambda node: _sigmoid,
    "Tanh": lambda node: np.tanh,
    "Softplus": lambda node: lambda x: np.logaddexp(x, 0),
    "HardSigmoid": lambda node: _hard(attribute(node, "alpha", 0.2), attribute(node, "beta", 0.5)),
    "HardSwish": lambda node: lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
}
"""Element-wise operators: the function that a node of each computes."""
