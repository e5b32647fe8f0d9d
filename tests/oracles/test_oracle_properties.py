"""Options and identities that the recorded trajectories leave open."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import pytest

from . import adabelief, adamp, clip_coordinates, diffgrad, exadam, muon, sgdp

# float64 on both sides, the same numbers in another order.
ROUNDING = 1e-12


def draws(shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.standard_normal(shape) for _ in range(count)]


def test_clip_threshold_is_global() -> None:
    grads = {"a": np.array([3, -1, 0.5, -0.2]), "b": np.array([10, 0, -4, 0.1, 0.05, -2])}
    quarter = clip_coordinates.clip(grads, 0.25)
    np.testing.assert_array_equal(quarter["a"], grads["a"])
    np.testing.assert_array_equal(quarter["b"], [3, 0, -3, 0.1, 0.05, -2])
    half = clip_coordinates.clip(grads, 0.5)
    np.testing.assert_array_equal(half["a"], [0.5, -0.5, 0.5, -0.2])
    np.testing.assert_array_equal(half["b"], [0.5, 0, -0.5, 0.1, 0.05, -0.5])


def test_clip_fraction_limits_and_scale() -> None:
    grads = {"a": np.array([3.0, -1.0]), "b": np.array(2.0)}
    nothing = clip_coordinates.clip(grads, 0.0, scale=0.1)
    everything = clip_coordinates.clip(grads, 1.0)
    scaled = clip_coordinates.clip(grads, 0.4, scale=0.25)
    for name, g in grads.items():
        np.testing.assert_array_equal(nothing[name], g)
        np.testing.assert_array_equal(everything[name], np.zeros_like(g))
        np.testing.assert_array_equal(scaled[name], np.sign(g) * 0.5)
    assert clip_coordinates.clip({}, 0.5) == {}


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        ("jordan", math.sqrt(10 / 6)),
        ("moonlight", 0.2 * math.sqrt(10)),
        ("dion", math.sqrt(10 / 6)),
        ("none", 1.0),
    ],
)
@pytest.mark.parametrize("wide", [False, True])
def test_muon_shape_factor(
    name: Literal["jordan", "moonlight", "dion", "none"], factor: float, wide: bool
) -> None:
    """Kernels (in, out) = (6, 10) and (10, 6): out/in above and below one."""
    if wide:
        factor = {"jordan": 1.0, "dion": math.sqrt(6 / 10)}.get(name, factor)
    shape = (10, 6) if wide else (6, 10)
    grads = draws(shape, 1)
    theta = muon.trajectory(
        np.zeros(shape),
        grads,
        learning_rate=1.0,
        reduction_axes=(0,),
        output_axes=(1,),
        shape_factor=name,
    )[0]
    orthogonalised = muon.newton_schulz(0.0975 * grads[0], (3.4445, -4.7750, 2.0315), 5, 1e-7)
    np.testing.assert_allclose(theta, -factor * orthogonalised, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("nesterov", [False, True])
def test_muon_momentum_conventions_differ_by_the_guard_only(nesterov: bool) -> None:
    grads = draws((3, 4), 5)
    ema, total = (
        muon.trajectory(
            np.ones((3, 4)),
            grads,
            learning_rate=0.1,
            reduction_axes=(0,),
            output_axes=(1,),
            nesterov=nesterov,
            ns_eps=0.0,
            momentum_convention=convention,
        )[-1]
        for convention in ("ema", "sum")
    )
    np.testing.assert_allclose(ema, total, rtol=0, atol=ROUNDING)


def test_muon_without_nesterov_orthogonalises_the_buffer() -> None:
    first, second = draws((3, 4), 2)
    options = {"learning_rate": 1.0, "reduction_axes": (0,), "output_axes": (1,), "ns_eps": 0.0}
    one, two = muon.trajectory(
        np.zeros((3, 4)), [first, second], nesterov=False, momentum=0.8, **options
    )
    expected = muon.newton_schulz(0.8 * first + second, (3.4445, -4.7750, 2.0315), 5, 0.0)
    factor = math.sqrt(4 / 3)
    np.testing.assert_allclose(two - one, -factor * expected, rtol=0, atol=ROUNDING)


def test_muon_batch_axes_hold_independent_matrices() -> None:
    grads = draws((5, 2, 3, 4), 4)
    param = np.ones((5, 2, 3, 4))
    batched = muon.trajectory(
        param, grads, learning_rate=0.1, reduction_axes=(3, 0), output_axes=(2,)
    )
    for i in range(2):
        alone = muon.trajectory(
            param[:, i],
            [g[:, i] for g in grads],
            learning_rate=0.1,
            reduction_axes=(0, 2),
            output_axes=(1,),
        )
        np.testing.assert_allclose(batched[-1][:, i], alone[-1], rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("rule", [adamp.trajectory, sgdp.trajectory])
def test_projected_step_is_orthogonal_to_the_parameter(
    rule: Callable[..., list[np.ndarray]],
) -> None:
    param = draws((2, 3, 4), 1)[0]
    theta = rule(param, draws((2, 3, 4), 3)[2:], learning_rate=0.1, delta=100.0)[0]
    radial = np.sum((theta - param) * param, axis=(0, 1))
    # The unit vector is theta / (|theta| + 1e-8), so a share of 2e-8 / |theta| remains.
    np.testing.assert_allclose(radial, 0, atol=1e-7)
    assert np.max(np.abs(theta - param)) > 0.01


def test_cosine_bounds_each_norm_from_below() -> None:
    theta = np.full((4, 1), 0.5)
    assert adamp.cosine(3e-10 * theta, theta, (0,), 1e-8) == pytest.approx(0.03)
    assert adamp.cosine(theta, 3e-10 * theta, (0,), 1e-8) == pytest.approx(0.03)
    assert adamp.cosine(np.zeros((4, 1)), np.zeros((4, 1)), (0,), 1e-8) == 0


@pytest.mark.parametrize("rule", [adamp.trajectory, sgdp.trajectory])
def test_several_output_axes_are_one_flattened_axis(rule: Callable[..., list[np.ndarray]]) -> None:
    param, *grads = draws((6, 2, 3), 6)
    options = {"learning_rate": 0.1, "weight_decay": 0.1, "delta": 1.5}
    split = rule(param, grads, output_axes=(1, 2), **options)
    merged = rule(param.reshape(6, 6), [g.reshape(6, 6) for g in grads], **options)
    last_axis = rule(param, grads, **options)
    for a, b in zip(split, merged, strict=True):
        np.testing.assert_allclose(a.reshape(6, 6), b, rtol=0, atol=ROUNDING)
    assert np.max(np.abs(split[-1] - last_axis[-1])) > 1e-3


@pytest.mark.parametrize(
    "rule", [adabelief.trajectory, adamp.trajectory, exadam.trajectory, diffgrad.trajectory]
)
def test_refuses_zero_eps(rule: Callable[..., list[np.ndarray]]) -> None:
    with pytest.raises(ValueError, match="eps must be positive, found 0"):
        rule(np.ones(2), [np.ones(2)], learning_rate=0.1, eps=0)


def test_refuses_steps_that_do_not_go_with_the_gradients() -> None:
    with pytest.raises(ValueError, match="steps must be given"):
        sgdp.trajectory(np.ones(2), lambda t, theta: theta, learning_rate=0.1)
    with pytest.raises(ValueError, match="steps must be None"):
        sgdp.trajectory(np.ones(2), [np.ones(2)], learning_rate=0.1, steps=1)
