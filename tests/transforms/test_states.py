"""The state's tree and the schedules in it; extra arguments; leaves without elements; settings."""

from __future__ import annotations

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from tests.transforms.rules import OPTIMIZERS, RULES

OURS = [r for r in OPTIMIZERS if r.make.__module__.startswith("jaxopt_lab.transforms.")]
PARAMS = {"kernel": jnp.linspace(-1, 1, 12).reshape(4, 3), "bias": jnp.ones(3)}
GRADS = jax.tree.map(lambda x: 0.1 * x + 0.01, PARAMS)
DECAY = optax.linear_schedule(0.5, 0.0, 5)

each_optimizer = pytest.mark.parametrize("rule", OURS, ids=str)


def trajectory(tx: Any, steps: int = 3) -> Any:
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(found: Any, expected: Any) -> None:
    # Programs that differ in what is a constant: some roundings of float32.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=5e-6, atol=1e-7), found, expected
    )


@pytest.mark.parametrize("rule", OPTIMIZERS, ids=str)
def test_ready_made_rules_take_and_ignore_extra_arguments(rule):
    tx = rule()
    plain, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    found, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, value=1.0, grad_norm=jnp.ones(()))
    jax.tree.map(np.testing.assert_array_equal, found, plain)


@each_optimizer
def test_one_tree_of_the_state_for_all_numbers(rule):
    def injected() -> Any:
        tx: Any = optax.inject_hyperparams(rule.make)(**rule.arguments)
        return tx.init(PARAMS).inner_state

    trees = {
        jax.tree.structure(state)
        for state in (
            rule(weight_decay=0.0).init(PARAMS),
            rule(weight_decay=0.1).init(PARAMS),
            rule(weight_decay=0.1, learning_rate=0.0).init(PARAMS),
            injected(),
        )
    }
    assert len(trees) == 1


@pytest.mark.parametrize("make", [jaxopt_lab.adabelief, jaxopt_lab.muon, jaxopt_lab.diffgrad])
def test_no_parameters_are_needed_if_the_decay_is_the_number_zero(make):
    tx = make(0.1)
    found, _ = tx.update(GRADS, tx.init(PARAMS))
    assert_close(found, tx.update(GRADS, tx.init(PARAMS), PARAMS)[0])


@each_optimizer
def test_injected_hyperparameters_are_the_plain_ones(rule):
    assert_close(
        trajectory(optax.inject_hyperparams(rule.make)(**rule.arguments)), trajectory(rule())
    )


@each_optimizer
def test_a_schedule_of_the_decay_is_followed(rule):
    names = [n for n in inspect.signature(rule.make).parameters if n.endswith("weight_decay")]
    scheduled = rule(**dict.fromkeys(names, DECAY))
    params, states = PARAMS, [rule(**dict.fromkeys(names, 0.1)).init(PARAMS)]
    for t in range(3):
        # The rule at the decay of this step, with the state of the steps before.
        tx = rule(**dict.fromkeys(names, float(np.asarray(DECAY(t)))))
        updates, state = tx.update(GRADS, states[-1], params)
        states.append(state)
        params = optax.apply_updates(params, updates)
    assert_close(trajectory(scheduled), params)


def test_the_count_of_a_decay_is_kept_only_for_a_schedule():
    def integers(decay: Any) -> int:
        state = jaxopt_lab.sgdp(0.1, weight_decay=decay).init(PARAMS)
        return sum(jnp.issubdtype(x.dtype, jnp.integer) for x in jax.tree.leaves(state))

    assert (integers(0.1), integers(DECAY)) == (0, 1)


@pytest.mark.parametrize("rule", [r for r in RULES if "subspace" not in r.make.__module__], ids=str)
def test_leaves_without_elements(rule):
    shapes = [(0, 3), (3, 0), (0,), (3, 3, 0, 5), (3, 3, 5, 0), (0, 3, 5, 2), (0, 0)]
    params = {"kernel": jnp.ones((4, 3)), "empty": [jnp.ones(shape) for shape in shapes]}
    tx = rule()
    updates, _ = tx.update(params, tx.init(params), params)
    assert [u.shape for u in updates["empty"]] == shapes
    alone, _ = tx.update(
        {"kernel": params["kernel"]},
        tx.init({"kernel": params["kernel"]}),
        {"kernel": params["kernel"]},
    )
    np.testing.assert_allclose(updates["kernel"], alone["kernel"], rtol=1e-6)


EDGES = [
    lambda: jaxopt_lab.adabelief(0.1, rectify=True, b2=0.5),
    lambda: jaxopt_lab.adabelief(0.1, rectify=True, b1=0.0, b2=0.0, amsgrad=True),
    lambda: jaxopt_lab.adamp(0.1, b1=0.0, b2=0.0, weight_decay=0.1),
    lambda: jaxopt_lab.sgdp(0.1, weight_decay=0.1),
    lambda: jaxopt_lab.exadam(0.1, b1=0.0, b2=0.0),
    lambda: jaxopt_lab.diffgrad(0.1, b1=0.0, b2=0.0),
    lambda: jaxopt_lab.lion(0.1, b1=0.0, b2=0.0),
    lambda: jaxopt_lab.muon(0.1, adam_b1=0.0, adam_b2=0.0),
    lambda: jaxopt_lab.clip_coordinates(0.25),
    lambda: jaxopt_lab.cautious(jaxopt_lab.scale_by_lion()),
]


@pytest.mark.parametrize("make", EDGES)
def test_no_operation_makes_nan_or_infinity_of_finite_input(make):
    # Without jit each operation is looked at, in branches that are not taken as well.
    tx = make()
    with jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True):
        params, state = PARAMS, tx.init(PARAMS)
        for factor in (1.0, 0.0, 1e-30):
            grads = jax.tree.map(lambda g, factor=factor: factor * g, GRADS)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)


@each_optimizer
def test_equal_leaves_are_traced_once(rule):
    def length(leaves: int) -> int:
        params = {f"{i}": dict(PARAMS) for i in range(leaves)}
        lowered = jax.jit(rule().update).lower(params, rule().init(params), params)
        return len(re.findall(r"\n", lowered.as_text()))

    # A call or two a leaf for each link, an operand and a result, and for matrices a slice; the
    # dozens of operations of a rule stand there once.
    assert (length(24) - length(4)) / 40 < 16
