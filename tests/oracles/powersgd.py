"""PowerSGD (Vogels et al., 2019, arXiv 1905.13727, algorithms 1 and 2), K workers, one matrix.

M_i = g_i + e_i,  P = orth(sum M_i Q),  Q <- mean M_i^T P,  direction = P Q^T,  e_i <- M_i - P Q^T
"""

from __future__ import annotations

import numpy as np


def gram_schmidt(P: np.ndarray) -> np.ndarray:
    """Returns orthonormal columns that span those of P, one after the other.

    >>> gram_schmidt(np.array([[3.0, 1.0], [4.0, 0.0]])).round(3).tolist()
    [[0.6, 0.8], [0.8, -0.6]]
    """
    P = P.copy()
    for i in range(P.shape[1]):
        P[:, i] /= np.linalg.norm(P[:, i])
        for j in range(i + 1, P.shape[1]):
            P[:, j] -= (P[:, i] @ P[:, j]) * P[:, i]
    return P


def directions(grads: np.ndarray, Q: np.ndarray) -> np.ndarray:
    """Returns the direction of each step, (T, n, m), for gradients (T, K, n, m) and Q (m, r)."""
    e = np.zeros(grads.shape[1:])
    found = []
    for g in grads:
        M = g + e
        P = gram_schmidt(np.sum(M @ Q, axis=0))
        Q = np.mean(M.transpose(0, 2, 1) @ P, axis=0)
        out = P @ Q.T
        e = M - out
        found.append(out)
    return np.stack(found)
