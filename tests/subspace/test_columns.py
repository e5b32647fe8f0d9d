"""Columns and entries: one's own choice, moments that move with it, and kernels that are stacks."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import subspace
from tests.subspace.trees import PARAMS, assert_close, assert_same, grads_at, selection, states

DENSE = optax.contrib.MuonDimensionNumbers(0, 1)
STACK = optax.contrib.MuonDimensionNumbers(1, 2)
ATTENTION = optax.contrib.MuonDimensionNumbers(0, (1, 2))


@pytest.mark.parametrize("axis", ["in", "out"])
def test_own_choice_of_the_columns_with_the_largest_norm(axis):
    seen = []

    def choose(name: str, count: jax.Array, grad: jax.Array) -> jax.Array:
        seen.append((name, count.dtype, grad.shape))
        norms = jnp.sum(jnp.square(grad), 1 if axis == "in" else 0)
        return jnp.argsort(-norms)[: len(norms) // 2]

    tx = subspace.frugal(projection=subspace.columns(axis, choose), density=0.5, update_gap=2)
    found = states(tx, 4)
    for name in ("first", "second"):
        for step in (0, 2):
            norms = np.sum(np.square(grads_at(step)[name]), 1 if axis == "in" else 0)
            expected = np.argsort(-norms)[: len(norms) // 2]
            assert_same(selection(found[step], name), expected)
            assert_same(selection(found[step + 1], name), expected)
    assert set(seen) == {(n, jnp.dtype("int32"), PARAMS[n].shape) for n in ("first", "second")}


CHOICES = [[3, 0, 1], [1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize("kind", ["in", "out", "entries"])
@pytest.mark.parametrize("rule", ["project", "keep", "reset"])
def test_what_becomes_of_the_moments(kind, rule):
    params = {"w": jnp.asarray(np.arange(1.0, 17).reshape(4, 4), jnp.float32)}
    choose = lambda name, count, grad: jnp.array(CHOICES)[count]  # noqa: E731
    make = subspace.entries if kind == "entries" else lambda c: subspace.columns(kind, c)
    tx: Any = subspace.frugal(
        optax.trace(0.5),
        optax.set_to_zero(),
        make(choose),
        lambda size: 3,
        update_gap=1,
        on_refresh=rule,
    )

    def select(x: np.ndarray, indices: Any) -> np.ndarray:
        if kind == "entries":
            return x.reshape(-1)[indices]
        return x[indices] if kind == "in" else x[:, indices]

    state = tx.init(params)
    momentum = np.zeros((4, 4))
    slots = np.zeros_like(select(momentum, CHOICES[0]))
    for step in range(3):
        grad = np.asarray(params["w"]) ** (step + 1)
        _, state = tx.update({"w": jnp.asarray(grad)}, state, params)
        new = select(grad, CHOICES[step])
        kept = np.zeros((4, 4))
        if rule == "project":
            # What leaves the selection is forgotten, what stays in it moves.
            slots = new + 0.5 * select(momentum, CHOICES[step])
            target = kept.reshape(-1) if kind == "entries" else kept if kind == "in" else kept.T
            target[CHOICES[step]] = slots.T if kind == "out" else slots
            momentum = kept
        else:
            slots = new + (0.5 * slots if rule == "keep" else 0)
        assert_same(np.asarray(state.selected[0].trace["w"]), slots.astype(np.float32))


def run(tx: Any, params: Any, grads: list[Any]) -> list[Any]:
    update, state, found = jax.jit(tx.update), tx.init(params), []
    for g in grads:
        updates, state = update(g, state, params)
        found.append(updates)
    return found


def choice_of(kind: str, kept: int, matrices: int = 0) -> Any:
    """The leading rows by norm, of one matrix or of each of a stack."""

    def one(grad: jax.Array) -> jax.Array:
        return jnp.argsort(-jnp.sum(jnp.square(grad), 1 if kind == "in" else 0))[:kept]

    def choose(name: str, count: jax.Array, grad: jax.Array) -> jax.Array:
        return jax.vmap(one)(grad) if matrices else one(grad)

    return choose


@pytest.mark.parametrize("name", ["in", "out", "svd", "gram", "both", "dct"])
@pytest.mark.parametrize("rule", ["reset", "project"])
def test_stack_is_its_matrices(name, rule):
    rng = np.random.default_rng(1)
    grads = [jnp.asarray(rng.standard_normal((3, 4, 5)), jnp.float32) for _ in range(5)]

    def projection(matrices: int) -> Any:
        if name in ("in", "out"):
            return subspace.columns(name, choice_of(name, 2, matrices))
        return {
            "svd": subspace.svd(),
            "gram": subspace.svd("larger", "gram"),
            "both": subspace.svd("both"),
            "dct": subspace.dct(),
        }[name]

    options: Any = {
        "full": optax.scale_by_adam(eps=1e-3),
        "density": lambda size: 2,
        "update_gap": 2,
        "on_refresh": rule,
    }
    stacked = subspace.frugal(projection=projection(3), dimension_numbers={"w": STACK}, **options)
    together = run(stacked, {"w": grads[0]}, [{"w": g} for g in grads])
    single = subspace.frugal(projection=projection(0), **options)
    for i in range(3):
        alone = run(single, {"w": grads[0][i]}, [{"w": g[i]} for g in grads])
        # Batched decompositions and products round differently.
        assert_close([u["w"][i] for u in together], [u["w"] for u in alone], 1e-4)


@pytest.mark.parametrize("kind", ["columns", "columns_out", "svd", "dct"])
def test_attention_kernel_is_its_matrix(kind):
    rng = np.random.default_rng(2)
    grads = [jnp.asarray(rng.standard_normal((6, 2, 4)), jnp.float32) for _ in range(4)]
    projection = {
        "columns": subspace.columns(),
        "columns_out": subspace.columns("out"),
        "svd": subspace.svd(),
        "dct": subspace.dct(),
    }[kind]
    options: Any = {"projection": projection, "density": 0.5, "update_gap": 2}
    kernel = run(
        subspace.frugal(dimension_numbers={"w": ATTENTION}, **options),
        {"w": grads[0]},
        [{"w": g} for g in grads],
    )
    flat = [{"w": g.reshape(6, 8)} for g in grads]
    matrix = run(subspace.frugal(**options), flat[0], flat)
    assert kernel[0]["w"].shape == (6, 2, 4)
    assert_close([u["w"].reshape(6, 8) for u in kernel], [u["w"] for u in matrix], 1e-5)


def test_each_matrix_of_a_stack_draws_for_itself():
    params = {"w": jnp.zeros((3, 16, 2))}
    tx = subspace.frugal(density=0.5, dimension_numbers={"w": STACK})
    drawn = selection(states(tx, 1, params)[0], "w")
    assert drawn.shape == (3, 8)
    assert len({tuple(row) for row in drawn}) == 3


def test_entries_serve_any_shape():
    params = {"conv": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(8), "scalar": jnp.ones(())}
    tx = subspace.frugal(projection=subspace.entries(), density=0.5, always_full=())
    assert [str(t) for t in subspace.treatments(tx, params).parameters] == [
        "bias (8,): split 4 of 8 (by request)",
        "conv (3, 3, 2, 4): split 36 of 72 (matrix, inputs 0 1 2, outputs 3)",
        "scalar (): whole (all 1 are kept)",
    ]
    updates, _ = tx.update(params, tx.init(params), params)
    assert_close(updates, params, 1e-5)  # Adam's first step and the sign are both 1
