"""diffGrad (Dubey et al., 2019, arXiv 1909.11015), as in the authors' second optimizer file.

    g <- g + lambda theta
    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    xi = 1 / (1 + exp(-|g_prev - g|)),   g_prev <- g
    theta <- theta - eta (sqrt(c2) / c1) xi m / (sqrt(v) + eps)

with c1 = 1 - b1^t, c2 = 1 - b2^t, and g_prev zero at the first step.
"""

from __future__ import annotations

import math

import numpy as np

from . import Gradients, gradient_at, number_of_steps


def trajectory(
    param: np.ndarray,
    grads: Gradients,
    *,
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    steps: int | None = None,
) -> list[np.ndarray]:
    """Runs diffGrad in float64.

    Args:
        param: initial parameter, any shape.
        grads: one gradient per step, each of the parameter's shape, or a function of
            ``(t, theta)``.
        learning_rate: eta.
        b1: decay of m.
        b2: decay of v.
        eps: added to the root of the uncorrected v; positive, the guard of the division.
        weight_decay: lambda, coupled: it enters the moments and the friction coefficient.
        steps: number of steps when ``grads`` is a function.

    Returns:
        The parameter after each step.

    Raises:
        ValueError: if ``eps`` is not positive, or ``steps`` does not go with ``grads``.

    >>> step = trajectory(np.array(0.0), [np.array(1e3)], learning_rate=1.0)
    >>> round(float(step[0]), 6)
    -1.0
    """
    if eps <= 0:
        raise ValueError(f"eps must be positive, found {eps}")
    theta = np.array(param, dtype=np.float64)
    m = np.zeros_like(theta)
    v = np.zeros_like(theta)
    g_prev = np.zeros_like(theta)
    thetas = []
    for t in range(1, number_of_steps(grads, steps) + 1):
        g = gradient_at(grads, t, theta) + weight_decay * theta
        c1, c2 = 1 - b1**t, 1 - b2**t
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        xi = 1 / (1 + np.exp(-np.abs(g_prev - g)))
        g_prev = g
        theta = theta - learning_rate * (math.sqrt(c2) / c1) * xi * m / (np.sqrt(v) + eps)
        thetas.append(np.array(theta))
    return thetas
