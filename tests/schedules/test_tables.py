"""Tables of schedules, and the current rate in states of many shapes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from jaxopt_lab import schedules

SCHEDULE = optax.linear_schedule(1.0, 0.0, 10)
PARAMS = {"w": jnp.zeros(2), "count": jnp.zeros(3)}  # a parameter may be called count
# Groups of `optax.partition`, each with a count of its own.
GROUPS: dict[Any, Any] = {"one": optax.sgd(SCHEDULE), "two": optax.adam(SCHEDULE)}

OPTIMIZERS = {
    "sgd": optax.sgd(SCHEDULE, momentum=0.9),
    "adamw": optax.adamw(SCHEDULE),
    "chain": optax.chain(optax.clip(1.0), optax.chain(optax.adam(SCHEDULE), optax.identity())),
    "masked": optax.masked(optax.adam(SCHEDULE), {"w": True, "count": False}),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=SCHEDULE),
    "if_finite": optax.apply_if_finite(optax.adam(SCHEDULE), 3),
    "ours": jaxopt_lab.lion(SCHEDULE),
    "ours-in-chain": optax.chain(schedules.record_norms("l1", 4), jaxopt_lab.adamp(SCHEDULE)),
    "only-adam": optax.scale_by_adam(),
}


def after(tx: Any, updates: int = 3) -> Any:
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for _ in range(updates):
        _, state = update(grads, state, PARAMS)
    return state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_finds_the_count(name):
    tx = OPTIMIZERS[name]
    assert float(schedules.current_learning_rate(after(tx, 0), SCHEDULE)) == 1
    rate = jax.jit(lambda state: schedules.current_learning_rate(state, SCHEDULE))(after(tx))
    assert float(rate) == pytest.approx(0.7)


def test_counts_of_replicas():
    state = jax.vmap(OPTIMIZERS["sgd"].init)(jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS))
    assert schedules.current_learning_rate(state, SCHEDULE).tolist() == [1, 1]


def test_no_count():
    with pytest.raises(ValueError, match="opt_state has no count"):
        schedules.current_learning_rate(optax.sgd(0.1).init(PARAMS), SCHEDULE)
    with pytest.raises(ValueError, match="opt_state has no count"):
        schedules.current_learning_rate(optax.trace(0.9).init(PARAMS), SCHEDULE)


def test_ambiguous_counts():
    tx = optax.partition(GROUPS, {"w": "one", "count": "two"})
    state = after(tx)
    with pytest.raises(ValueError, match=r"2 counts that could be meant: .*'one'.*'two'"):
        schedules.current_learning_rate(state, SCHEDULE)
    part = state.inner_states["two"]
    assert float(schedules.current_learning_rate(part, SCHEDULE)) == pytest.approx(0.7)


def test_table():
    table = schedules.as_table(SCHEDULE, 4)
    assert isinstance(table, np.ndarray)
    np.testing.assert_allclose(table, [1.0, 0.9, 0.8, 0.7], rtol=1e-6)
    np.testing.assert_allclose(schedules.as_table(SCHEDULE, [2, 0, 4.5]), [0.8, 1.0, 0.55])
    assert schedules.as_table(SCHEDULE, 0).shape == (0,)
    assert schedules.as_table(optax.constant_schedule(0.5), 3).tolist() == [0.5] * 3


def test_bad_tables():
    with pytest.raises(ValueError, match="steps must be at least 0, got -1"):
        schedules.as_table(SCHEDULE, -1)
    with pytest.raises(TypeError, match=r"steps must be an integer, got 2\.5"):
        schedules.as_table(SCHEDULE, 2.5)
    with pytest.raises(ValueError, match=r"shape \(n,\), got \(2, 2\)"):
        schedules.as_table(SCHEDULE, np.zeros((2, 2)))
    with pytest.raises(TypeError, match="schedule must be a function of the step, got float"):
        schedules.as_table(0.1, 3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"must return a scalar, got shape \(2,\)"):
        schedules.as_table(lambda step: jnp.stack([step, step]), 3)
