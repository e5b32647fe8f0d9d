"""DiLoCo (Douillard et al., 2023, arXiv 2311.08105), K workers in one program.

theta_i = phi, then H steps theta_i <- theta_i - eta grad_i(theta_i)
D = (1/K) sum_i (phi - theta_i),   buf <- mu buf + D,   phi <- phi - lr (D + mu buf)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def local_steps(
    theta: np.ndarray, gradient: Callable[[np.ndarray], np.ndarray], steps: int, eta: float
) -> np.ndarray:
    """Runs gradient descent on one worker.

    >>> float(local_steps(np.array(1.0), lambda x: x, 2, 0.5))
    0.25
    """
    for _ in range(steps):
        theta = theta - eta * gradient(theta)
    return theta


def rounds(
    phi: np.ndarray,
    gradients: list[Callable[[np.ndarray], np.ndarray]],
    *,
    number: int,
    steps: int,
    eta: float,
    lr: float = 0.7,
    mu: float = 0.9,
) -> list[np.ndarray]:
    """Runs DiLoCo with Nesterov momentum in float64.

    Args:
        phi: slow weights at the start.
        gradients: one function a worker.
        number: of rounds.
        steps: H.
        eta: inner learning rate.
        lr: outer learning rate.
        mu: outer momentum.

    Returns:
        The slow weights after each round, with a leading axis for the workers, which are equal.

    >>> to = [lambda x: x - 1, lambda x: x - 3]
    >>> rounds(np.array(0.0), to, number=1, steps=1, eta=1.0, lr=1.0, mu=0.0)[0].tolist()
    [2.0, 2.0]
    """
    phi = np.array(phi, np.float64)
    buf = np.zeros_like(phi)
    phis = []
    for _ in range(number):
        thetas = [local_steps(phi, gradient, steps, eta) for gradient in gradients]
        delta = sum(phi - theta for theta in thetas) / len(thetas)
        buf = mu * buf + delta
        phi = phi - lr * (delta + mu * buf)
        phis.append(np.stack([phi] * len(thetas)))
    return phis
