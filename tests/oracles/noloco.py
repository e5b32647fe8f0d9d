"""NoLoCo (Kolehmainen et al., 2025, arXiv 2506.10911), K workers in one program.

D_i = theta_i - phi_i
m_i <- mu m_i + lr mean_G D + gamma (mean_G phi - phi_i),   phi_i <- phi_i + m_i
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tests.oracles.diloco import local_steps


def rounds(
    phi: np.ndarray,
    gradients: list[Callable[[np.ndarray], np.ndarray]],
    partners: Sequence[Sequence[int]],
    *,
    steps: int,
    eta: float,
    lr: float = 0.7,
    mu: float = 0.5,
    gamma: float = 0.7,
) -> list[np.ndarray]:
    """Runs NoLoCo in float64.

    Args:
        phi: slow weights at the start, with a leading axis for the workers.
        gradients: one function a worker.
        partners: for each round the partner of each worker, itself if it sits out.
        steps: H.
        eta: inner learning rate.
        lr: outer learning rate.
        mu: outer momentum.
        gamma: coupling.

    Returns:
        The slow weights after each round, with a leading axis for the workers.

    >>> to = [lambda x: x - 1, lambda x: x - 3]
    >>> rounds(np.zeros(2), to, [[1, 0]], steps=1, eta=1.0, lr=0.5)[0].tolist()
    [1.0, 1.0]
    """
    phi = np.array(phi, np.float64)
    m = np.zeros_like(phi)
    phis = []
    for partner in partners:
        theta = np.stack(
            [local_steps(phi[i], gradient, steps, eta) for i, gradient in enumerate(gradients)]
        )
        D = theta - phi
        new_phi = phi.copy()
        for i, j in enumerate(partner):
            group = sorted({i, j})
            m[i] = mu * m[i] + lr * D[group].mean(0) + gamma * (phi[group].mean(0) - phi[i])
            new_phi[i] = phi[i] + m[i]
        phi = new_phi
        phis.append(phi)
    return phis
