"""Tables of schedules, and the current rate in states of many shapes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxopt_lab
from jaxopt_lab import schedules

SCHEDULE = optax.linear_schedule(1.0, 0.0, 10)
PARAMS = {"w": jnp.zeros(2), "count": jnp.zeros(3)}  # a parameter may be called count
# Groups of `optax.partition`, each with a count of its own; the second counts every other update.
EVERY_OTHER = optax.MultiSteps(optax.adam(SCHEDULE), 2).gradient_transformation()
GROUPS: dict[Any, Any] = {"one": optax.sgd(SCHEDULE), "two": EVERY_OTHER}

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
    with pytest.raises(ValueError, match="2 counts that could be meant") as error:
        schedules.current_learning_rate(state, SCHEDULE)
    # The paths lead to the counts, which are shown beside them.
    paths = re.findall(r"(opt_state\S*) \((\d)\)", str(error.value))
    assert [int(count) for _, count in paths] == [3, 1]
    for path, count in paths:
        assert int(eval(path, {"opt_state": state})) == int(count)
    part = state.inner_states["two"]
    assert float(schedules.current_learning_rate(part, SCHEDULE)) == pytest.approx(0.9)
    traced = jax.jit(lambda state: schedules.current_learning_rate(state, SCHEDULE))(state)
    assert np.isnan(traced)


def test_counts_of_replicas_of_groups():
    tx = optax.partition({**GROUPS, "two": optax.adam(SCHEDULE)}, {"w": "one", "count": "two"})
    state = jax.vmap(tx.init)(jax.tree.map(lambda x: jnp.stack([x, x]), PARAMS))
    for read in (
        schedules.current_learning_rate,
        jax.jit(schedules.current_learning_rate, static_argnums=1),
    ):
        assert read(state, SCHEDULE).tolist() == [1, 1]


# A hidden kernel, a bias and a norm, enough for every rule to treat leaves in its own ways.
MODEL = {
    f"layer_{i}": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6), "scale": jnp.ones(8)}
    for i in range(2)
}
READY_MADE: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adabelief": lambda: jaxopt_lab.adabelief(SCHEDULE, weight_decay=0.1),
    "adamp": lambda: jaxopt_lab.adamp(SCHEDULE, weight_decay=0.1),
    "badam": lambda: jaxopt_lab.badam(SCHEDULE, update_gap=2),
    "dct_adamw": lambda: jaxopt_lab.dct_adamw(SCHEDULE, 2, weight_decay=0.1),
    "diffgrad": lambda: jaxopt_lab.diffgrad(SCHEDULE, weight_decay=0.1),
    "exadam": lambda: jaxopt_lab.exadam(SCHEDULE),
    "frugal_adamw": lambda: jaxopt_lab.frugal_adamw(
        SCHEDULE, density=0.5, update_gap=2, weight_decay=0.1
    ),
    "galore_adamw": lambda: jaxopt_lab.galore_adamw(SCHEDULE, 2, weight_decay=0.1),
    "lion": lambda: jaxopt_lab.lion(SCHEDULE, weight_decay=0.1),
    "lora_plus": lambda: jaxopt_lab.lora_plus(optax.adamw, SCHEDULE, ratio=4),
    "muon": lambda: jaxopt_lab.muon(SCHEDULE, weight_decay=0.1),
    "sgdp": lambda: jaxopt_lab.sgdp(SCHEDULE, momentum=0.9),
    "int8": lambda: jaxopt_lab.quantize_state(
        jaxopt_lab.muon(SCHEDULE), jaxopt_lab.quantization.int8()
    ),
    "bfloat16": lambda: jaxopt_lab.quantize_state(
        optax.adamw(SCHEDULE), jaxopt_lab.quantization.bfloat16()
    ),
    "injected": lambda: optax.inject_hyperparams(jaxopt_lab.adamp)(learning_rate=SCHEDULE),
    "injected-muon": lambda: optax.inject_hyperparams(jaxopt_lab.muon)(learning_rate=SCHEDULE),
    "every-update": lambda: optax.MultiSteps(
        jaxopt_lab.muon(SCHEDULE), every_k_schedule=1
    ).gradient_transformation(),
    "logged": lambda: optax.chain(
        schedules.record_norms("l2", 1, keep="last"),
        jaxopt_lab.muon(SCHEDULE),
        schedules.record_norms("l2", 1, keep="last"),
    ),
}


@pytest.mark.parametrize("name", READY_MADE)
def test_reads_the_rate_of_every_rule(name):
    tx = READY_MADE[name]()
    state = tx.init(MODEL)
    for _ in range(3):
        _, state = tx.update(MODEL, state, MODEL)
    rate: jax.Array = schedules.current_learning_rate(state, SCHEDULE)
    assert float(rate) == pytest.approx(0.7)
    traced = jax.jit(lambda state: schedules.current_learning_rate(state, SCHEDULE))(state)
    assert float(traced) == pytest.approx(0.7)


# Joined ones compare the count with a boundary.
JOINED = optax.warmup_cosine_decay_schedule(0.0, 1.0, 4, 12)


class Model(nnx.Module):
    def __init__(self) -> None:
        self.hidden = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        self.norm = nnx.LayerNorm(6, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("schedule", [SCHEDULE, JOINED, schedules.wsd_schedule(1.0, 4, 2, 6)])
@pytest.mark.parametrize("rule", [jaxopt_lab.adabelief, jaxopt_lab.muon, optax.adamw])
def test_reads_the_state_that_flax_holds(rule, schedule):
    model = Model()
    optimizer = nnx.Optimizer(model, rule(schedule), wrt=nnx.Param)
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    assert schedules.current_learning_rate(optimizer.opt_state, schedule) == schedule(0)
    for _ in range(2):
        optimizer.update(model, grads)
    found = schedules.current_learning_rate(optimizer.opt_state, schedule)
    assert float(found) == pytest.approx(float(schedule(2)))
    assert schedules.current_learning_rate(nnx.as_pure(optimizer.opt_state), schedule) == found
    inside = nnx.jit(lambda o: schedules.current_learning_rate(o.opt_state, schedule))(optimizer)
    assert float(inside) == pytest.approx(float(found))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.int64])
def test_a_restored_count_of_any_type(dtype):
    """What is restored may be an array of NumPy, of a type that wraps below a boundary."""
    state = jax.tree.map(np.asarray, after(optax.adam(JOINED)))
    state = optax.tree.set(state, count=dtype(3))
    assert schedules.current_learning_rate(state, JOINED) == JOINED(3)


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
