"""DCT-AdamW (Modoranu et al., 2025, arXiv 2505.17967), as in the authors' code but exactly rotated.

A gradient is projected on r columns of a fixed orthonormal cosine basis Q. Written for X = theta^T
of a kernel (in, out) with in <= out, and X = theta otherwise, so that the last axis, of size n, is
the smaller one; at t = 1, T, 2T, ... (not T + 1) the columns I are chosen anew:

    X <- X (1 - eta lambda)
    A = G + E,   a = A Q[:, I],   E <- A - a Q[:, I]^T          (E = 0 without error feedback)
    new I: moments of columns that stay move to their new slot, those of new columns are zero
    m <- b1 m + (1 - b1) a,   v <- b2 v + (1 - b2) a^2
    X <- X - eta ((m / c1) / (sqrt(v / c2) + eps)) Q[:, I]^T

with c1 = 1 - b1^t, c2 = 1 - b2^t.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np

Kind: TypeAlias = Literal["dct2", "dct3"]


def dct_basis(n: int, kind: Kind) -> np.ndarray:
    """Returns the orthonormal cosine basis Q, shape (n, n).

    C[i, j] = sqrt(2 / n) cos(pi i (2 j + 1) / (2 n)), row 0 over sqrt(2).

    Args:
        n: size of the projected axis.
        kind: "dct2" is Q = C^T, so that A Q is the DCT-II of A's rows (the FFT setting of the
            authors' code); "dct3" is Q = C, its inverse (their matrix-product setting).

    Raises:
        ValueError: on an unknown kind.

    >>> dct_basis(2, "dct2").round(3)
    array([[ 0.707,  0.707],
           [ 0.707, -0.707]])
    """
    if kind not in ("dct2", "dct3"):
        raise ValueError(f"kind must be dct2 or dct3, found {kind!r}")
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    c = np.sqrt(2 / n) * np.cos(np.pi * i * (2 * j + 1) / (2 * n))
    c[0] /= np.sqrt(2)
    return c.T if kind == "dct2" else c


def dct_choose(a: np.ndarray, rank: int, norm: Literal[1, 2], kind: Kind) -> np.ndarray:
    """Returns the basis columns on which the rows of a matrix have most weight.

    Args:
        a: matrix whose last axis is projected, shape (rows, n).
        rank: r.
        norm: score of a column of A Q: 1 for its sum of magnitudes, 2 for its length.
        kind: basis, see ``dct_basis``.

    Returns:
        r indices, the largest score first, the lower index first on a tie.

    Raises:
        ValueError: if ``rank`` exceeds n or ``norm`` is neither 1 nor 2.

    >>> dct_choose(np.array([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0]]), 2, 1, "dct2")
    array([0, 1])
    """
    if norm not in (1, 2):
        raise ValueError(f"norm must be 1 or 2, found {norm}")
    if not 0 <= rank <= a.shape[-1]:
        raise ValueError(f"rank must be in [0, {a.shape[-1]}] for shape {a.shape}, found {rank}")
    scores = np.sum(np.abs(a @ dct_basis(a.shape[-1], kind)) ** norm, axis=0)
    return np.argsort(-scores, kind="stable")[:rank]


def rotate(
    moment: np.ndarray, old: np.ndarray | Sequence[int], new: np.ndarray | Sequence[int]
) -> np.ndarray:
    """Moves the columns of a moment from the slots of ``old`` to those of ``new``.

    Args:
        moment: shape (rows, r).
        old: basis column of each slot before.
        new: basis column of each slot after; columns not in ``old`` start at zero.

    >>> rotate(np.array([[1.0, 2.0, 3.0]]), [4, 0, 5], [5, 1, 4])
    array([[3., 0., 1.]])
    """
    slots = {int(column): slot for slot, column in enumerate(old)}
    rotated = np.zeros((moment.shape[0], len(new)))
    for slot, column in enumerate(new):
        if int(column) in slots:
            rotated[:, slot] = moment[:, slots[int(column)]]
    return rotated


def trajectory(
    param: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    learning_rate: float,
    selection: Callable[[int], np.ndarray] | int,
    norm: Literal[1, 2] = 1,
    kind: Kind = "dct3",
    update_gap: int = 1,
    rotate_state: bool = True,
    error_feedback: bool = False,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> list[np.ndarray]:
    """Runs DCT-AdamW on one matrix in float64.

    Args:
        param: initial kernel, shape (in, out). The smaller axis is projected, in on a tie.
        grads: one gradient per step, each of the parameter's shape.
        learning_rate: eta.
        selection: ``t -> basis columns in slot order``, asked at t = 1, T, 2T, ... only; or the
            rank r, for ``dct_choose`` of A, unless that is all zero: then the columns stay.
        norm: score of the columns when they are chosen here.
        kind: basis, see ``dct_basis``.
        update_gap: T.
        rotate_state: let moments follow their column. Without, they stay in their slots, and the
            order of the slots matters.
        error_feedback: add what the projection left out to the next gradient.
        b1: decay of m.
        b2: decay of v.
        eps: added to the corrected root of v; positive.
        weight_decay: lambda, decoupled.

    Returns:
        The parameter after each step.

    Raises:
        ValueError: if ``eps`` is not positive.

    >>> step = trajectory(np.zeros((1, 2)), [np.array([[3.0, -4.0]])], learning_rate=0.5,
    ...                   selection=1)
    >>> step[0].round(6)
    array([[-0.5,  0.5]])
    """
    if eps <= 0:
        raise ValueError(f"eps must be positive, found {eps}")
    transposed = param.shape[0] <= param.shape[1]

    def oriented(x: np.ndarray) -> np.ndarray:
        return np.array(x.T if transposed else x, dtype=np.float64)

    x = oriented(param)
    basis = dct_basis(x.shape[1], kind)
    columns: np.ndarray | None = None
    error = np.zeros_like(x)
    m = v = np.zeros(0)
    thetas = []
    for t, grad in enumerate(grads, start=1):
        x = x * (1 - learning_rate * weight_decay)
        a_full = oriented(grad) + error
        if columns is None or t % update_gap == 0:
            old = columns
            if not isinstance(selection, int):
                columns = np.asarray(selection(t), dtype=np.intp)
            elif columns is None or np.any(a_full):
                columns = dct_choose(a_full, selection, norm, kind)
            if old is None:
                m = v = np.zeros((len(x), len(columns)))
            elif rotate_state:
                m, v = rotate(m, old, columns), rotate(v, old, columns)
        q = basis[:, columns]
        a = a_full @ q
        if error_feedback:
            error = a_full - a @ q.T
        c1, c2 = 1 - b1**t, 1 - b2**t
        m = b1 * m + (1 - b1) * a
        v = b2 * v + (1 - b2) * a**2
        x = x - learning_rate * ((m / c1) / (np.sqrt(v / c2) + eps)) @ q.T
        thetas.append(np.array(x.T if transposed else x))
    return thetas
