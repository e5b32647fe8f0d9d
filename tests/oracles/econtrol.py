"""EControl (Gao, Islamov, Stich, 2024, arXiv 2311.05645), K workers.

d_i = C(eta e_i + g_i - h_i),  e_i <- e_i + g_i - h_i - d_i,  h_i <- h_i + d_i,
h <- h + mean d_i,   direction = h
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def directions(
    grads: np.ndarray, C: Callable[[np.ndarray], np.ndarray], *, eta: float
) -> np.ndarray:
    """Returns the direction of each step, shape (T, d), for gradients of shape (T, K, d).

    >>> g = np.array([[[4.0, 3.0]]] * 2)
    >>> directions(g, lambda u: u * (np.abs(u) == np.abs(u).max()), eta=0.5).tolist()
    [[4.0, 0.0], [4.0, 4.5]]
    """
    e, h_own = np.zeros(grads.shape[1:]), np.zeros(grads.shape[1:])
    h = np.zeros(grads.shape[2])
    found = []
    for g in grads:
        d = np.stack([C(row) for row in eta * e + g - h_own])
        e = e + g - h_own - d
        h_own = h_own + d
        h = h + d.mean(axis=0)
        found.append(h)
    return np.stack(found)
