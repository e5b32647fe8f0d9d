"""The regimes are what they say they are, and keep threshold rules away from their thresholds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest

from . import adamp, sgdp
from .regimes import REGIMES, SHAPES, gradients, orthogonal_gradients

MATRICES = [shape for shape in SHAPES if len(shape) > 1]
# A cosine of float32 vectors is off by some 1e-6 of itself, far less than this.
MARGIN = 1e-3


def passing_views(
    befores: Sequence[np.ndarray], grads: Sequence[np.ndarray]
) -> tuple[list[str], float]:
    """Names the view that passes at each step; gives the least relative distance to a threshold."""
    names, margin = [], math.inf
    for theta, g in zip(befores, grads, strict=True):
        name = "none"
        for view, axes in zip(("channel", "layer"), adamp.views(theta.ndim, (-1,)), strict=True):
            threshold = 0.1 / math.sqrt(math.prod(theta.shape[axis] for axis in axes))
            cosine = adamp.cosine(g, theta, axes, 1e-8)
            margin = min(margin, abs(cosine / threshold - 1))
            if cosine < threshold:
                name = view
                break
        names.append(name)
    return names, margin


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("regime", REGIMES)
def test_arrays_are_deterministic_float32_numbers(regime: str, shape: tuple[int, ...]) -> None:
    param, grads = gradients(regime, shape)
    again = gradients(regime, shape)
    assert len(grads) == 10
    for x, y in zip([param, *grads], [again[0], *again[1]], strict=True):
        assert x.shape == shape
        assert x.dtype == np.float64
        np.testing.assert_array_equal(x, x.astype(np.float32))
        np.testing.assert_array_equal(x, y)


def test_regimes_have_their_sizes() -> None:
    sizes = {}
    for regime in REGIMES:
        param, grads = gradients(regime, (100,), steps=10)
        sizes[regime] = np.abs(grads)
        expected = 1e3 if regime == "large_weights" else 1.0
        assert 0.5 * expected < np.std(param) < 2 * expected
    for regime, expected in (("large_weights", 1.0), ("tiny", 1e-8)):
        assert 0.5 * expected < np.std(sizes[regime]) / math.sqrt(1 - 2 / math.pi) < 2 * expected
    np.testing.assert_array_equal(sizes["constant"], np.float32(1e-6))
    np.testing.assert_array_equal(sizes["zeros_first"][:3], 0)
    assert np.all(sizes["zeros_first"][3:] > 0)
    assert sizes["wide_range"].min() < 1e-5
    assert sizes["wide_range"].max() > 10


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("learning_rate", [1e-3, 1e-2, 1e-1])
def test_regimes_stay_away_from_the_cosine_thresholds(
    learning_rate: float, regime: str, shape: tuple[int, ...]
) -> None:
    param, grads = gradients(regime, shape)
    for thetas in (
        adamp.trajectory(param, grads, learning_rate=learning_rate),
        sgdp.trajectory(param, grads, learning_rate=learning_rate, momentum=0.9),
    ):
        assert passing_views([param, *thetas[:-1]], grads)[1] > MARGIN


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("channel", ["channel"] * 6),
        ("layer", ["layer"] * 6),
        ("mixed", ["channel", "layer", "none"] * 2),
    ],
)
def test_orthogonal_gradients_open_the_view_they_name(
    mode: Literal["channel", "layer", "mixed"], expected: list[str], shape: tuple[int, ...]
) -> None:
    param, make = orthogonal_gradients(shape, steps=6, mode=mode)
    for rule in (adamp.trajectory, sgdp.trajectory):
        thetas, grads = rule(param, make, learning_rate=0.1, steps=6, return_grads=True)
        names, margin = passing_views([param, *thetas[:-1]], grads)
        assert names == expected
        assert margin > 0.5  # by construction: cosine zero, or at least 0.7
        for g in grads:
            np.testing.assert_array_equal(g, g.astype(np.float32))
        for x, y in zip(thetas, rule(param, grads, learning_rate=0.1), strict=True):
            np.testing.assert_array_equal(x, y)


def test_orthogonal_gradients_refuse_shapes_without_such_angles() -> None:
    with pytest.raises(ValueError, match="too few"):
        orthogonal_gradients((1, 4))
    with pytest.raises(ValueError, match="too few"):
        orthogonal_gradients((4, 1), mode="layer")
