"""AdaBelief (Zhuang et al., 2020, arXiv 2010.07468) with the options of the authors' package.

    m <- b1 m + (1 - b1) g
    s <- b2 s + (1 - b2) (g - m)^2 + eps          (new m; eps stays in the stored s)
    theta <- theta - eta (m / c1) / (sqrt(s / c2) + eps)

with c1 = 1 - b1^t and c2 = 1 - b2^t. The rectified step replaces the last line.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def _rectification(t: int, b2: float) -> float | None:
    """Returns R of rectified Adam, or None while the variance of the step is intractable."""
    rho_inf = 2 / (1 - b2) - 1
    rho = rho_inf - 2 * t * b2**t / (1 - b2**t)
    # rho < rho_inf always, so rho >= 5 also keeps (rho_inf - 4) and (rho_inf - 2) positive.
    if rho < 5:
        return None
    return math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))


def trajectory(
    param: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-16,
    weight_decay: float = 0.0,
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    rectify: bool = False,
    degenerated_to_sgd: bool = True,
    amsgrad: bool = False,
) -> list[np.ndarray]:
    """Runs AdaBelief in float64.

    Args:
        param: initial parameter, any shape.
        grads: one gradient per step, each of the parameter's shape.
        learning_rate: eta.
        b1: decay of m.
        b2: decay of s.
        eps: added to s at every step and to its root; positive, so that no root is divided by
            when it is zero.
        weight_decay: lambda.
        weight_decouple: shrink theta (True) or add lambda theta to the gradient (False).
        fixed_decay: shrink by lambda instead of eta lambda; only when decoupled.
        rectify: rectified step, eps then added to the uncorrected root.
        degenerated_to_sgd: while rectification is undefined, step by eta m / c1 instead of none.
        amsgrad: divide by the running maximum of s; without effect on the rectified step.

    Returns:
        The parameter after each step.

    Raises:
        ValueError: if ``eps`` is not positive.

    >>> step = trajectory(np.array(1.0), [np.array(4.0)], learning_rate=0.9, b2=0.0)
    >>> round(float(step[0]), 6)
    0.0
    """
    if eps <= 0:
        raise ValueError(f"eps must be positive, found {eps}")
    theta = np.array(param, dtype=np.float64)
    m = np.zeros_like(theta)
    s = np.zeros_like(theta)
    s_max = np.zeros_like(theta)
    thetas = []
    for t, grad in enumerate(grads, start=1):
        g = np.asarray(grad, dtype=np.float64)
        c1, c2 = 1 - b1**t, 1 - b2**t
        if weight_decouple:
            theta = theta * (1 - (weight_decay if fixed_decay else learning_rate * weight_decay))
        else:
            g = g + weight_decay * theta
        m = b1 * m + (1 - b1) * g
        s = b2 * s + (1 - b2) * (g - m) ** 2 + eps
        s_max = np.maximum(s_max, s)
        if not rectify:
            s_hat = s_max if amsgrad else s
            theta = theta - learning_rate * (m / c1) / (np.sqrt(s_hat / c2) + eps)
        elif (r := _rectification(t, b2)) is not None:
            theta = theta - learning_rate * r * (math.sqrt(c2) / c1) * m / (np.sqrt(s) + eps)
        elif degenerated_to_sgd:
            theta = theta - learning_rate * m / c1
        thetas.append(np.array(theta))
    return thetas
