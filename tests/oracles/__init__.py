"""Update rules as plain float64 numpy programs, one file per method.

They are the yardstick for the JAX code and share nothing with it: each was written from the
published rule, and is itself checked against trajectories recorded from the authors' programs.
Symbols are the papers': ``theta`` parameter, ``g`` gradient, ``m``, ``v``, ``s`` moments, ``t``
the step counted from 1. Arrays are in JAX layout: dense kernels (in, out), convolutions HWIO.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

#: Recorded gradients, or a function ``(t, theta) -> g`` for gradients that depend on the iterate.
Gradients = Sequence[np.ndarray] | Callable[[int, np.ndarray], np.ndarray]


def number_of_steps(grads: Gradients, steps: int | None) -> int:
    """Returns how many steps to take.

    Args:
        grads: gradients, one per step, or a function of ``(t, theta)``.
        steps: number of steps; given if and only if ``grads`` is a function.

    Raises:
        ValueError: if ``steps`` is missing for a function, or given for a sequence.

    >>> number_of_steps([np.ones(2), np.ones(2)], None)
    2
    """
    if callable(grads):
        if steps is None:
            raise ValueError("steps must be given when grads is a function, found None")
        return steps
    if steps is not None:
        raise ValueError(f"steps must be None when grads is a sequence, found {steps}")
    return len(grads)


def gradient_at(grads: Gradients, t: int, theta: np.ndarray) -> np.ndarray:
    """Returns the float64 gradient of step ``t`` (from 1) at ``theta``.

    Args:
        grads: gradients, one per step, or a function of ``(t, theta)``.
        t: step, counted from 1.
        theta: parameter before the step.

    >>> float(gradient_at(lambda t, theta: 2 * theta, 1, np.float64(3.0)))
    6.0
    """
    g = grads(t, theta) if callable(grads) else grads[t - 1]
    return np.array(g, dtype=np.float64)
