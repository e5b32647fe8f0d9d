"""EXAdam (Adly, 2024, arXiv 2412.20302): Adam whose two moments correct one another.

    d1 = 1 + b2^t v / (v + eps),           d2 = 1 + b1^t m^2 / (m^2 + eps)
    m~ = (m / c1) d1,   g~ = (g / c1) d1,   v~ = (v / c2) d2
    theta <- theta (1 - eta lambda) - a (m~ + g~) / (sqrt(v~) + eps)

with c1 = 1 - b1^t, c2 = 1 - b2^t; a = eta log(sqrt(2) sqrt(t + 1)) in the first version of the
paper, a = eta in the second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def trajectory(
    param: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    dynamic_step_size: bool = True,
) -> list[np.ndarray]:
    """Runs EXAdam in float64.

    Args:
        param: initial parameter, any shape.
        grads: one gradient per step, each of the parameter's shape.
        learning_rate: eta.
        b1: decay of m.
        b2: decay of v.
        eps: guards both cross terms and the final division; positive.
        weight_decay: lambda, decoupled, multiplied by eta and not by a.
        dynamic_step_size: the growing step of the first version.

    Returns:
        The parameter after each step.

    Raises:
        ValueError: if ``eps`` is not positive: v / (v + eps) would be 0 / 0 at a zero gradient.

    >>> step = trajectory(
    ...     np.array(0.0), [np.array(1e3)], learning_rate=1.0, dynamic_step_size=False
    ... )
    >>> round(float(step[0]), 2)
    -15.95
    """
    if eps <= 0:
        raise ValueError(f"eps must be positive, found {eps}")
    theta = np.array(param, dtype=np.float64)
    m = np.zeros_like(theta)
    v = np.zeros_like(theta)
    thetas = []
    for t, grad in enumerate(grads, start=1):
        g = np.asarray(grad, dtype=np.float64)
        c1, c2 = 1 - b1**t, 1 - b2**t
        theta = theta * (1 - learning_rate * weight_decay)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        d1 = 1 + b2**t * v / (v + eps)
        d2 = 1 + b1**t * m**2 / (m**2 + eps)
        m_tilde = m / c1 * d1
        g_tilde = g / c1 * d1
        v_tilde = v / c2 * d2
        a = learning_rate
        if dynamic_step_size:
            a *= math.log(math.sqrt(2) * math.sqrt(t + 1))
        theta = theta - a * (m_tilde + g_tilde) / (np.sqrt(v_tilde) + eps)
        thetas.append(np.array(theta))
    return thetas
