"""Coordinate-wise clipping at a quantile of all coordinates (Pan and Li, 2023, arXiv 2306.00204).

    tau = scale * (value at index floor(N fraction) of all |g|, sorted in descending order)
    g <- sign(g) min(|g|, tau)

The order statistic is exact: an index, no interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np


def clip(
    grads: Mapping[str, np.ndarray], fraction: float, scale: float = 1.0
) -> dict[str, np.ndarray]:
    """Clips every coordinate to one threshold taken over all tensors together.

    Args:
        grads: gradients by name, any shapes.
        fraction: k in [0, 1], the share of coordinates above the threshold; 0 leaves the
            gradients alone whatever the scale, 1 sets them to zero.
        scale: factor on the threshold.

    Returns:
        The clipped gradients in float64, by name.

    Raises:
        ValueError: if ``fraction`` is outside [0, 1].

    >>> clip({"a": np.array([3.0, -8.0]), "b": np.array([1.0, 5.0])}, 0.5)
    {'a': array([ 3., -3.]), 'b': array([1., 3.])}
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], found {fraction}")
    g = {name: np.array(grad, dtype=np.float64) for name, grad in grads.items()}
    magnitudes = np.concatenate([np.abs(x).ravel() for x in g.values()] or [np.zeros(0)])
    if fraction == 0 or magnitudes.size == 0:
        return g
    descending = np.sort(magnitudes)[::-1]
    index = math.floor(magnitudes.size * fraction)
    tau = scale * descending[index] if index < magnitudes.size else 0.0
    return {name: np.sign(x) * np.minimum(np.abs(x), tau) for name, x in g.items()}
