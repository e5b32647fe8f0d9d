"""Malformed input is refused by name, when a rule is made, initialised or traced."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from jaxopt_lab import subspace

PARAMS = {"layer": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
WRONG: Any = subspace  # what a type checker would tell
CUBE = {"cube": jnp.ones((3, 3, 2, 2))}
# The reductions are over the first axis.
TWO = optax.contrib.MuonDimensionNumbers(0, 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"density": -0.1}, ValueError, r"density must be in \[0, 1\], got -0.1"),
        ({"density": 1.5}, ValueError, r"density must be in \[0, 1\], got 1.5"),
        ({"density": float("nan")}, ValueError, r"density must be in \[0, 1\], got nan"),
        ({"density": jnp.float32(0.5)}, ValueError, "density must be a number .*static_args"),
        ({"update_gap": 0}, ValueError, "update_gap must be a positive integer, got 0"),
        ({"update_gap": 2.5}, TypeError, r"update_gap must be a positive integer, got 2\.5"),
        ({"first_gap": 0}, ValueError, "first_gap must be a positive integer"),
        ({"stagger": 0}, ValueError, "stagger must be a positive integer"),
        ({"stagger": 4, "update_gap": 3}, ValueError, r"stagger must be at most update_gap \(3\)"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got float"),
        ({"on_refresh": "drop"}, ValueError, "on_refresh must be one of .*got 'drop'"),
        (
            {"on_refresh": "keep", "projection": subspace.blocks()},
            ValueError,
            r"one of \('reset', 'reset_all'\) with this projection, got 'keep'",
        ),
        ({"projection": subspace.svd}, TypeError, "projection must be one, .*got function"),
        ({"projection": "svd"}, TypeError, r"such as columns\(\) or svd\(\); got str"),
        (
            {"error_feedback": True, "free": optax.identity()},
            ValueError,
            "with error_feedback .*free must be None",
        ),
        ({"free_scale": -1.0}, ValueError, "free_scale must be non-negative"),
        ({"projected_scale": -1.0}, ValueError, "projected_scale must be non-negative"),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        subspace.frugal(**arguments)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WRONG.columns("rows"), "axis must be .*got 'rows'"),
        (lambda: WRONG.svd("left"), "side must be one of .*got 'left'"),
        (lambda: WRONG.svd(method="qr"), "method must be one of .*got 'qr'"),
        (lambda: subspace.svd(oversampling=-1), "oversampling must be non-negative"),
        (lambda: subspace.svd(power_iterations=-1), "power_iterations must be non-negative"),
        (lambda: WRONG.dct(1), "type must be one of .*got 1"),
        (lambda: WRONG.dct(norm=3), "norm must be one of .*got 3"),
        (lambda: WRONG.blocks("mirror"), "order must be one of .*got 'mirror'"),
        (lambda: jaxopt_lab.galore_adamw(0.1, 0), "rank must be a positive integer, got 0"),
        (lambda: jaxopt_lab.dct_adamw(0.1, 0), "rank must be a positive integer, got 0"),
        (lambda: jaxopt_lab.badam(0.1, 0), "update_gap must be a positive integer, got 0"),
    ],
)
def test_projections_and_ready_made_rules(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "params", "error", "message"),
    [
        (
            {"always_full": ["bias", "norm"]},
            PARAMS,
            ValueError,
            "pattern 'norm' matches no parameter .*layer/bias",
        ),
        (
            {"always_full": {"layer": {"kernel": False}}},
            PARAMS,
            ValueError,
            "always_full does not match .*'layer/bias' is not covered",
        ),
        (
            {"always_full": lambda params: {"other": True}},
            PARAMS,
            ValueError,
            "always_full does not match .*'other' is no parameter",
        ),
        (
            {"always_full": ()},
            PARAMS,
            ValueError,
            r"columns needs a matrix, but 'layer/bias' has shape \(6,\): .*dimension_numbers",
        ),
        (
            {"always_full": (), "projection": subspace.svd()},
            CUBE,
            ValueError,
            "svd needs a matrix, but 'cube' has shape",
        ),
        (
            {"always_full": (), "projection": subspace.dct()},
            CUBE,
            ValueError,
            "dct needs a matrix, but 'cube' has shape",
        ),
        (
            {"dimension_numbers": {"layer": {"kernel": TWO, "other": None}}},
            PARAMS,
            ValueError,
            "dimension_numbers does not match .*'layer/other'",
        ),
        (
            {"dimension_numbers": {"layer": {"kernel": TWO, "bias": TWO}}},
            PARAMS,
            ValueError,
            r"dimension_numbers of 'layer/bias' name the axes \(1,\)",
        ),
        (
            {"dimension_numbers": {"layer": {"kernel": (0, 1), "bias": None}}},
            PARAMS,
            ValueError,
            r"of 'layer/kernel' must be optax.contrib.MuonDimensionNumbers or None, got \(0, 1\)",
        ),
        (
            {"always_full": {"layer": {"kernel": "no", "bias": "yes"}}},
            PARAMS,
            TypeError,
            "always_full must have leaves that are True or False, got 'yes'",
        ),
        ({"always_full": 3}, PARAMS, TypeError, "always_full must be a tree of .*got 3"),
        ({"always_full": ["(bias"]}, PARAMS, ValueError, r"always_full: '\(bias' is no pattern"),
        (
            {"projection": WRONG.blocks(group=len), "always_full": ()},
            PARAMS,
            TypeError,
            "group must return the name of a block, a text, got 10 for 'layer/bias'",
        ),
        ({"free": optax.trace(0.9)}, PARAMS, ValueError, "free must have no state"),
        (
            {"density": lambda size: size + 1},
            PARAMS,
            ValueError,
            r"density\(4\) must be an integer in \[0, 4\], got 5",
        ),
        ({"density": lambda size: 0.5}, PARAMS, ValueError, r"density\(4\) must be .*got 0\.5"),
        (
            {"density": 0.0, "error_feedback": True},
            PARAMS,
            ValueError,
            "part of each leaf must be selected, but of 'layer/kernel' the density keeps none",
        ),
        ({}, {"a": {"b": jnp.ones((3, 2), int)}}, TypeError, "'a/b'.*integer parameters"),
        ({}, {"a": {"b": jnp.ones((3, 2), complex)}}, TypeError, "'a/b' is complex"),
    ],
)
def test_init(arguments, params, error, message):
    with pytest.raises(error, match=message):
        subspace.frugal(**arguments).init(params)


@pytest.mark.parametrize("make", ["columns", "entries", "svd", "dct"])
def test_choice_of_another_shape(make):
    projection = getattr(subspace, make)(choose=lambda name, count, grad: jnp.zeros(7))
    tx = subspace.frugal(projection=projection, density=0.5)
    with pytest.raises(ValueError, match=r"choose returned shape \(7,\) for 'layer/kernel'"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("kernel", "error", "message"),
    [
        (np.ones((6, 4)), ValueError, r"'layer/kernel' has shape \(6, 4\).*shape \(4, 6\)"),
        (np.ones((4, 1)), ValueError, r"'layer/kernel' has shape \(4, 1\).*shape \(4, 6\)"),
        (np.ones((4, 6), np.int32), TypeError, "'layer/kernel' has dtype int32"),
        (np.ones((4, 6), np.complex64), TypeError, "'layer/kernel' has dtype complex64"),
    ],
)
@pytest.mark.parametrize("name", ["columns", "blocks", "svd"])
def test_gradients(name, kernel, error, message):
    tx = subspace.frugal(projection=getattr(subspace, name)(), density=0.5)
    grads: Any = {"layer": {**PARAMS["layer"], "kernel": kernel}}
    with pytest.raises(error, match=message):
        jax.eval_shape(tx.update, grads, tx.init(PARAMS), PARAMS) if error is ValueError else (
            tx.update(grads, tx.init(PARAMS), PARAMS)
        )


def test_states_and_trees_of_others():
    tx = subspace.frugal(density=0.5)
    with pytest.raises(TypeError, match=r"expected a state of type FrugalState, got ScaleByAdam"):
        tx.update(PARAMS, optax.scale_by_adam().init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="'layer/bias' is missing"):
        tx.update({"layer": {"kernel": jnp.ones((4, 6))}}, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="tx does not contain frugal"):
        subspace.treatments(optax.adam(0.1), PARAMS)


@pytest.mark.parametrize("make", [jaxopt_lab.badam, jaxopt_lab.galore_adamw])
def test_masks_and_params_of_own_decay(make):
    with pytest.raises(ValueError, match=r"mask does not match .*'other' is no parameter"):
        make(0.1, weight_decay=0.1, mask={"other": True}).init(PARAMS)
    tx = make(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=f"{make.__name__} with weight_decay needs params"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ValueError, match="weight_decay must be non-negative"):
        make(0.1, weight_decay=-0.1)


@pytest.mark.parametrize(
    "full",
    [
        optax.identity(),
        jaxopt_lab.quantize_state(
            optax.scale_by_adam(), jaxopt_lab.quantization.int8(4), min_size=1
        ),
    ],
    ids=["stateless", "encoded"],
)
def test_project_needs_moments(full):
    tx = subspace.frugal(full, density=0.5, on_refresh="project")
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match=r"needs moments, .*\(2, 6\) for 'layer/kernel'"):
        tx.update(PARAMS, state)
