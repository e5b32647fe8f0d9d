"""SGDP (Heo et al., 2020, arXiv 2006.08217), as in the authors' code.

    b <- mu b + (1 - tau) g                     (the first step is dampened, too)
    d = b                                       (Nesterov: g + mu b)
    d, rho = project(d, g, theta)               (AdamP's projection)
    theta <- theta (1 - eta lambda rho / (1 - mu)) - eta d

In the published code d and b are one array unless Nesterov momentum is on, so that the projected
direction is what the buffer keeps; the paper projects the applied step only.
"""

from __future__ import annotations

from typing import Literal, overload

import numpy as np

from . import Gradients, gradient_at, number_of_steps
from .adamp import project


@overload
def trajectory(
    param: np.ndarray,
    grads: Gradients,
    *,
    learning_rate: float,
    momentum: float = ...,
    dampening: float = ...,
    nesterov: bool = ...,
    weight_decay: float = ...,
    delta: float = ...,
    wd_ratio: float = ...,
    eps: float = ...,
    project_momentum: bool = ...,
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
    momentum: float = ...,
    dampening: float = ...,
    nesterov: bool = ...,
    weight_decay: float = ...,
    delta: float = ...,
    wd_ratio: float = ...,
    eps: float = ...,
    project_momentum: bool = ...,
    output_axes: tuple[int, ...] = ...,
    steps: int | None = ...,
    return_grads: Literal[True],
) -> tuple[list[np.ndarray], list[np.ndarray]]: ...
def trajectory(
    param: np.ndarray,
    grads: Gradients,
    *,
    learning_rate: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    eps: float = 1e-8,
    project_momentum: bool = False,
    output_axes: tuple[int, ...] = (-1,),
    steps: int | None = None,
    return_grads: bool = False,
) -> list[np.ndarray] | tuple[list[np.ndarray], list[np.ndarray]]:
    """Runs SGDP in float64.

    Args:
        param: initial parameter, any shape; fewer than two axes are never projected.
        grads: one gradient per step, each of the parameter's shape, or a function of
            ``(t, theta)``.
        learning_rate: eta.
        momentum: mu, below 1.
        dampening: tau.
        nesterov: step along g + mu b instead of b.
        weight_decay: lambda, decoupled and divided by 1 - mu.
        delta: threshold on the cosine between gradient and parameter.
        wd_ratio: factor on weight decay at projected steps.
        eps: guard of the norms; positive.
        project_momentum: keep the projected direction in the buffer; without effect under
            Nesterov momentum, where direction and buffer differ.
        output_axes: axes of the output channels.
        steps: number of steps when ``grads`` is a function.
        return_grads: return the gradients used, too.

    Returns:
        The parameter after each step, or the pair of that list and the list of gradients.

    Raises:
        ValueError: if ``momentum`` is 1 or more, ``eps`` is not positive, or ``steps`` does not
            go with ``grads``.

    >>> step = trajectory(np.array([2.0]), [np.array([4.0])], learning_rate=0.25)
    >>> [float(x) for x in step[0]]
    [1.0]
    """
    if momentum >= 1:
        raise ValueError(f"momentum must be below 1, found {momentum}")
    if eps <= 0:
        raise ValueError(f"eps must be positive, found {eps}")
    theta = np.array(param, dtype=np.float64)
    b = np.zeros_like(theta)
    thetas, used = [], []
    for t in range(1, number_of_steps(grads, steps) + 1):
        g = gradient_at(grads, t, theta)
        b = momentum * b + (1 - dampening) * g
        d = g + momentum * b if nesterov else b
        d, rho = project(
            d, g, theta, delta=delta, wd_ratio=wd_ratio, eps=eps, output_axes=output_axes
        )
        if project_momentum and not nesterov:
            b = d
        decay = learning_rate * weight_decay * rho / (1 - momentum)
        theta = theta * (1 - decay) - learning_rate * d
        thetas.append(np.array(theta))
        used.append(g)
    return (thetas, used) if return_grads else thetas
