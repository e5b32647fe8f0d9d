"""When selections are renewed, with what randomness, and what a step without one costs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import subspace
from tests.subspace.trees import PARAMS, PROJECTIONS, grads_at, parts_of, selection, states

COSTLY = {"svd", "eigh", "geqrf", "householder_product", "top_k", "sort", "random_bits"}


def changes(tx: Any, steps: int, params: Any = None) -> dict[str, list[int]]:
    """The steps, counted from 1, at which each leaf's selection changed."""
    found = states(tx, steps, params)
    before = [None, *found[:-1]]
    names = [name for name, t in parts_of(found[0]).items() if t.kind == "split"]
    return {
        name: [
            step
            for step, (old, new) in enumerate(zip(before, found), start=1)
            if old is None or not np.array_equal(selection(old, name), selection(new, name))
        ]
        for name in names
    }


@pytest.mark.parametrize("name", ["columns", "entries", "svd"])
def test_selection_is_renewed_every_gap(name):
    tx = subspace.frugal(projection=PROJECTIONS[name], density=0.5, update_gap=3, seed=3)
    for steps in changes(tx, 8).values():
        assert steps == [1, 4, 7]


def test_first_gap_and_the_gap_of_dct_adamw():
    tx = subspace.frugal(projection=subspace.svd(), density=0.5, update_gap=3, first_gap=2)
    assert changes(tx, 9)["first"] == [1, 3, 6, 9]


def test_stagger_spreads_the_refreshes():
    # Four equal matrices and a large one, which alone costs more than the others together.
    params = {name: jnp.zeros((4, 6)) for name in "abcd"} | {"large": jnp.zeros((16, 8))}
    options: Any = {"projection": subspace.svd(), "density": 0.5, "update_gap": 4}
    found = changes(subspace.frugal(stagger=2, **options), 10, params)
    assert found == {name: [1, 3, 7] for name in "abcd"} | {"large": [1, 5, 9]}
    equal = {name: params[name] for name in "abcd"}
    found = changes(subspace.frugal(stagger=4, **options), 9, equal)
    assert sorted(found.values()) == [[1, 2, 6], [1, 3, 7], [1, 4, 8], [1, 5, 9]]


def primitives(jaxpr: Any, inside_cond: bool = False) -> set[tuple[str, bool]]:
    found = set()
    for equation in jaxpr.eqns:
        found.add((equation.primitive.name, inside_cond))
        inner = inside_cond or equation.primitive.name == "cond"
        for value in equation.params.values():
            for part in value if isinstance(value, (list, tuple)) else [value]:
                part = getattr(part, "jaxpr", part)
                if hasattr(part, "eqns"):
                    found |= primitives(part, inner)
    return found


@pytest.mark.parametrize(
    ("projection", "names"),
    [
        (subspace.columns(), {"sort", "random_bits"}),
        (subspace.entries(), {"sort", "random_bits"}),
        (subspace.svd(), {"svd"}),
        (subspace.svd(method="gram"), {"eigh"}),
        (subspace.svd(method="randomized"), {"random_bits", "svd"}),
        (subspace.dct(), {"top_k"}),
    ],
    ids=["columns", "entries", "svd", "gram", "randomized", "dct"],
)
def test_selecting_is_inside_the_cond_only(projection, names):
    cases: Any = ((2, "reset"), (2, "project"), (1, "keep"))
    for gap, rule in cases:
        tx = subspace.frugal(projection=projection, density=0.5, update_gap=gap, on_refresh=rule)
        jaxpr = jax.make_jaxpr(tx.update)(grads_at(0), tx.init(PARAMS), PARAMS)
        found = primitives(jaxpr.jaxpr)
        assert ("cond", False) in found or gap == 1
        assert ("cond", False) not in found or gap > 1
        assert names <= {name for name, inside in found if inside == (gap > 1)}
        if gap > 1:
            assert not COSTLY & {name for name, inside in found if not inside}


@pytest.mark.parametrize("name", ["columns", "entries"])
def test_random_draws_differ_between_leaves_refreshes_and_seeds(name):
    params = {"a": jnp.zeros((12, 12)), "b": jnp.zeros((12, 12))}

    def drawn(seed: int) -> np.ndarray:
        tx = subspace.frugal(projection=PROJECTIONS[name], density=0.5, update_gap=1, seed=seed)
        return np.stack([[selection(s, "a"), selection(s, "b")] for s in states(tx, 2, params)])

    first, second = drawn(0), drawn(1)
    np.testing.assert_array_equal(first, drawn(0))
    draws = [*first.reshape(4, -1), *second.reshape(4, -1)]
    assert len({draw.tobytes() for draw in draws}) == 8
    for draw in draws:
        assert len(set(draw.tolist())) == len(draw)  # without replacement
        assert np.all(np.diff(draw) > 0)  # sorted
        assert 0 <= draw[0] <= draw[-1] < (144 if name == "entries" else 12)


def test_every_column_is_drawn_equally_often():
    params = {"a": jnp.zeros((8, 1))}
    tx: Any = subspace.frugal(density=0.25, update_gap=1)

    def step(state, _):
        _, state = tx.update(params, state, params)
        return state, state.treatments[0].selection

    _, drawn = jax.jit(lambda s: jax.lax.scan(step, s, length=400))(tx.init(params))
    counts = np.bincount(np.asarray(drawn).reshape(-1), minlength=8)
    # 100 each, with a standard deviation of 8.7.
    assert counts.min() > 60
    assert counts.max() < 140


def test_gap_may_be_an_array():
    tx = subspace.frugal(density=0.5, update_gap=jnp.int32(3), projection=subspace.svd())  # type: ignore[arg-type]
    assert changes(tx, 7)["first"] == [1, 4, 7]
