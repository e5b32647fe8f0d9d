"""The cautious mask (Liang et al., 2024, arXiv 2411.16085), with timm's bound of the mean.

    phi = [u g > 0],   u <- u phi / max(mean(phi), 1e-3)

between a rule's direction u and everything after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def mask(u: np.ndarray, g: np.ndarray) -> np.ndarray:
    """Masks one leaf's direction.

    >>> [float(x) for x in mask(np.array([1.0, -2.0, 3.0, 0.0]), np.array([2.0, 1.0, 1.0, 5.0]))]
    [2.0, -0.0, 6.0, 0.0]
    """
    phi = (u * g > 0).astype(np.float64)
    return u * phi / max(phi.mean(), 1e-3)


def lion_trajectory(
    param: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
) -> list[np.ndarray]:
    """Runs cautious Lion in float64; the decay is decoupled and not masked."""
    theta, m, thetas = np.array(param, np.float64), np.zeros_like(param, np.float64), []
    for g in grads:
        d = mask(np.sign(b1 * m + (1 - b1) * g), g)
        m = b2 * m + (1 - b2) * g
        theta = theta - learning_rate * (d + weight_decay * theta)
        thetas.append(theta)
    return thetas


def adam_trajectory(
    param: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[np.ndarray]:
    """Runs cautious AdamW in float64; the decay is decoupled and not masked."""
    theta, thetas = np.array(param, np.float64), []
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g * g
        d = mask(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps), g)
        theta = theta - learning_rate * (d + weight_decay * theta)
        thetas.append(theta)
    return thetas
