"""Malformed input is refused by name, when a rule is made, initialised or traced."""

from __future__ import annotations

import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from tests.transforms.rules import OPTIMIZERS, RULES

PARAMS = {"layer": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
GRADS = jax.tree.map(lambda x: 0.1 * x, PARAMS)

each_optimizer = pytest.mark.parametrize("rule", OPTIMIZERS, ids=str)
each_rule = pytest.mark.parametrize("rule", RULES, ids=str)


def arguments_of(*names: str) -> list[Any]:
    return [
        pytest.param(rule, name, id=f"{rule}-{name}")
        for rule in OPTIMIZERS
        for name in names
        if name in inspect.signature(rule.make).parameters
    ]


@pytest.mark.parametrize(
    ("rule", "name"), arguments_of("b1", "b2", "beta", "momentum", "adam_b1", "adam_b2")
)
@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan])
def test_row_1_decay_rates(rule, name, value):
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\), got {value}"):
        rule(**{name: value})


@pytest.mark.parametrize(("rule", "name"), arguments_of("learning_rate", "adam_learning_rate"))
@pytest.mark.parametrize("value", [-1e-3, math.nan])
def test_row_2_learning_rate(rule, name, value):
    with pytest.raises(ValueError, match="learning_rate must be non-negative"):
        rule(**{name: value})


@pytest.mark.parametrize(("rule", "name"), arguments_of("eps", "adam_eps"))
@pytest.mark.parametrize("value", [-1e-8, 0.0, math.nan])
def test_row_3_eps(rule, name, value):
    with pytest.raises(ValueError, match=f"{name} must be positive"):
        rule(**{name: value})


@pytest.mark.parametrize(("rule", "name"), arguments_of("weight_decay", "adam_weight_decay"))
@pytest.mark.parametrize("value", [-0.1, math.nan])
def test_row_4_weight_decay(rule, name, value):
    with pytest.raises(ValueError, match="weight_decay must be non-negative"):
        rule(**{name: value})


@pytest.mark.parametrize("value", [0, -1])
def test_row_5_number_of_iterations(value):
    with pytest.raises(ValueError, match="ns_steps must be a positive integer"):
        jaxopt_lab.muon(0.1, ns_steps=value)


def test_row_5_number_of_iterations_is_whole():
    with pytest.raises(TypeError, match=r"ns_steps must be a positive integer, got 2\.5"):
        jaxopt_lab.muon(0.1, ns_steps=2.5)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_row_6_fractions(value):
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]"):
        jaxopt_lab.clip_coordinates(value)
    with pytest.raises(ValueError, match=r"wd_ratio must be in \[0, 1\]"):
        jaxopt_lab.adamp(0.1, wd_ratio=value)
    with pytest.raises(ValueError, match=r"dampening must be in \[0, 1\]"):
        jaxopt_lab.sgdp(0.1, dampening=value)


@each_optimizer
def test_row_7_arrays_are_taken_as_they_are(rule):
    defaults = {
        name: 0.1 if value.default is inspect.Parameter.empty else value.default
        for name, value in inspect.signature(rule.make).parameters.items()
    }
    shapes_depend_on = {"density"}
    numbers = {
        name: jnp.float32(value)
        for name, value in {**defaults, **rule.arguments}.items()
        if isinstance(value, float) and name not in shapes_depend_on
    }

    @jax.jit
    def step(numbers, grads):
        tx = rule(**numbers)
        return tx.update(grads, tx.init(PARAMS), PARAMS)[0]

    tx = rule(**{name: float(value) for name, value in numbers.items()})
    expected, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    # The logarithm of a traced decay rate is taken in float32: 2e-5 at 0.999.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-5), step(numbers, GRADS), expected
    )


@pytest.mark.parametrize(("rule", "name"), arguments_of("b1", "beta", "momentum"))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_row_7_arrays_too_narrow_for_a_decay_rate(rule, name, dtype):
    with pytest.raises(ValueError, match=rf"{name} arrived as .*hyperparam_dtype"):
        rule(**{name: jnp.asarray(0.9, dtype)})


