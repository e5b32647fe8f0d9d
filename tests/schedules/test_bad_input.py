"""Malformed arguments are refused when a schedule is made, by name."""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import schedules

GOOD: dict[str, dict[str, Any]] = {
    "uba_schedule": {"peak_value": 0.1, "end_value": 0.01, "total_steps": 10, "phi": 1.0},
    "wsd_schedule": {"peak_value": 0.1, "warmup_steps": 2, "stable_steps": 3, "decay_steps": 4},
    "branch_decay": {"schedule": optax.constant_schedule(1.0), "start_step": 3, "decay_steps": 4},
    "inverse_sqrt_schedule": {"peak_value": 0.1, "warmup_steps": 2},
    "rewarmed": {"make_schedule": lambda phase, n: SCHEDULE, "phase_steps": (5, 5)},
    "rewarmed_schedule": {"peak_value": 0.1, "phase_steps": (5, 5), "warmup_steps": 2},
    "record_norms": {"kind": "l1", "length": 3},
    "refined_schedule": {
        "norms": [1.0, 2.0],
        "total_steps": 4,
        "peak_value": 0.1,
        "kind": "l1",
    },
    "hypergradient": {"inner": optax.identity(), "learning_rate": 0.1, "meta_rate": 0.1},
    "scale_learning_rate": {
        "rate": 0.1,
        "batch_size": 2,
        "new_batch_size": 4,
        "rule": "sqrt",
    },
}
SCHEDULE = optax.constant_schedule(0.1)


def make(function: str, **changes: Any) -> Any:
    return getattr(schedules, function)(**{**GOOD[function], **changes})


@pytest.mark.parametrize("function", GOOD)
def test_the_good_ones_are_good(function):
    make(function)


RATES = ("peak_value", "init_value", "end_value", "learning_rate", "meta_rate", "rate")


@pytest.mark.parametrize(
    ("function", "name"),
    [(f, name) for f in GOOD for name in GOOD[f] if name in RATES]
    + [("wsd_schedule", "init_value"), ("wsd_schedule", "end_value"), ("branch_decay", "end_value")]
    + [("inverse_sqrt_schedule", "init_value"), ("rewarmed_schedule", "end_value")],
)
def test_rates(function, name):
    for value in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=rf"{name}.* must be finite and non-negative, got"):
            make(function, **{name: value})
    with pytest.raises(TypeError, match=rf"{name}.* must be a number or an array, got str"):
        make(function, **{name: "high"})
    with pytest.raises(TypeError, match=rf"{name}.* must be a number, got True"):
        make(function, **{name: True})
    if function != "rewarmed_schedule" or name != "peak_value":  # there one for each phase
        for value in (jnp.array([0.1]), np.array([0.1]), jnp.full(2, 0.1)):
            with pytest.raises(
                ValueError, match=rf"{name}.* must have shape \(\), got an array of"
            ):
                make(function, **{name: value})


COUNTS = ("total_steps", "warmup_steps", "stable_steps", "decay_steps", "start_step", "length")
COUNTS += ("batch_size", "new_batch_size", "timescale", "saturation")


@pytest.mark.parametrize(
    ("function", "name"),
    [(f, name) for f in GOOD for name in GOOD[f] if name in COUNTS]
    + [("uba_schedule", "warmup_steps"), ("inverse_sqrt_schedule", "timescale")]
    + [("rewarmed_schedule", "start_step"), ("scale_learning_rate", "saturation")],
)
def test_counts(function, name):
    with pytest.raises(ValueError, match=rf"{name}.* must be at least \d, got -1"):
        make(function, **{name: -1})
    for value in (2.5, True):
        with pytest.raises(TypeError, match=rf"{name}.* must be an integer, got {value}"):
            make(function, **{name: value})
    for value in (jnp.array([3]), np.array([3]), jnp.float32(3.0), "3", None):
        if value is None and name in ("saturation", "timescale", "stable_steps", "decay_steps"):
            continue
        with pytest.raises(TypeError, match=rf"{name}.* must be an integer, got"):
            make(function, **{name: value})


