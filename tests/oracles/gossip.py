"""Gossip averaging, and its correction (arXiv 2404.04616, algorithm 3).

avg = mean_j w_j,   s2 = mean_j Var(w_j),   out = (avg - mean(avg)) sqrt(s2 / Var(avg)) + mean(avg)
"""

from __future__ import annotations

import numpy as np


def groups(graph: str, replicas: int, count: int, shape: tuple[int, ...] = ()) -> list[list[int]]:
    """Returns whose models each replica averages, itself included; pairs are drawn elsewhere.

    >>> groups("ring", 4, 0)
    [[0, 1, 3], [0, 1, 2], [1, 2, 3], [0, 2, 3]]
    """
    found = []
    for i in range(replicas):
        group = {i}
        if graph == "exponential":
            rounds = max(int(np.ceil(np.log2(replicas))), 1)
            group.add((i + 2 ** (count % rounds)) % replicas)
        elif graph == "ring":
            group |= {(i + 1) % replicas, (i - 1) % replicas}
        else:
            place = np.array(np.unravel_index(i, shape))
            for axis in range(len(shape)):
                for step in (1, -1):
                    near = place.copy()
                    near[axis] = (near[axis] + step) % shape[axis]
                    group.add(int(np.ravel_multi_index(tuple(near), shape)))
        found.append(sorted(group))
    return found


def average(
    w: np.ndarray, members: list[list[int]], *, corrected: bool = False, max_scale: float = np.inf
) -> np.ndarray:
    """Returns every replica's model after a round.

    Args:
        w: models, with a leading axis for the replicas.
        members: whose models each replica averages.
        corrected: whether the variance is restored.
        max_scale: largest factor of the restoration.

    >>> average(np.array([1.0, 3.0]), [[0, 1], [0, 1]]).tolist()
    [2.0, 2.0]
    """
    out = []
    for group in members:
        avg = w[group].mean(0)
        if corrected:
            s2 = np.mean([w[j].var() for j in group])
            scale = min(np.sqrt(s2 / avg.var()), max_scale)
            avg = (avg - avg.mean()) * scale + avg.mean()
        out.append(avg)
    return np.stack(out)
