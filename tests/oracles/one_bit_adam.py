"""1-bit Adam (Tang et al., 2021, arXiv 2102.02888; scales as in DeepSpeed's code), K workers.

    warm-up:  g = mean g_i,  m <- b1 m + (1 - b1) g,  v <- b2 v + (1 - b2) g^2
    then:     m <- OneBit(b1 m + (1 - b1) g_i)
    direction: m / (sqrt(v) + eps)

Entries with v = 0 after the warm-up have no part in the exchange.
"""

from __future__ import annotations

import numpy as np


def sgn(x: np.ndarray) -> np.ndarray:
    """Returns the sign, of zero +1."""
    return np.where(x >= 0, 1.0, -1.0)


def scaled_sign(a: np.ndarray, present: np.ndarray) -> np.ndarray:
    """Returns |a|_2 / sqrt(n) sgn(a) where `present`, else 0.

    >>> scaled_sign(np.array([3.0, -4.0, 0.0]), np.array([True, True, False])).round(3).tolist()
    [3.536, -3.536, 0.0]
    """
    n = max(int(present.sum()), 1)
    return np.where(present, np.linalg.norm(a[present]) / np.sqrt(n) * sgn(a), 0.0)


def one_bit(
    u: np.ndarray, worker_error: np.ndarray, server_error: np.ndarray, present: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One exchange; u and worker_error (K, d), server_error (K, L / K), present (d,)."""
    workers, d = u.shape
    if workers == 1:
        return np.where(present, u[0], 0.0), worker_error, server_error
    length = server_error.size
    there = np.zeros(length, bool)
    there[:d] = present
    a = np.zeros((workers, length))
    a[:, :d] = np.where(present, u + worker_error, 0.0)
    sent = np.stack([scaled_sign(row, there) for row in a])
    z = np.where(there, sent.mean(axis=0) + server_error.reshape(-1), 0.0).reshape(workers, -1)
    parts = there.reshape(workers, -1)
    m = np.stack([scaled_sign(row, part) for row, part in zip(z, parts)])
    return m.reshape(-1)[:d], (a - sent)[:, :d], z - m


def directions(
    grads: np.ndarray, *, freeze_step: int, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> np.ndarray:
    """Returns the direction of each step, shape (T, d), for gradients of shape (T, K, d)."""
    _, workers, d = grads.shape
    length = -(-d // (8 * workers)) * 8 * workers
    m, v = np.zeros(d), np.zeros(d)
    worker_error, server_error = np.zeros((workers, d)), np.zeros((workers, length // workers))
    found = []
    for t, g in enumerate(grads):
        if t < freeze_step:
            m = b1 * m + (1 - b1) * g.mean(axis=0)
            v = b2 * v + (1 - b2) * g.mean(axis=0) ** 2
        else:
            u = b1 * m + (1 - b1) * g
            m, worker_error, server_error = one_bit(u, worker_error, server_error, v != 0)
        found.append(m / (np.sqrt(v) + eps))
    return np.stack(found)