def test_row_8_inconsistent_options():
    with pytest.raises(ValueError, match="fixed_decay=True needs weight_decouple=True"):
        jaxopt_lab.adabelief(0.1, fixed_decay=True, weight_decouple=False)
    with pytest.raises(ValueError, match="project_momentum=True needs nesterov=False"):
        jaxopt_lab.sgdp(0.1, momentum=0.9, nesterov=True, project_momentum=True)
    with pytest.raises(ValueError, match="ns_coeffs must be three numbers"):
        jaxopt_lab.muon(0.1, ns_coeffs=(1.0, 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize(("rule", "name"), arguments_of("mu_dtype"))
def test_row_9_mu_dtype(rule, name):
    with pytest.raises(ValueError, match="mu_dtype must be floating, got int32"):
        rule(**{name: jnp.int32})


@each_optimizer
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_row_10_integer_parameters(rule, dtype):
    with pytest.raises(
        TypeError, match=r"'a/b'.*integer parameters cannot be optimized; mask them"
    ):
        rule().init({"a": {"b": jnp.ones((3, 2), dtype)}})


@each_optimizer
def test_row_11_complex_parameters(rule):
    with pytest.raises(TypeError, match=r"'a/b' is complex.*split_real_and_imaginary"):
        rule().init({"a": {"b": jnp.ones((3, 2), jnp.complex64)}})


@each_optimizer
def test_row_12_missing_params(rule):
    tx = rule()
    with pytest.raises(ValueError, match=r"needs params; call update\(updates, state, params\)"):
        tx.update(GRADS, tx.init(PARAMS))


@each_optimizer
def test_row_13_another_tree(rule):
    tx = rule()
    state = tx.init(PARAMS)
    missing = {"layer": {"kernel": GRADS["layer"]["kernel"]}}
    with pytest.raises(ValueError, match=r"updates do not match .*'layer/bias' is missing"):
        tx.update(missing, state, PARAMS)
    extra = {**GRADS, "more": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"updates do not match .*'more' is not expected"):
        tx.update(extra, state, PARAMS)


@each_optimizer
def test_row_14_another_shape(rule):
    tx = rule(weight_decay=0.0)
    state = tx.init(PARAMS)
    narrow = {"layer": {**GRADS["layer"], "kernel": jnp.ones((4, 1))}}
    with pytest.raises(ValueError, match=r"'layer/kernel' has shape \(4, 1\).*shape \(4, 3\)"):
        tx.update(narrow, state, PARAMS)
    with pytest.raises(ValueError, match=r"'layer/kernel' has shape \(4, 1\).*shape \(4, 3\)"):
        jax.jit(tx.update)(narrow, state, PARAMS)


@each_rule
@pytest.mark.parametrize("dtype", [jnp.int32, jax.dtypes.float0, jnp.complex64])
def test_row_15_gradients_that_are_no_real_floats(rule, dtype):
    tx = rule()
    state = tx.init(PARAMS)
    odd = {"layer": {**GRADS["layer"], "kernel": np.zeros((4, 3), dtype)}}
    with pytest.raises(TypeError, match=r"'layer/kernel' has dtype .*expected real floating point"):
        tx.update(odd, state, PARAMS)


@each_optimizer
def test_row_16_the_state_of_another_rule(rule):
    tx = rule(weight_decay=0.0)
    other = optax.chain(optax.scale_by_adam(), optax.scale(-0.1)).init(PARAMS)
    with pytest.raises(TypeError, match=r"expected a state of type .*State, got "):
        tx.update(GRADS, other, PARAMS)


@each_optimizer
@pytest.mark.parametrize("state", [None, (), 3, (None,) * 4], ids=repr)
def test_row_16_what_is_no_state(rule, state):
    with pytest.raises(TypeError, match="expected a state of type "):
        rule(weight_decay=0.0).update(GRADS, state, PARAMS)


@each_optimizer
def test_row_17_python_and_numpy_leaves(rule):
    params = {"scalar": 1.0, "array": np.ones(3, np.float32)}
    tx = rule()
    updates, _ = tx.update(
        {"scalar": 0.1, "array": np.full(3, 0.1, np.float32)}, tx.init(params), params
    )
    assert all(
        isinstance(x, jax.Array) and x.dtype == jnp.float32 for x in jax.tree.leaves(updates)
    )


@each_rule
def test_rows_18_and_19_none_leaves_and_empty_trees(rule):
    tx = rule()
    for params in ({"a": jnp.ones((3, 2)), "b": None}, {}, []):
        grads = jax.tree.map(lambda x: 0.1 * x, params)
        updates, _ = tx.update(grads, tx.init(params), params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)


@each_optimizer
def test_row_20_masks_and_axes_that_do_not_match(rule):
    with pytest.raises(ValueError, match=r"mask does not match the parameters: 'layer/gain' is no"):
        rule(mask={"layer": {"kernel": True, "bias": True, "gain": False}}).init(PARAMS)
    with pytest.raises(ValueError, match=r"mask does not match .*'layer/bias' is not covered"):
        rule(mask={"layer": {"kernel": True}}).init(PARAMS)
    if "dimension_numbers" in inspect.signature(rule.make).parameters:
        with pytest.raises(ValueError, match=r"dimension_numbers does not match .*'other'"):
            rule(dimension_numbers={"other": None}).init(PARAMS)


@pytest.mark.parametrize("make", [jaxopt_lab.adamp, jaxopt_lab.sgdp, jaxopt_lab.muon])
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (optax.contrib.MuonDimensionNumbers(0, 2), r"'layer/kernel' name the axes \(2,\)"),
        (optax.contrib.MuonDimensionNumbers(0, -2), "'layer/kernel' use an axis twice"),
        (optax.contrib.MuonDimensionNumbers((), 1), r"'layer/kernel' name the axes \(\)"),
        ("rows", "'layer/kernel' must be optax.contrib.MuonDimensionNumbers or None"),
    ],
)
def test_row_20_axes_that_a_parameter_does_not_have(make, numbers, message):
    with pytest.raises(ValueError, match=f"dimension_numbers of {message}"):
        make(0.1, dimension_numbers={"layer": {"kernel": numbers, "bias": None}}).init(PARAMS)


