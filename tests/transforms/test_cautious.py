"""The cautious mask beside a float64 program, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from tests.oracles import cautious as oracle
from tests.oracles import regimes

RATE, DECAY = 0.1, 0.05
STREAMS = {
    f"{regime}{'x'.join(map(str, shape))}": regimes.gradients(regime, shape)
    for regime in ("wide_range", "large_weights", "zeros_first")
    for shape in regimes.SHAPES
}


def chain(rule: Any) -> optax.GradientTransformation:
    return optax.chain(
        jaxopt_lab.cautious(rule),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(RATE),
    )


def masked(u: Any, g: Any) -> Any:
    """The mask alone, on a direction that is given."""
    make: Any = optax.GradientTransformation
    given = make(lambda _: (), lambda updates, state, params=None: (u, ()))
    return jaxopt_lab.cautious(given).update(g, ())[0]


@pytest.mark.parametrize(
    ("rule", "program"),
    [
        (jaxopt_lab.scale_by_lion, oracle.lion_trajectory),
        (optax.scale_by_adam, oracle.adam_trajectory),
    ],
)
def test_float64_equals_the_oracle(rule, program):
    with jax.enable_x64(True):
        tx = chain(rule())
        params: Any = {name: jnp.asarray(param) for name, (param, _) in STREAMS.items()}
        state, update = tx.init(params), jax.jit(tx.update)
        right = {
            name: program(*stream, learning_rate=RATE, weight_decay=DECAY)
            for name, stream in STREAMS.items()
        }
        for t in range(10):
            grads = {name: jnp.asarray(grads[t]) for name, (_, grads) in STREAMS.items()}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            for name, found in params.items():
                # Double precision in another order; optax's bias correction is 1 - b**t.
                np.testing.assert_allclose(found, right[name][t], rtol=1e-10, atol=1e-10)


def test_a_leaf_is_scaled_by_its_own_share_of_agreement():
    u = {"a": jnp.array([1.0, -2.0, 3.0, 4.0]), "b": jnp.array([1.0, 1.0])}
    g = {"a": jnp.array([1.0, 1.0, -1.0, 0.0]), "b": jnp.array([2.0, 3.0])}
    found = masked(u, g)
    np.testing.assert_array_equal(found["a"], [4.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(found["b"], [1.0, 1.0])


def test_no_agreement_gives_no_step_and_little_agreement_a_bounded_one():
    g = jnp.ones(4000).at[0].set(-1.0)
    np.testing.assert_array_equal(masked(-jnp.ones(4000), jnp.ones(4000)), jnp.zeros(4000))
    # One of 4000 would be scaled by 4000; the bound is 1000.
    found = masked(-jnp.ones(4000), g)
    np.testing.assert_allclose(found[0], -1000.0, rtol=1e-6)
    assert not bool(jnp.any(found[1:]))


def test_products_below_the_smallest_number_still_agree():
    small = jnp.full(2, 1e-30)
    np.testing.assert_array_equal(masked(small, small), small)


def test_nan_and_infinity_are_not_swallowed():
    found = masked(jnp.array([jnp.nan, 1.0]), jnp.array([jnp.nan, 1.0]))
    assert jnp.isnan(found[0])
    assert not bool(jnp.isfinite(masked(jnp.array([jnp.inf]), jnp.ones(1))[0]))


def test_state_and_extra_arguments_are_those_of_the_rule():
    rule: Any = jaxopt_lab.scale_by_lion()
    params, grads = {"w": jnp.ones((3, 2)), "empty": jnp.ones((0, 2))}, {}
    grads = jax.tree.map(lambda p: 0.5 * p, params)
    tx = jaxopt_lab.cautious(rule)
    _, state = tx.update(grads, tx.init(params), params, value=1.0)
    _, expected = rule.update(grads, rule.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert type(state) is jaxopt_lab.ScaleByLionState


def test_narrow_gradients_of_wide_weights_have_wide_updates():
    tx: Any = jaxopt_lab.cautious(jaxopt_lab.scale_by_lion())
    params = jnp.ones(4)
    updates, _ = tx.update(jnp.ones(4, jnp.bfloat16), tx.init(params), params)
    assert updates.dtype == jnp.float32


def test_a_factory_that_was_not_called_is_refused():
    with pytest.raises(TypeError, match=r"inner must be .*call it first, as in scale_by_lion\("):
        jaxopt_lab.cautious(jaxopt_lab.scale_by_lion)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "inner",
    [
        optax.sgd(0.1),
        optax.adamw(1e-3),
        jaxopt_lab.lion(1e-4),
        jaxopt_lab.muon(0.02),
        optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    ],
)
def test_a_whole_optimizer_is_refused(inner):
    tx = jaxopt_lab.cautious(inner)
    params = {"kernel": jnp.ones((2, 3))}
    for init in (tx.init, jax.jit(tx.init), lambda p: jax.eval_shape(tx.init, p)):
        with pytest.raises(ValueError, match="give it the bare rule"):
            init(params)


@pytest.mark.parametrize(
    "rule", [jaxopt_lab.scale_by_muon(), optax.add_noise(9.0, 0.5, 0), optax.identity()]
)
def test_a_rule_that_goes_along_the_gradient_is_not_refused(rule):
    tx, params = jaxopt_lab.cautious(rule), {"kernel": jnp.ones((2, 3))}
    assert jax.tree.structure(jax.jit(tx.init)(params)) == jax.tree.structure(rule.init(params))
