"""Lion (Chen et al., 2023, arXiv 2302.06675).

    d = sign(b1 m + (1 - b1) g),   m <- b2 m + (1 - b2) g,   theta <- theta (1 - eta lambda) - eta d

The direction takes the momentum of the previous step; sign(0) = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def trajectory(
    param: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.0,
) -> list[np.ndarray]:
    """Runs Lion in float64.

    Args:
        param: initial parameter, any shape.
        grads: one gradient per step, each of the parameter's shape.
        learning_rate: eta.
        b1: weight of the old momentum in the direction.
        b2: decay of the stored momentum.
        weight_decay: lambda, decoupled.

    Returns:
        The parameter after each step.

    >>> [float(x) for x in trajectory(np.array(1.0), [np.array(3.0)], learning_rate=0.5)]
    [0.5]
    """
    theta = np.array(param, dtype=np.float64)
    m = np.zeros_like(theta)
    thetas = []
    for grad in grads:
        g = np.asarray(grad, dtype=np.float64)
        d = np.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g
        theta = theta * (1 - learning_rate * weight_decay) - learning_rate * d
        thetas.append(np.array(theta))
    return thetas