def test_row_21_labels():
    with pytest.raises(ValueError, match="slow"):
        optax.partition(
            {"fast": jaxopt_lab.lion(0.1)}, {"layer": {"kernel": "fast", "bias": "slow"}}
        ).init(PARAMS)


def test_row_22_a_leaf_that_no_matrix_rule_covers():
    with pytest.raises(ValueError, match=r"no matrix axes for 'layer/bias' of shape \(3,\)"):
        jaxopt_lab.scale_by_muon().init(PARAMS)


def test_too_many_coordinates_to_count():
    huge = [jax.ShapeDtypeStruct((2**31,), jnp.bfloat16)] * 2
    tx = jaxopt_lab.clip_coordinates(0.1)
    with pytest.raises(ValueError, match=r"below 2\*\*32 coordinates, got 4294967296"):
        jax.eval_shape(lambda g: tx.update(g, optax.EmptyState())[0], huge)


@each_rule
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nonfinite_gradients_propagate(rule, bad):
    tx = rule()
    grads = {"layer": {**GRADS["layer"], "bias": jnp.full(3, bad)}}
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS)
    assert bool(jnp.all(jnp.isfinite(updates["layer"]["kernel"])))
    if jnp.isnan(bad):
        assert not bool(jnp.any(jnp.isfinite(updates["layer"]["bias"])))


@each_rule
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_apply_if_finite_leaves_parameters_and_state_alone(rule, bad):
    tx = optax.apply_if_finite(rule(), max_consecutive_errors=3)
    update = jax.jit(tx.update)
    _, state = update(GRADS, tx.init(PARAMS), PARAMS)
    poisoned = {"layer": {**GRADS["layer"], "bias": jnp.full(3, bad)}}
    updates, after = update(poisoned, state, PARAMS)
    assert all(bool(jnp.all(u == 0)) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
