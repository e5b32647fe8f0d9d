"""Error feedback (Seide et al., 2014) for K workers, and compressors that draw no numbers.

u_i = lambda e_i + g_i,   e_i <- u_i - C(u_i),   direction = mean C(u_i)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Compressor = Callable[[np.ndarray], np.ndarray]


def top_k(k: int) -> Compressor:
    """Keeps the k entries of largest magnitude; of equal ones the first.

    >>> top_k(1)(np.array([1.0, -2.0, 2.0])).tolist()
    [0.0, -2.0, 0.0]
    """

    def compress(u: np.ndarray) -> np.ndarray:
        kept = np.argsort(-np.abs(u), kind="stable")[:k]
        c = np.zeros_like(u)
        c[kept] = u[kept]
        return c

    return compress


def sign_l1(u: np.ndarray) -> np.ndarray:
    """Returns |u|_1 / d sgn(u), with sgn(0) = 1.

    >>> sign_l1(np.array([1.0, -3.0])).tolist()
    [2.0, -2.0]
    """
    return np.abs(u).mean() * np.where(u >= 0, 1.0, -1.0)


def directions(grads: np.ndarray, C: Compressor, *, error_decay: float = 1.0) -> np.ndarray:
    """Returns the direction of each step, shape (T, d), for gradients of shape (T, K, d)."""
    e = np.zeros(grads.shape[1:])
    found = []
    for g in grads:
        u = error_decay * e + g
        c = np.stack([C(row) for row in u])
        e = u - c
        found.append(c.mean(axis=0))
    return np.stack(found)


def two_phase_directions(grads: np.ndarray, C: Compressor) -> np.ndarray:
    """The same with vectors cut into K parts, whose means are compressed again with an error each.

    The vectors are padded with zeros; what a part's mean has behind the end is dropped.
    """
    _, workers, d = grads.shape
    part = -(-d // workers)
    exists = (np.arange(workers * part) < d).reshape(workers, part)
    e, delta = np.zeros((workers, d)), np.zeros((workers, part))
    found = []
    for g in grads:
        u = e + g
        if workers == 1:
            found.append(u[0])
            continue
        padded = np.zeros((workers, workers * part))
        padded[:, :d] = u
        c = np.stack([[C(x) for x in row] for row in padded.reshape(workers, workers, part)])
        e = u - c.reshape(workers, -1)[:, :d]
        z = np.where(exists, c.mean(axis=0) + delta, 0.0)
        sent = np.stack([C(row) for row in z])
        delta = np.where(exists, z - sent, 0.0)
        found.append(sent.reshape(-1)[:d])
    return np.stack(found)