@pytest.mark.parametrize(
    ("function", "changes", "error", "message"),
    [
        ("uba_schedule", {"phi": 0.0}, ValueError, "phi must be positive, got 0.0"),
        ("uba_schedule", {"phi": math.nan}, ValueError, "phi must be positive, got nan"),
        ("uba_schedule", {"angle": "x"}, ValueError, "angle must be one of continuous, chebyshev"),
        ("uba_schedule", {"end_value": 0.2}, ValueError, "end_value must not exceed peak_value"),
        ("uba_schedule", {"warmup_steps": 10}, ValueError, "total_steps must exceed warmup_steps"),
        ("wsd_schedule", {"decay_shape": "x"}, ValueError, "decay_shape must be one of linear, "),
        ("wsd_schedule", {"warmup_shape": "x"}, ValueError, "warmup_shape must be one of linear"),
        ("wsd_schedule", {"decay_shape": "exponential"}, ValueError, "needs end_value above 0"),
        ("wsd_schedule", {"stable_steps": None}, ValueError, "must both be given, or both be None"),
        ("wsd_schedule", {"decay_steps": None}, ValueError, "must both be given, or both be None"),
        ("wsd_schedule", {"decay_steps": 0}, ValueError, "decay_steps must be at least 1, got 0"),
        ("wsd_schedule", {"init_value": 0.2}, ValueError, "init_value must not exceed peak_value"),
        ("branch_decay", {"schedule": 0.1}, TypeError, "schedule must be a function of the step"),
        ("branch_decay", {"decay_shape": "exponential"}, ValueError, "needs end_value above 0"),
        ("inverse_sqrt_schedule", {"warmup_steps": 0}, ValueError, "timescale is needed"),
        ("rewarmed", {"make_schedule": 3}, TypeError, "make_schedule must be a function"),
        ("rewarmed", {"make_schedule": lambda p, n: 3}, TypeError, "make_schedule(0, 5) must be"),
        ("rewarmed", {"phase_steps": ()}, ValueError, "phase_steps must have at least one phase"),
        ("rewarmed", {"phase_steps": 5}, TypeError, "phase_steps must be a sequence of integers"),
        ("rewarmed", {"phase_steps": (5, 0)}, ValueError, "phase_steps[1] must be at least 1"),
        ("rewarmed_schedule", {"warmup_steps": 5}, ValueError, "must be below its length, got 5"),
        ("rewarmed_schedule", {"warmup_steps": (1, 7)}, ValueError, "warmup_steps of phase 1"),
        ("rewarmed_schedule", {"peak_value": (0.1,)}, ValueError, "one value for each of 2 phases"),
        ("rewarmed_schedule", {"end_value": 0.2}, ValueError, "end_value must not exceed"),
        ("record_norms", {"kind": "l3"}, ValueError, "kind must be one of l1, l2, got 'l3'"),
        ("refined_schedule", {"kind": "adam"}, ValueError, "kind must be one of l1, l2"),
        ("refined_schedule", {"norms": [1.0]}, ValueError, "at least two finite values, got 1"),
        ("refined_schedule", {"norms": [math.nan] * 3}, ValueError, "two finite values, got 0"),
        ("refined_schedule", {"norms": [[1.0, 2.0]]}, ValueError, "norms must have shape (updates"),
        ("refined_schedule", {"norms": [0.0, 0.0]}, ValueError, "norms are all zero"),
        ("refined_schedule", {"norms": [1.0, -0.5]}, ValueError, "must not be negative, got -0.5"),
        ("refined_schedule", {"smoothing": 1.5}, ValueError, "smoothing must be in [0, 1], got 1"),
        ("refined_schedule", {"smoothing": "no"}, TypeError, "smoothing must be a number, got str"),
        ("refined_schedule", {"total_steps": 1}, ValueError, "total_steps must be at least 2"),
        ("hypergradient", {"learning_rate": SCHEDULE}, TypeError, "learning_rate must be a number"),
        ("hypergradient", {"inner": optax.scale_by_adam}, TypeError, "call it first, as in scale_"),
        ("hypergradient", {"bounds": 3.0}, ValueError, "bounds must be (low, high), two numbers"),
        ("hypergradient", {"bounds": ("a", 3.0)}, TypeError, "bounds[0] must be a number, got 'a'"),
        ("record_norms", {"keep": "all"}, ValueError, "keep must be one of first, last, got 'all'"),
        ("hypergradient", {"rule": "x"}, ValueError, "rule must be one of additive, multiplicat"),
        ("hypergradient", {"bounds": (2.0, 3.0)}, ValueError, "0 <= low <= 1 <= high, got (2.0, 3"),
        ("hypergradient", {"bounds": (-1.0, 3.0)}, ValueError, "0 <= low <= 1 <= high"),
        ("scale_learning_rate", {"rule": "cubic"}, ValueError, "rule must be one of linear, sqrt"),
    ],
)
def test_others(function, changes, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make(function, **changes)


def test_traced_norms():
    with pytest.raises(TypeError, match="norms must be concrete: call refined_schedule outside"):
        jax.jit(lambda norms: make("refined_schedule", norms=norms)(0))(jnp.ones(3))


@pytest.mark.parametrize("step", [True, 1j, np.array([False])])
def test_steps_that_are_no_numbers(step):
    with pytest.raises(TypeError, match="step must be an integer or a real number, got dtype"):
        make("uba_schedule")(step)


def test_states_and_gradients():
    norms, rate = make("record_norms"), make("hypergradient")
    for tx in (norms, rate):
        with pytest.raises(TypeError, match="parameter 'w' has dtype int32"):
            tx.init({"w": jnp.zeros(2, jnp.int32)})
        with pytest.raises(TypeError, match=r"expected a state of type .*, got EmptyState"):
            tx.update({"w": jnp.zeros(2)}, optax.EmptyState())
    with pytest.raises(TypeError, match="updates leaf 'w' has dtype int32"):
        norms.update({"w": jnp.zeros(2, jnp.int32)}, norms.init({"w": jnp.zeros(2)}))
    with pytest.raises(ValueError, match=r"updates leaf 'w' has shape \(3,\)"):
        rate.update({"w": jnp.zeros(3)}, rate.init({"w": jnp.zeros(2)}))
