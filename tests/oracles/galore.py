"""GaLore (Zhao et al., 2024, arXiv 2403.03507), as in the authors' code.

Every T steps, at t = 1, T + 1, 2T + 1, ..., new bases A (in, r) and B (out, r) come from the
singular vectors of the gradient; one of the two is the identity unless both sides are projected.

    R = A^T g B,   m <- b1 m + (1 - b1) R,   v <- b2 v + (1 - b2) R^2
    theta <- theta - eta alpha (sqrt(c2) / c1) A (m / (sqrt(v) + eps)) B^T
    theta <- theta (1 - eta lambda)

with c1 = 1 - b1^t, c2 = 1 - b2^t. Three traps: eps is added before the bias correction, decay acts
on the parameter after the step, and a change of basis leaves the moments as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import numpy as np

#: The projected axis of a kernel (in, out); "smaller" is "in" on a tie.
Side: TypeAlias = Literal["smaller", "larger", "in", "out", "both"]
#: An orthonormal basis (size of the projected axis, r), or the pair (in, r), (out, r) for "both".
BasisValue: TypeAlias = np.ndarray | tuple[np.ndarray, np.ndarray]


def resolve_side(shape: Sequence[int], side: Side) -> Literal["in", "out", "both"]:
    """Returns which axis of a kernel (in, out) is projected.

    Args:
        shape: (in, out).
        side: "smaller" and "larger" go by size, and are "in" and "out" on a tie.

    Raises:
        ValueError: on an unknown side, or a shape that is no matrix.

    >>> resolve_side((6, 10), "smaller"), resolve_side((6, 10), "larger")
    ('in', 'out')
    """
    rows, cols = shape
    if side == "smaller":
        return "in" if rows <= cols else "out"
    if side == "larger":
        return "out" if rows <= cols else "in"
    if side not in ("in", "out", "both"):
        raise ValueError(f"side must be smaller, larger, in, out or both, found {side!r}")
    return side


def svd_basis(g: np.ndarray, rank: int, side: Side = "smaller") -> BasisValue:
    """Returns the leading singular vectors of a gradient, with signs fixed.

    The authors leave the signs to the SVD routine. Here the entry of largest magnitude of each
    vector is positive, the first such entry on a tie.

    Args:
        g: gradient, shape (in, out).
        rank: r, number of vectors.
        side: axis on which the vectors live.

    Returns:
        The basis (in, r) or (out, r), or the pair of the two for "both".

    Raises:
        ValueError: if there are fewer than ``rank`` singular vectors.

    >>> svd_basis(np.diag([1.0, -3.0]), 1, "out")
    array([[0.],
           [1.]])
    """
    if not 0 <= rank <= min(g.shape):
        raise ValueError(f"rank must be in [0, {min(g.shape)}] for shape {g.shape}, found {rank}")
    u, _, vt = np.linalg.svd(np.asarray(g, dtype=np.float64), full_matrices=False)

    def positive(vectors: np.ndarray) -> np.ndarray:
        largest = np.argmax(np.abs(vectors), axis=0)
        signs = np.sign(vectors[largest, np.arange(vectors.shape[1])])
        return vectors * signs + 0.0  # + 0.0 turns -0.0 into 0.0

    left, right = positive(u[:, :rank]), positive(vt[:rank].T)
    side = resolve_side(g.shape, side)
    return (left, right) if side == "both" else left if side == "in" else right


class Basis(NamedTuple):
    """The matrices A (in, r) and B (out, r); the identity on a side that is not projected."""

    left: np.ndarray
    right: np.ndarray

    @classmethod
    def make(cls, value: BasisValue, shape: Sequence[int], side: Side) -> Basis:
        side = resolve_side(shape, side)
        pair = value if isinstance(value, tuple) else (value, value)
        left = pair[0] if side != "out" else np.eye(shape[0])
        right = pair[1] if side != "in" else np.eye(shape[1])
        if left.shape[0] != shape[0] or right.shape[0] != shape[1]:
            raise ValueError(
                f"bases of shapes {left.shape} and {right.shape} do not fit a kernel {shape}"
            )
        return cls(np.array(left, dtype=np.float64), np.array(right, dtype=np.float64))

    @property
    def complete(self) -> bool:
        """Whether nothing lies outside."""
        return all(matrix.shape[0] == matrix.shape[1] for matrix in self)

    def restrict(self, x: np.ndarray) -> np.ndarray:
        return self.left.T @ x @ self.right

    def extend(self, y: np.ndarray) -> np.ndarray:
        return self.left @ y @ self.right.T


def trajectory(
    param: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    learning_rate: float,
    selection: Callable[[int], BasisValue] | int,
    side: Side = "smaller",
    update_gap: int = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[np.ndarray]:
    """Runs GaLore on one matrix in float64.

    Args:
        param: initial kernel, shape (in, out).
        grads: one gradient per step, each of the parameter's shape.
        learning_rate: eta.
        selection: ``t -> basis``, asked at t = 1, T + 1, ... only; or the rank r, for
            ``svd_basis`` of the gradient, unless that is all zero: then the basis stays.
        side: projected axis.
        update_gap: T.
        scale: alpha.
        b1: decay of m.
        b2: decay of v.
        eps: added to the uncorrected root of v; positive.
        weight_decay: lambda, decoupled.

    Returns:
        The parameter after each step.

    Raises:
        ValueError: if ``eps`` is not positive, or a basis does not fit the parameter.

    >>> step = trajectory(np.zeros((1, 2)), [np.array([[3.0, -4.0]])], learning_rate=1.0,
    ...                   selection=1, side="out", scale=1.0)
    >>> step[0].round(3)  # along the gradient, whose only singular value is 5
    array([[-0.6,  0.8]])
    """
    if eps <= 0:
        raise ValueError(f"eps must be positive, found {eps}")
    theta = np.array(param, dtype=np.float64)
    basis = None
    m: np.ndarray | float = 0.0
    v: np.ndarray | float = 0.0
    thetas = []
    for t, grad in enumerate(grads, start=1):
        g = np.asarray(grad, dtype=np.float64)
        if basis is None or (t - 1) % update_gap == 0:
            if not isinstance(selection, int):
                basis = Basis.make(selection(t), theta.shape, side)
            elif basis is None or np.any(g):
                basis = Basis.make(svd_basis(g, selection, side), theta.shape, side)
        low = basis.restrict(g)
        c1, c2 = 1 - b1**t, 1 - b2**t
        m = b1 * m + (1 - b1) * low
        v = b2 * v + (1 - b2) * low**2
        d = scale * basis.extend(m / (np.sqrt(v) + eps))
        theta = theta - learning_rate * math.sqrt(c2) / c1 * d
        theta = theta - learning_rate * weight_decay * theta
        thetas.append(np.array(theta))
    return thetas


def adam_trajectory(
    param: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[np.ndarray]:
    """Runs in float64 the same Adam on a leaf that is not projected: no basis and no scale.

    Args:
        param: initial parameter, any shape.
        grads: one gradient per step, each of the parameter's shape.
        learning_rate: eta.
        b1: decay of m.
        b2: decay of v.
        eps: added to the uncorrected root of v; positive.
        weight_decay: lambda, decoupled.

    Returns:
        The parameter after each step.

    >>> step = adam_trajectory(np.array([1.0]), [np.array([-3.0])], learning_rate=0.5)
    >>> step[0].round(3)
    array([1.5])
    """
    shape = np.shape(param)
    thetas = trajectory(
        np.reshape(param, (1, -1)),
        [np.reshape(g, (1, -1)) for g in grads],
        learning_rate=learning_rate,
        selection=lambda t: np.eye(1),
        side="in",
        scale=1.0,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )
    return [theta.reshape(shape) for theta in thetas]
