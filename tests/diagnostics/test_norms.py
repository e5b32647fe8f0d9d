"""The running log: what it measures, where it may stand, and how it is read."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import jaxopt_lab
from jaxopt_lab import testing
from jaxopt_lab.diagnostics import LogNormsState

SCHEDULE = optax.linear_schedule(1.0, 0.0, 10)
PARAMS = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
GRADS = jax.tree.map(lambda p: jnp.full(p.shape, 2.0), PARAMS)  # nine of them: a norm of 6


def logged(state: Any) -> list[float]:
    return [float(x) for x in jaxopt_lab.logged_norms(state)]


def after(tx: optax.GradientTransformation, steps: int = 1) -> Any:
    state = tx.init(PARAMS)
    for _ in range(steps):
        _, state = jax.jit(tx.update)(GRADS, state, PARAMS)
    return state


def test_rate_gradient_and_update_are_those_of_the_last_update():
    tx = jaxopt_lab.log_norms(optax.sgd(SCHEDULE), SCHEDULE)
    assert logged(tx.init(PARAMS)) == [-1, -1, -1]
    assert logged(after(tx)) == pytest.approx([1.0, 6.0, 6.0])
    assert logged(after(tx, 3)) == pytest.approx([0.8, 6.0, 4.8])
    assert jaxopt_lab.current_learning_rate(after(tx, 3), SCHEDULE) == SCHEDULE(3)


def test_where_it_stands_decides_what_it_sees():
    clip, rule = optax.clip_by_global_norm(1.0), optax.sgd(0.5)
    around = jaxopt_lab.log_norms(optax.chain(clip, rule), 0.5)
    behind = optax.chain(clip, jaxopt_lab.log_norms(rule, 0.5))
    assert logged(after(around)) == pytest.approx([0.5, 6.0, 0.5])
    assert logged(after(behind)) == pytest.approx([0.5, 1.0, 0.5])


def test_updates_and_inner_state_are_those_without_it():
    tx = optax.adamw(1e-2)
    found, state = jaxopt_lab.log_norms(tx).update(
        GRADS, jaxopt_lab.log_norms(tx).init(PARAMS), PARAMS
    )
    expected = tx.update(GRADS, tx.init(PARAMS), PARAMS)
    jax.tree.map(np.testing.assert_array_equal, (found, state.inner), expected)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("inner", "rate"),
    [
        (optax.inject_hyperparams(optax.sgd)(SCHEDULE), 0.9),
        (optax.sgd(SCHEDULE), -1),
        (jaxopt_lab.hypergradient(optax.identity(), 0.25, 0.0, "additive"), 0.25),
    ],
)
def test_a_rate_that_is_not_given_is_the_one_in_the_state(inner: Any, rate: float):
    found = logged(after(jaxopt_lab.log_norms(inner), 2))
    assert found[0] == pytest.approx(rate)


def test_several_rates_in_the_state_want_a_choice():
    one = optax.inject_hyperparams(optax.sgd)(0.1)
    with pytest.raises(ValueError, match="2 fields learning_rate: give log_norms the one"):
        jaxopt_lab.log_norms(optax.chain(one, one)).init(PARAMS)
    chosen = jaxopt_lab.log_norms(optax.chain(one, one), 0.1)
    assert logged(after(chosen))[0] == pytest.approx(0.1)


def test_extra_arguments_are_handed_on():
    tx = jaxopt_lab.log_norms(optax.contrib.reduce_on_plateau(patience=1))
    state = tx.init(PARAMS)
    for _ in range(3):
        updates, state = tx.update(GRADS, state, PARAMS, value=jnp.float32(1.0))
    assert float(updates["bias"][0]) < 2  # type: ignore[index]


def test_in_a_scan_each_step_can_be_kept():
    tx = optax.chain(jaxopt_lab.log_norms(optax.adam(SCHEDULE), SCHEDULE))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)
        return (optax.apply_updates(params, updates), state), jaxopt_lab.logged_norms(state)

    (_, _), kept = jax.jit(lambda: jax.lax.scan(step, (PARAMS, tx.init(PARAMS)), length=4))()
    np.testing.assert_allclose(kept.learning_rate, [1, 0.9, 0.8, 0.7], rtol=1e-6)
    assert kept.gradient_norm.shape == kept.update_norm.shape == (4,)
    assert np.isfinite(kept.update_norm).all()


def test_an_nnx_optimizer_is_read_as_any():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    tx = jaxopt_lab.log_norms(optax.adam(SCHEDULE), SCHEDULE)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: (m(jnp.ones((4, 2))) ** 2).sum())(model)
        optimizer.update(model, grads)
        return optax.tree.norm(nnx.as_pure(grads))

    for _ in range(2):
        norm = step(model, optimizer)
    rate, gradient, update = logged(optimizer.opt_state)
    assert rate == pytest.approx(0.9)
    assert gradient == pytest.approx(float(norm), rel=1e-6)  # another order of the same sum
    assert update > 0


@pytest.mark.parametrize("where", ["params", "gradients"])
def test_in_shard_map_each_device_has_its_own(where: str):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = jaxopt_lab.log_norms(optax.sgd(0.5), 0.5)

    def run(own):
        # The norms vary over devices as soon as the weights or the gradients do.
        params = own if where == "params" else jax.lax.pcast(jnp.zeros(2), ("d",), to="varying")

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(own, state, params)
            return (optax.apply_updates(params, updates), state), None

        (_, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=2)
        return jaxopt_lab.logged_norms(state).gradient_norm[None]

    spread = jax.shard_map(
        run, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d")
    )
    found = jax.jit(spread)(jnp.arange(8.0))
    expected = np.linalg.norm(np.arange(8.0).reshape(4, 2), axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_mapped_states_have_a_norm_each():
    tx = jaxopt_lab.log_norms(optax.sgd(1.0))
    state = jax.vmap(tx.init)(jnp.zeros((3, 2)))
    _, state = jax.vmap(tx.update)(jnp.array([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]]), state)
    assert jaxopt_lab.logged_norms(state).gradient_norm.tolist() == [5, 1, 0]


def test_norms_of_narrow_gradients_are_wide():
    tx = jaxopt_lab.log_norms(optax.identity())
    grads = jnp.full(4096, 1.0, jnp.bfloat16)  # a sum in bfloat16 would stop at 256
    updates, state = tx.update(grads, tx.init(grads))
    assert updates.dtype == jnp.bfloat16  # type: ignore[union-attr]
    assert logged(state)[1:] == [64, 64]
    _, state = tx.update(jnp.full(4, 1e30), tx.init(jnp.zeros(4)))  # whose square is infinite
    assert logged(state)[1] == pytest.approx(2e30)
    with jax.enable_x64(True):
        state: Any = tx.init(jnp.zeros(2, jnp.float64))
        assert jaxopt_lab.logged_norms(state).gradient_norm.dtype == jnp.float64


def test_a_nan_shows():
    tx = jaxopt_lab.log_norms(optax.sgd(1.0))
    _, state = tx.update(jnp.array([jnp.nan, 1.0]), tx.init(jnp.zeros(2)))
    assert np.isnan(logged(state)[1:]).all()


def test_what_cannot_be_read_is_named():
    tx = jaxopt_lab.log_norms(optax.sgd(0.1))
    with pytest.raises(ValueError, match="opt_state has no state of log_norms: is the optimizer"):
        jaxopt_lab.logged_norms(optax.sgd(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="opt_state has 2 states of log_norms; pass the part"):
        jaxopt_lab.logged_norms(optax.chain(tx, tx).init(PARAMS))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((optax.sgd,), "inner must be an optax.GradientTransformation, got .*call it first"),
        ((optax.sgd(0.1), "0.1"), "learning_rate must be a number"),
    ],
)
def test_wrong_arguments_are_named(arguments: tuple, message: str):
    with pytest.raises(TypeError, match=message):
        jaxopt_lab.log_norms(*arguments)


def test_a_state_of_another_is_refused():
    tx = jaxopt_lab.log_norms(optax.sgd(0.1))
    with pytest.raises(TypeError, match=LogNormsState.__name__):
        tx.update(GRADS, optax.sgd(0.1).init(PARAMS), PARAMS)


@pytest.mark.slow
def test_contract():
    report = testing.check_transform(
        lambda learning_rate: jaxopt_lab.log_norms(jaxopt_lab.lion(learning_rate), learning_rate),
        1e-2,
        raise_on_failure=False,
    )
    assert report.ok, str(report)
