"""Recording gradient norms, and what a refined schedule does with them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import schedules, testing
from jaxopt_lab.schedules.refined import _EXPONENTS, _refined, _running_median, _usable
from tests.schedules.golden import table

GRADS = {"w": jnp.array([[3.0, -4.0], [0.0, 12.0]]), "b": jnp.array([-84.0])}
NORM = {"l1": 103.0, "l2": 85.0}


def record_norms(kind, length) -> Any:
    return schedules.record_norms(kind, length)


def refined(norms, kind: Any = "l2", smoothing=0.0):
    """The table alone, which needs no compiler; `test_parity` reads it through schedules."""
    return _refined(_usable(norms), _EXPONENTS[kind], smoothing)


def rates_of(norms, steps, kind: Any = "l2", smoothing=0.0):
    with jax.enable_x64(True):
        schedule = schedules.refined_schedule(norms, steps, 1.0, kind, smoothing)
        return table(schedule, steps, dtype=np.float64)


@pytest.mark.parametrize("kind", NORM)
def test_records_one_norm_over_all_leaves(kind):
    tx = record_norms(kind, 4)
    update = jax.jit(tx.update)
    state = tx.init(GRADS)
    assert state.norms.tolist() == [-1] * 4
    for count in range(3):
        grads = jax.tree.map(lambda g, factor=2.0**count: g * factor, GRADS)
        updates, state = update(grads, state)
        for given, passed in zip(jax.tree.leaves(grads), jax.tree.leaves(updates)):
            np.testing.assert_array_equal(given, passed)
    # The numbers are whole, the sums of squares below 2**24.
    np.testing.assert_allclose(state.norms, NORM[kind] * np.array([1, 2, 4, -1 / NORM[kind]]))
    assert state.count == 3


def test_a_full_buffer_keeps_what_it_has():
    tx = record_norms("l1", 3)

    def step(state, g):
        return tx.update(g, state)[1], None

    sizes = jnp.arange(1.0, 8.0)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, sizes))(tx.init(jnp.zeros(())))
    assert state.norms.tolist() == [1, 2, 3]
    assert state.count == 7


@pytest.mark.parametrize(("length", "expected"), [(1, [7]), (3, [7, 5, 6])])
def test_a_buffer_of_the_last_norms(length, expected):
    tx = schedules.record_norms("l1", length, keep="last")

    def step(state, g):
        return tx.update(g, state)[1], None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(1.0, 8.0)))(
        tx.init(jnp.zeros(()))
    )
    assert state.norms.tolist() == expected
    assert state.norms[(state.count - 1) % length] == 7


def test_a_log_of_rate_gradient_and_update():
    schedule = optax.linear_schedule(0.5, 0.0, 10)
    last = schedules.record_norms("l2", 1, keep="last")
    tx = optax.chain(last, optax.sgd(schedule), last)
    state, update = tx.init(GRADS), jax.jit(tx.update)
    for count in range(3):
        rate = schedules.current_learning_rate(state, schedule)  # of the update that comes
        assert float(rate) == pytest.approx(0.5 - 0.05 * count)
        _, state = update(GRADS, state)
        assert float(state[0].norms[0]) == pytest.approx(NORM["l2"], rel=1e-6)
        assert float(state[-1].norms[0]) == pytest.approx(float(rate) * NORM["l2"], rel=1e-6)


def test_replicas_record_their_own():
    tx = record_norms("l2", 2)
    state = jax.vmap(tx.init)(jnp.zeros((3, 2)))
    _, state = jax.vmap(tx.update)(jnp.array([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0]]), state)
    assert state.norms.tolist() == [[5, -1], [1, -1], [0, -1]]


@pytest.mark.parametrize("kind", NORM)
def test_norms_are_wide(kind):
    tx = record_norms(kind, 1)
    grads = jnp.full(4096, 1.0, jnp.bfloat16)  # a sum in bfloat16 would stop at 256
    updates, state = tx.update(grads, tx.init(grads))
    assert updates.dtype == jnp.bfloat16
    assert state.norms.dtype == jnp.float32
    assert state.norms[0] == {"l1": 4096, "l2": 64}[kind]
    for size in (1e30, 1e-30):  # whose squares are no numbers of float32
        _, state = tx.update(jnp.full(4, size), tx.init(jnp.zeros(4)))
        assert float(state.norms[0]) == pytest.approx(size * {"l1": 4, "l2": 2}[kind])
    with jax.enable_x64(True):
        assert tx.init(jnp.zeros(2, jnp.float64)).norms.dtype == jnp.float64


@pytest.mark.slow
def test_contract():
    # Gradients go through as they are.
    exceptions = {
        f"{dtype}_gradients_float32_weights": "gradients go through in their own dtype"
        for dtype in ("bfloat16", "float16")
    }
    testing.check_transform(schedules.record_norms, exceptions=exceptions, kind="l2", length=2)


def test_flat_norms_give_linear_decay():
    for kind in NORM:
        for smoothing in (0.0, 0.1, 1.0):
            found = refined(np.full(30, 7.0), kind, smoothing=smoothing)
            np.testing.assert_allclose(found, np.arange(29, -1, -1) / 29, atol=1e-15)


def test_the_weights_are_powers_of_the_norms():
    norms = np.array([2.0, 1.0, 4.0])
    # l2: w = 1/4, 1, 1/16; w times the later ones: 17/64, 4/64, 0.
    np.testing.assert_allclose(refined(norms, "l2"), [1, 4 / 17, 0], atol=1e-15)
    # l1: w = 1/2, 1, 1/4; 5/8, 2/8, 0.
    np.testing.assert_allclose(refined(norms, "l1"), [1, 2 / 5, 0], atol=1e-15)


@pytest.mark.parametrize("kind", NORM)
def test_properties(kind):
    rng = np.random.default_rng(0)
    norms = np.exp(rng.normal(size=200))
    rates = refined(norms, kind, smoothing=0.1)
    assert rates[-1] == 0
    assert rates.max() == 1
    assert (rates >= 0).all()
    for factor in (1e-200, 3.0, 1e200):
        np.testing.assert_allclose(refined(factor * norms, kind, smoothing=0.1), rates, rtol=1e-9)
    # Large norms at first ask for a warm-up.
    warm = refined(np.concatenate([np.linspace(10, 1, 20), np.ones(80)]), kind)
    assert (np.diff(warm[:20]) > 0).all()
    assert (np.diff(warm[20:]) < 0).all()


def test_another_length_interpolates():
    norms = np.linspace(5, 1, 11)
    rates = refined(norms)
    longer = rates_of(norms, 21)
    np.testing.assert_allclose(longer[::2], rates, atol=1e-15)
    np.testing.assert_allclose(longer[1::2], (rates[1:] + rates[:-1]) / 2, atol=1e-15)
    np.testing.assert_allclose(rates_of(norms, 6), rates[::2], atol=1e-15)
    np.testing.assert_allclose(rates_of(norms, 2), rates[[0, -1]], atol=1e-15)


def test_running_median_is_numpys():
    values = np.random.default_rng(1).normal(size=41).round(1)  # with ties
    for half in (0, 1, 4, 20):
        padded = np.pad(np.pad(values, (half, 0), "edge"), (0, half), "reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1)
        np.testing.assert_array_equal(_running_median(values, half), np.median(windows, axis=1))


def test_smoothing_removes_a_spike():
    norms = np.ones(100)
    norms[40] = 1e6
    assert refined(norms)[40] < 1e-9
    np.testing.assert_allclose(refined(norms, smoothing=0.05), np.arange(99, -1, -1) / 99, 1e-12)


def test_what_is_left_out():
    good = np.array([4.0, 3.0, 2.0, 1.0])
    messy = np.array([4.0, np.inf, 3.0, np.nan, 2.0, -np.inf, 1.0, -1.0, -1.0])
    np.testing.assert_array_equal(rates_of(messy, 4), refined(good))
    tx = record_norms("l1", 9)
    state = tx.init(jnp.zeros(()))
    for g in good:
        _, state = tx.update(jnp.asarray(g), state)
    np.testing.assert_array_equal(refined(state.norms), refined(good))


def test_zeros_are_floored():
    norms = np.array([1.0, 1.0, 0.0, 1.0, 1.0])
    rates = refined(norms, "l1")
    assert np.isfinite(rates).all()
    # A weight of 1e6 at index 2: its own product is 2e6, those before it (1e6 + 2) and + 3.
    np.testing.assert_allclose(rates, np.array([1e6 + 3, 1e6 + 2, 2e6, 1, 0]) / 2e6, rtol=1e-12)
    assert np.isfinite(refined(np.array([0.0, 0.0, 0.0, 2.0, 1.0]))).all()
    # The median would filter out all that is not zero.
    assert np.isfinite(refined(np.array([0.0] * 9 + [2.0]), smoothing=0.3)).all()


def test_end_to_end():
    """Norms of a run with a constant rate make the schedule of the next one."""

    def run(tx: Any) -> Any:
        def step(carry, _):
            params, state = carry
            u, state = tx.update(2 * params * jnp.array([1.0, 30.0]), state, params)
            return (optax.apply_updates(params, u), state), None

        params = jnp.ones(2)
        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), length=40)
        return params, state

    _, state = run(optax.chain(record_norms("l1", 40), optax.adam(0.05)))
    schedule = schedules.refined_schedule(state[0].norms, 40, 0.05, "l1")
    params, state = run(optax.adam(schedule))
    assert float(schedules.current_learning_rate(state, schedule)) == 0
    assert float(jnp.abs(params).max()) < 0.9


@pytest.mark.parametrize("keep", ["first", "last"])
def test_a_state_of_another_length_is_refused(keep):
    """Its places would be counted by the one length and its norms dropped by the other."""
    state = schedules.record_norms("l1", 8, keep=keep).init(jnp.ones(3))
    message = r"the state has room for 8 norms, but length is 4: it was made with another length"
    with pytest.raises(ValueError, match=message):
        schedules.record_norms("l1", 4, keep=keep).update(jnp.ones(3), state)
