"""AdamP (Heo et al., 2020, arXiv 2006.08217), as in the authors' code.

    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    p = m / (sqrt(v) / sqrt(c2) + eps)              (Nesterov: b1 m + (1 - b1) g over the same)
    p, rho = project(p, g, theta)
    theta <- theta (1 - eta lambda rho) - (eta / c1) p

with c1 = 1 - b1^t, c2 = 1 - b2^t. The projection takes the radial part out of p where g is nearly
orthogonal to theta, which is the signature of a scale-invariant weight.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import numpy as np

from . import Gradients, gradient_at, number_of_steps


def _norm(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    return np.sqrt(np.sum(x**2, axis=axes, keepdims=True))


def views(ndim: int, output_axes: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Returns the axes that each view sums over: per output channel first, then the whole tensor.

    Args:
        ndim: number of axes of the parameter. Below two there is no view.
        output_axes: axes whose index tuples name the channels.

    >>> views(4, (-1,))
    ((0, 1, 2), (0, 1, 2, 3))
    """
    if ndim < 2:
        return ()
    outputs = {axis % ndim for axis in output_axes}
    return tuple(axis for axis in range(ndim) if axis not in outputs), tuple(range(ndim))


def cosine(g: np.ndarray, theta: np.ndarray, axes: tuple[int, ...], eps: float) -> float:
    """Returns the largest |cos(g_i, theta_i)| over the vectors spanned by ``axes``.

    Args:
        g: raw gradient, of theta's shape.
        theta: parameter.
        axes: axes along which the vectors lie.
        eps: lower bound of each of the two norms in the denominator.

    >>> cosine(np.eye(2), np.ones((2, 2)), (0, 1), 1e-8)
    0.7071067811865475
    """
    inner = np.abs(np.sum(g * theta, axis=axes, keepdims=True))
    norms = np.maximum(_norm(g, axes), eps) * np.maximum(_norm(theta, axes), eps)
    return float(np.max(inner / norms))


def project(
    p: np.ndarray,
    g: np.ndarray,
    theta: np.ndarray,
    *,
    delta: float,
    wd_ratio: float,
    eps: float,
    output_axes: tuple[int, ...],
) -> tuple[np.ndarray, float]:
    """Removes from p its component along theta, in the first view whose cosines are all small.

    A view of vectors of length D passes if max_i cos(g_i, theta_i) < delta / sqrt(D); then
    p_i <- p_i - n_i <n_i, p_i> with n_i = theta_i / (|theta_i| + eps).

    Args:
        p: step direction, of theta's shape.
        g: raw gradient, of theta's shape.
        theta: parameter before the step.
        delta: threshold on the cosine.
        wd_ratio: factor on weight decay where a view passed.
        eps: guard of the norms.
        output_axes: axes of the output channels.

    Returns:
        The direction and rho, the factor on weight decay (1 if no view passed).

    >>> project(np.ones((2, 1)), np.array([[1.0], [-1.0]]), np.ones((2, 1)),
    ...         delta=0.1, wd_ratio=0.5, eps=1e-8, output_axes=(-1,))[1]
    0.5
    """
    for axes in views(theta.ndim, output_axes):
        length = math.prod(theta.shape[axis] for axis in axes)
        if cosine(g, theta, axes, eps) < delta / math.sqrt(length):
            n = theta / (_norm(theta, axes) + eps)
            return p - n * np.sum(n * p, axis=axes, keepdims=True), wd_ratio
    return p, 1.0


@overload
def trajectory(
    param: np.ndarray,
    grads: Gradients,
    *,
    learning_rate: float,
    b1: float = ...,
    b2: float = ...,
    eps: float = ...,
    weight_decay: float = ...,
    delta: float = ...,
    wd_ratio: float = ...,
    nesterov: bool = ...,
    output_axes: tuple[int, ...] = ...,
    steps: int | None = ...,
    return_grads: Literal[False] = ...,
) -> list[np.ndarray]: ...
@overload
def trajectory(
    param: np.ndarray,
    grads: Gradients,
    *,
    learning_rate: float,
    b1: float = ...,
    b2: float = ...,
    eps: float = ...,
    weight_decay: float = ...,
    delta: float = ...,
    wd_ratio: float = ...,
    nesterov: bool = ...,
    output_axes: tuple[int, ...] = ...,
    steps: int | None = ...,
    return_grads: Literal[True],
) -> tuple[list[np.ndarray], list[np.ndarray]]: ...
def trajectory(
    param: np.ndarray,
    grads: Gradients,
    *,
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    output_axes: tuple[int, ...] = (-1,),
    steps: int | None = None,
    return_grads: bool = False,
) -> list[np.ndarray] | tuple[list[np.ndarray], list[np.ndarray]]:
    """Runs AdamP in float64.

    Args:
        param: initial parameter, any shape; fewer than two axes are never projected.
        grads: one gradient per step, each of the parameter's shape, or a function of
            ``(t, theta)``.
        learning_rate: eta.
        b1: decay of m.
        b2: decay of v.
        eps: added to the corrected root of v, and the guard of the norms; positive.
        weight_decay: lambda, decoupled.
        delta: threshold on the cosine between gradient and parameter.
        wd_ratio: factor on weight decay at projected steps.
        nesterov: mix the gradient into the direction once more.
        output_axes: axes of the output channels.
        steps: number of steps when ``grads`` is a function.
        return_grads: return the gradients used, too.

    Returns:
        The parameter after each step, or the pair of that list and the list of gradients.

    Raises:
        ValueError: if ``eps`` is not positive, or ``steps`` does not go with ``grads``.

    >>> step = trajectory(np.array([2.0]), [np.array([5.0])], learning_rate=1.0)
    >>> [round(float(x), 6) for x in step[0]]
    [1.0]
    """
    if eps <= 0:
        raise ValueError(f"eps must be positive, found {eps}")
    theta = np.array(param, dtype=np.float64)
    m = np.zeros_like(theta)
    v = np.zeros_like(theta)
    thetas, used = [], []
    for t in range(1, number_of_steps(grads, steps) + 1):
        g = gradient_at(grads, t, theta)
        c1, c2 = 1 - b1**t, 1 - b2**t
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        den = np.sqrt(v) / math.sqrt(c2) + eps
        p = (b1 * m + (1 - b1) * g) / den if nesterov else m / den
        p, rho = project(
            p, g, theta, delta=delta, wd_ratio=wd_ratio, eps=eps, output_axes=output_axes
        )
        theta = theta * (1 - learning_rate * weight_decay * rho) - learning_rate / c1 * p
        thetas.append(np.array(theta))
        used.append(g)
    return (thetas, used) if return_grads else thetas
