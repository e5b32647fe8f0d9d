"""CO2 (Sun et al., 2024, arXiv 2401.16265), K workers in one program.

    m <- clip(mu m + (x_{t-1,0} - mean_i x^i_{t-1,tau}) / Lambda, -c, c)
    x_{t+1,0} = x_{t,0} - alpha m,   x_{1,0} = x_{0,0}

With stale=False the difference is that of the same round (SlowMo), for comparison.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.oracles.diloco import local_steps


def rounds(
    x: np.ndarray,
    gradients: list[Callable[[np.ndarray], np.ndarray]],
    *,
    number: int,
    tau: int,
    eta: float,
    alpha: float = 1.0,
    mu: float = 0.2,
    clip: float = np.inf,
    penalty: Callable[[float, int], float] = lambda gap, t: 1.0,
    stale: bool = True,
) -> list[np.ndarray]:
    """Runs CO2 in float64.

    Args:
        x: the common start.
        gradients: one function a worker.
        number: of rounds.
        tau: local steps in a round.
        eta: inner learning rate.
        alpha: outer learning rate.
        mu: outer momentum.
        clip: c.
        penalty: Lambda, of the root mean square of x_{t,0} - x_{t-1,0} and t.
        stale: whether the difference is that of the round before.

    Returns:
        The start of the next round after each, with a leading axis for the workers.

    >>> to = [lambda x: x - 1, lambda x: x - 3]
    >>> [float(x[0]) for x in rounds(np.array(0.0), to, number=2, tau=1, eta=1.0)]
    [0.0, 2.0]
    """
    x = np.array(x, np.float64)
    m, starts = np.zeros_like(x), [x]
    differences: list[np.ndarray] = []
    for t in range(number):
        ends = [local_steps(x, gradient, tau, eta) for gradient in gradients]
        differences.append(x - sum(ends) / len(ends))
        if stale and t == 0:
            starts.append(x)
            continue
        gap = float(np.sqrt(np.mean((starts[-1] - starts[-2]) ** 2))) if t else 0.0
        m = mu * m + differences[t - 1 if stale else t] / penalty(gap, t)
        m = np.clip(m, -clip, clip)
        x = x - alpha * m
        starts.append(x)
    return [np.stack([start] * len(gradients)) for start in starts[1:]]
