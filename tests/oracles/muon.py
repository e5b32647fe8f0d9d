"""Muon: momentum orthogonalised by Newton-Schulz iterations.

Two published rules (a: Jordan et al., 2024; b: Liu et al., 2025, arXiv 2502.16982):

    (a) b <- mu b + (1 - mu) g,   u = (1 - mu) g + mu b      momentum_convention="ema"
    (b) b <- mu b + g,            u = g + mu b               momentum_convention="sum"
    theta <- theta (1 - eta lambda) - eta factor(out, in) NS(u)

u = b without Nesterov momentum. Leaves that are no matrices take Adam, which the two rules give
its epsilon at different places.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

SHAPE_FACTORS = {
    "jordan": lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
    "moonlight": lambda rows, cols: 0.2 * math.sqrt(max(rows, cols)),
    "dion": lambda rows, cols: math.sqrt(rows / cols),
    "none": lambda rows, cols: 1.0,
}


def newton_schulz(
    matrix: np.ndarray, coeffs: Sequence[float] | Sequence[Sequence[float]], steps: int, eps: float
) -> np.ndarray:
    """Drives the singular values of a matrix towards one, leaving its singular vectors.

    X = G / (|G|_F + eps), then ``steps`` times with A = X X^T: X <- a X + (b A + c A A) X.

    Args:
        matrix: G, shape (rows, cols); a tall one is transposed for the iteration.
        coeffs: (a, b, c), or one such triple for each iteration.
        steps: number of iterations.
        eps: guard of the normalisation: a zero matrix stays zero.

    >>> newton_schulz(np.diag([3.0, 4.0]), (1.5, -0.5, 0.0), 20, 1e-7).round(6)
    array([[1., 0.],
           [0., 1.]])
    """
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (np.sqrt(np.sum(x**2)) + eps)
    for a, b, c in np.broadcast_to(np.asarray(coeffs, np.float64), (steps, 3)):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def trajectory(
    param: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    learning_rate: float,
    reduction_axes: tuple[int, ...],
    output_axes: tuple[int, ...],
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    ns_coeffs: Sequence[float] | Sequence[Sequence[float]] = (3.4445, -4.7750, 2.0315),
    ns_steps: int = 5,
    ns_eps: float = 1e-7,
    shape_factor: Literal["jordan", "moonlight", "dion", "none"] = "jordan",
    momentum_convention: Literal["ema", "sum"] = "ema",
) -> list[np.ndarray]:
    """Runs the matrix part of Muon in float64.

    Args:
        param: initial parameter. Axes named neither in ``reduction_axes`` nor in ``output_axes``
            index independent matrices.
        grads: one gradient per step, each of the parameter's shape.
        learning_rate: eta.
        reduction_axes: axes that make up "in", the columns; (0, 1, 2) for an HWIO kernel.
        output_axes: axes that make up "out", the rows; (3,) for an HWIO kernel.
        momentum: mu.
        nesterov: mix the gradient into the direction once more.
        weight_decay: lambda, decoupled, not multiplied by the shape factor.
        ns_coeffs: coefficients of the Newton-Schulz polynomial, or of each iteration's.
        ns_steps: number of Newton-Schulz iterations.
        ns_eps: guard of the normalisation.
        shape_factor: "jordan" sqrt(max(1, out/in)), "moonlight" 0.2 sqrt(max(out, in)),
            "dion" sqrt(out/in), "none" 1.
        momentum_convention: "ema" for rule (a), "sum" for rule (b).

    Returns:
        The parameter after each step.

    Raises:
        ValueError: on an unknown ``shape_factor`` or ``momentum_convention``, or on axes that
            overlap.

    >>> step = trajectory(np.zeros((2, 2)), [np.eye(2)], learning_rate=1.0, reduction_axes=(0,),
    ...                   output_axes=(1,), ns_coeffs=(1.5, -0.5, 0.0), ns_steps=20)
    >>> np.diag(step[0]).round(6)
    array([-1., -1.])
    """
    if shape_factor not in SHAPE_FACTORS:
        raise ValueError(f"shape_factor must be one of {list(SHAPE_FACTORS)}, found {shape_factor}")
    if momentum_convention not in ("ema", "sum"):
        raise ValueError(f"momentum_convention must be ema or sum, found {momentum_convention}")
    theta = np.array(param, dtype=np.float64)
    ins = [axis % theta.ndim for axis in reduction_axes]
    outs = [axis % theta.ndim for axis in output_axes]
    if set(ins) & set(outs):
        raise ValueError(f"reduction_axes {reduction_axes} and output_axes {output_axes} overlap")
    batch = [axis for axis in range(theta.ndim) if axis not in ins + outs]
    order = batch + outs + ins
    rows = math.prod(theta.shape[axis] for axis in outs)
    cols = math.prod(theta.shape[axis] for axis in ins)
    factor = SHAPE_FACTORS[shape_factor](rows, cols)
    gain = 1 - momentum if momentum_convention == "ema" else 1.0

    b = np.zeros_like(theta)
    thetas = []
    for grad in grads:
        g = np.asarray(grad, dtype=np.float64)
        b = momentum * b + gain * g
        u = gain * g + momentum * b if nesterov else b
        permuted = u.transpose(order)
        o = np.stack(
            [
                newton_schulz(x, ns_coeffs, ns_steps, ns_eps)
                for x in permuted.reshape(-1, rows, cols)
            ]
        )
        o = o.reshape(permuted.shape).transpose(np.argsort(order))
        theta = theta * (1 - learning_rate * weight_decay) - learning_rate * factor * o
        thetas.append(np.array(theta))
    return thetas


def adam_trajectory(
    param: np.ndarray,
    grads: Sequence[np.ndarray],
    *,
    learning_rate: float,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    eps_placement: Literal["after", "before"] = "after",
) -> list[np.ndarray]:
    """Runs in float64 the Adam that Muon gives to leaves that are no matrices.

    With c1 = 1 - b1^t and c2 = 1 - b2^t, the direction is (m / c1) / (sqrt(v / c2) + eps) in
    rule (a), (m / c1) / ((sqrt(v) + eps) / sqrt(c2)) in rule (b).

    Args:
        param: initial parameter, any shape.
        grads: one gradient per step, each of the parameter's shape.
        learning_rate: eta.
        b1: decay of m.
        b2: decay of v.
        eps: guard of the division; positive.
        weight_decay: lambda, decoupled.
        eps_placement: add eps "after" (rule a) or "before" (rule b) the bias correction of v.

    Returns:
        The parameter after each step.

    Raises:
        ValueError: on an unknown ``eps_placement``, or if ``eps`` is not positive.

    >>> step = adam_trajectory(np.array(1.0), [np.array(7.0)], learning_rate=0.25)
    >>> round(float(step[0]), 6)
    0.75
    """
    if eps_placement not in ("after", "before"):
        raise ValueError(f"eps_placement must be after or before, found {eps_placement}")
    if eps <= 0:
        raise ValueError(f"eps must be positive, found {eps}")
    theta = np.array(param, dtype=np.float64)
    m = np.zeros_like(theta)
    v = np.zeros_like(theta)
    thetas = []
    for t, grad in enumerate(grads, start=1):
        g = np.asarray(grad, dtype=np.float64)
        c1, c2 = 1 - b1**t, 1 - b2**t
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * g**2
        if eps_placement == "after":
            den = np.sqrt(v / c2) + eps
        else:
            den = (np.sqrt(v) + eps) / math.sqrt(c2)
        theta = theta * (1 - learning_rate * weight_decay) - learning_rate * (m / c1) / den
        thetas.append(np.array(theta))
    return thetas
