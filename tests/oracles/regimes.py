"""Inputs on which an update rule is compared with its oracle.

Well-scaled Gaussian gradients do not tell most wrong epsilons, roots and bias corrections from
right ones; these regimes do. Every array is a float32 number stored in float64, so that a float32
run starts from the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from .adamp import views

#: Names of the regimes that ``gradients`` knows.
REGIMES = ("large_weights", "wide_range", "tiny", "constant", "zeros_first")

#: Leaf shapes on which each regime is tried.
SHAPES = ((), (1,), (7,), (4, 3), (3, 4), (2, 3, 2))


def _float32(x: np.ndarray | float) -> np.ndarray:
    return np.asarray(x, dtype=np.float32).astype(np.float64)


def _normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return _float32(rng.standard_normal(shape))


def gradients(
    regime: str, shape: tuple[int, ...], steps: int = 10, seed: int = 0
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Draws an initial parameter and the gradients of one regime.

    Args:
        regime: "large_weights": normal gradients, parameter of order 1e3; "wide_range": random
            signs, magnitudes 10**uniform(-6, 2) drawn for each entry; "tiny": normal times 1e-8;
            "constant": 1e-6 everywhere; "zeros_first": zero for three steps, then normal.
        shape: shape of the parameter.
        steps: number of gradients.
        seed: the same arguments give the same arrays.

    Returns:
        The parameter and the list of gradients.

    Raises:
        ValueError: on an unknown regime.

    >>> param, grads = gradients("constant", (2,), steps=3)
    >>> len(grads), grads[0].round(9)
    (3, array([1.e-06, 1.e-06]))
    """
    if regime not in REGIMES:
        raise ValueError(f"regime must be one of {REGIMES}, found {regime!r}")
    rng = np.random.default_rng([seed, REGIMES.index(regime), *shape])
    param = _float32(_normal(rng, shape) * (1e3 if regime == "large_weights" else 1.0))
    grads = []
    for t in range(1, steps + 1):
        g = _normal(rng, shape)
        if regime == "wide_range":
            g = np.sign(g) * 10 ** rng.uniform(-6, 2, shape)
        elif regime == "tiny":
            g = g * 1e-8
        elif regime == "constant":
            g = np.full(shape, 1e-6)
        elif regime == "zeros_first" and t <= 3:
            g = np.zeros(shape)
        grads.append(_float32(g))
    return param, grads


def orthogonal_gradients(
    shape: tuple[int, ...],
    steps: int = 10,
    seed: int = 0,
    mode: Literal["channel", "layer", "mixed"] = "channel",
    *,
    output_axes: tuple[int, ...] = (-1,),
) -> tuple[np.ndarray, Callable[[int, np.ndarray], np.ndarray]]:
    """Draws gradients whose angle to the current parameter settles AdamP's two tests.

    A gradient is the sum of noise orthogonal to the parameter within each channel, and of a radial
    part a_i theta_i / |theta_i|: none ("channel"), one that cancels over the tensor while leaving
    a channel at a cosine of at least 0.7 ("layer"), or the first, the second, and one that keeps
    every cosine at 0.7, in turns of three steps ("mixed").

    Args:
        shape: shape of the parameter; with fewer than two axes the noise is returned as drawn.
        steps: largest step that the function answers.
        seed: the same arguments give the same function.
        mode: which view shall pass.
        output_axes: axes of the output channels.

    Returns:
        The initial parameter and the function ``(t, theta) -> g``, t from 1.

    Raises:
        ValueError: on an unknown mode, or if the shape cannot have the requested angles: channels
            of one entry, or a single channel unless the mode is "channel".

    >>> param, make = orthogonal_gradients((4, 3), mode="channel")
    >>> bool(np.all(np.abs(np.sum(make(1, param) * param, axis=0)) < 1e-6))
    True
    """
    if mode not in ("channel", "layer", "mixed"):
        raise ValueError(f"mode must be channel, layer or mixed, found {mode!r}")
    rng = np.random.default_rng([seed, len(REGIMES), *shape])
    param = _normal(rng, shape)
    noises = [_normal(rng, shape) for _ in range(steps)]
    signs = [rng.standard_normal(shape) for _ in range(steps)]
    if len(shape) < 2:
        return param, lambda t, theta: noises[t - 1]
    axes = views(len(shape), output_axes)[0]
    length = int(np.prod([shape[axis] for axis in axes]))
    channels = param.size // length
    if length < 2 or (channels < 2 and mode != "channel"):
        raise ValueError(
            f"shape {shape} with output_axes {output_axes} has {channels} channels of {length} "
            f"entries, too few for mode {mode!r}"
        )

    def norm(x: np.ndarray) -> np.ndarray:
        return np.sqrt(np.sum(x**2, axis=axes, keepdims=True))

    def make(t: int, theta: np.ndarray) -> np.ndarray:
        kind = ("channel", "layer", "aligned")[(t - 1) % 3] if mode == "mixed" else mode
        size = norm(theta)
        n = theta / size
        noise = noises[t - 1]
        noise = noise - n * np.sum(n * noise, axis=axes, keepdims=True)
        if kind == "channel":
            radial = np.zeros_like(size)
        elif kind == "layer":
            radial = np.sum(signs[t - 1], axis=axes, keepdims=True)
            radial = radial - size * np.sum(size * radial) / np.sum(size**2)
            radial = radial * np.max(norm(noise)) / np.max(np.abs(radial))
        else:
            radial = norm(noise)
        return _float32(noise + radial * n)

    return param, make
