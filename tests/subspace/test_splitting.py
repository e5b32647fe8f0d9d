"""What goes where: the two parts add up, and the ends of the density are the two rules."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from jaxopt_lab import quantization, subspace
from jaxopt_lab.subspace.projections import Leaf, Step
from tests.subspace.trees import (
    EXACT,
    PARAMS,
    PROJECTIONS,
    assert_close,
    assert_same,
    grads_at,
    states,
    trajectory,
)

quantized = functools.partial(jaxopt_lab.quantize_state, codec=quantization.bfloat16())
each_projection = pytest.mark.parametrize("name", PROJECTIONS)


@each_projection
def test_density_one_is_full_and_density_zero_is_free(name):
    adam: Any = optax.adamw(0.1, weight_decay=0.1)
    split: Any = subspace.frugal(adam, None, PROJECTIONS[name], 1.0, update_gap=2)
    assert_same(trajectory(split, 5)[0], trajectory(adam, 5)[0])
    split = subspace.frugal(adam, None, PROJECTIONS[name], 0.0, update_gap=2)
    signs = [jax.tree.map(jnp.sign, grads_at(step)) for step in range(5)]
    found, _ = trajectory(split, 5)
    for leaf in ("first", "second"):
        assert_same([u[leaf] for u in found], [u[leaf] for u in signs])
    # Adam on one leaf is compiled otherwise than on three, and rounds otherwise.
    assert_close([u["bias"] for u in found], [u["bias"] for u in trajectory(adam, 5)[0]], 1e-6)


@each_projection
def test_parts_add_up_to_the_gradient(name):
    projection = PROJECTIONS[name]
    grads = [x for x in jax.tree.leaves(grads_at(0)) if x.ndim == 2]
    leaves = _leaves(projection, 0.5)

    @jax.jit
    def split(grads):
        step = Step(jnp.int32(0), jnp.int32(0), 0)
        selection = projection.choose(leaves, projection.first(leaves), grads, step)
        compact = projection.project(leaves, selection, grads)
        restored = projection.restore(leaves, selection, compact)
        again = projection.project(leaves, selection, restored)
        rest = projection.remainder(leaves, selection, grads, compact)
        return compact, again, restored, rest, projection.project(leaves, selection, rest)

    compact, again, restored, rest, nothing = split(grads)
    total = [a + b for a, b in zip(restored, rest)]
    if name in EXACT:
        assert_same(total, grads)
        assert_same(again, compact)
        assert all(not np.any(x) for x in jax.tree.leaves(nothing))
    else:
        # Two products of a few float32 numbers of order one; eigenvectors are not exactly unit.
        assert_close(total, grads, 1e-6)
        assert_close(again, compact, 1e-5)
        assert_close(nothing, jax.tree.map(jnp.zeros_like, nothing), 1e-5)
    assert all(np.any(x) for x in [*restored, *compact] if name != "blocks")


def _leaves(projection: Any, density: float) -> list[Leaf]:
    tx = subspace.frugal(projection=projection, density=density)
    return [t.leaf for t in subspace.treatments(tx, PARAMS).parameters if t.kind == "split"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: optax.adamw(0.1, weight_decay=0.1),
        lambda: jaxopt_lab.lion(0.1, weight_decay=0.1),
        lambda: jaxopt_lab.muon(0.1),
        lambda: optax.sgd(0.1, momentum=0.9),
        lambda: quantized(optax.sgd(0.1, momentum=0.9), min_size=1),
    ],
    ids=["default", "adamw", "lion", "muon", "momentum", "quantized"],
)
def test_any_rule_sees_the_compact_arrays(make):
    """The rule on its own, given the rows that are always selected, makes the same of them."""
    choose = lambda name, count, grad: jnp.array([2, 0])  # noqa: E731
    always: Any = subspace.columns(choose=choose)
    rule: Any = make() if make() is not None else optax.scale_by_adam(0.9, 0.999, 1e-8)
    split = subspace.frugal(
        make(), optax.identity(), always, lambda size: 2, 50, always_full=("bias",)
    )
    found, _ = trajectory(split, 3)
    state = rule.init({"first": PARAMS["first"][jnp.array([2, 0])]})
    for step, updates in enumerate(found):
        g, w = grads_at(step)["first"], PARAMS["first"]
        rows = jnp.array([2, 0])
        expected, state = rule.update({"first": g[rows]}, state, {"first": w[rows]})
        # Stochastic rounding to bfloat16 draws by the position in the state.
        tolerance = 0.01 if "quantize_state" in str(rule) else 2e-5
        assert_close(updates["first"][rows], expected["first"], tolerance)
        assert_same(updates["first"][jnp.array([1, 3])], g[jnp.array([1, 3])])


def test_quantized_frugal_follows_frugal():
    plain = subspace.frugal(optax.sgd(0.1, momentum=0.9), density=0.5, update_gap=2)
    small = quantized(plain, min_size=1)
    assert jaxopt_lab.state_bytes(small, PARAMS).total < jaxopt_lab.state_bytes(plain, PARAMS).total
    for a, b in zip(trajectory(small, 4)[0], trajectory(plain, 4)[0]):
        assert_close(a, b, 0.02)


def test_scales_multiply_the_parts():
    options: Any = {"free": optax.identity(), "density": 0.5, "update_gap": 2}
    plain, _ = trajectory(subspace.frugal(**options), 3)
    free, _ = trajectory(subspace.frugal(free_scale=0.25, **options), 3)
    both, _ = trajectory(subspace.frugal(free_scale=0.25, projected_scale=0.5, **options), 3)
    for step in range(3):
        assert_same(both[step]["bias"], plain[step]["bias"])
        assert_same(both[step]["first"], 0.5 * free[step]["first"])
        rest = plain[step]["first"] == grads_at(step)["first"]
        assert np.sum(rest) == 16
        assert_same(free[step]["first"], jnp.where(rest, 0.25, 1) * plain[step]["first"])


def test_reset_puts_counters_back_and_leaves_what_is_full_alone():
    cases: Any = (("reset", [1, 2, 3, 1, 2]), ("keep", [1, 2, 3, 4, 5]))
    for rule, count in cases:
        tx = subspace.frugal(density=0.5, update_gap=3, on_refresh=rule)
        found = states(tx, 5)
        assert [int(s.selected[0].count) for s in found] == count
        assert [int(s.full.count) for s in found] == [1, 2, 3, 4, 5]
    tx = subspace.frugal(density=0.5, update_gap=3, on_refresh="reset_all")
    assert [int(s.full.count) for s in states(tx, 5)] == [1, 2, 3, 1, 2]


@pytest.mark.parametrize("name", PROJECTIONS)
def test_error_feedback_loses_nothing(name):
    # With gradient descent as the rule, what was applied and what is carried is what has come.
    projection = PROJECTIONS[name]
    tx = subspace.frugal(
        optax.identity(), None, projection, 0.5, 2, error_feedback=True, always_full=("bias",)
    )
    found, state = trajectory(tx, 5)
    for leaf in ("first", "second"):
        applied = sum(u[leaf] for u in found) + state.error[leaf]
        assert_close(applied, sum(grads_at(step)[leaf] for step in range(5)), 1e-5)
        assert np.any(state.error[leaf]) or name == "blocks"


@each_projection
def test_nan_in_one_leaf_stays_there(name):
    tx = subspace.frugal(None, None, PROJECTIONS[name], 0.5, update_gap=2)
    state = tx.init(PARAMS)
    update = jax.jit(tx.update)
    for step in range(3):
        grads = grads_at(step)
        if step:
            grads["first"] = grads["first"].at[1, 2].set(jnp.nan)
        updates, state = update(grads, state, PARAMS)
        assert np.all(np.isfinite(updates["second"]))
        assert np.all(np.isfinite(updates["bias"]))
        assert np.all(np.isfinite(updates["first"])) == (step == 0)


def test_floats_of_16_bits_keep_their_dtype():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    for name in PROJECTIONS:
        tx = subspace.frugal(None, None, PROJECTIONS[name], 0.5, 2)
        found, state = jax.eval_shape(lambda tx=tx: trajectory(tx, 2, params))
        assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.bfloat16)}
        assert {x.dtype for x in jax.tree.leaves(state.selected[0].mu)} == {jnp.dtype("bfloat16")}
