"""EF21 (Richtarik et al., 2021, arXiv 2106.05203) and EF21-W (2024, arXiv 2402.10774), K workers.

c_i = C(g_i / (K w_i) - h_i),   h_i <- h_i + c_i,   h <- h + sum w_i c_i,   direction = h
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def directions(
    grads: np.ndarray,
    C: Callable[[np.ndarray], np.ndarray],
    *,
    L: Sequence[float] | None = None,
    init: str = "zero",
    momentum: float = 0.0,
) -> np.ndarray:
    """Returns the direction of each step, shape (T, d), for gradients of shape (T, K, d).

    >>> g = np.array([[[4.0, 3.0]]] * 2)
    >>> directions(g, lambda u: u * (np.abs(u) == np.abs(u).max())).tolist()
    [[4.0, 0.0], [4.0, 3.0]]
    """
    _, workers, d = grads.shape
    w = np.ones(workers) / workers if L is None else np.asarray(L) / np.sum(L)
    h_own, h, v = np.zeros((workers, d)), np.zeros(d), np.zeros((workers, d))
    found = []
    for t, g in enumerate(grads):
        v = g if t == 0 and init == "gradient" else momentum * v + (1 - momentum) * g
        target = v / (workers * w[:, None])
        if t == 0 and init == "gradient":
            h_own, h = target, w @ target
        else:
            c = np.stack([C(row) for row in target - h_own])
            h_own, h = h_own + c, h + w @ c
        found.append(h)
    return np.stack(found)
