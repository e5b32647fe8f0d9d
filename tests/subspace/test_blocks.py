"""Blocks in turn: who is active when, what room the state has, and BAdam."""

from __future__ import annotations

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from jaxopt_lab import subspace
from tests.subspace.trees import assert_close, assert_same, parts_of, states


def layers(number: int, shape: tuple[int, ...] = (2, 3)) -> dict[str, jax.Array]:
    return {f"layer{i}": jnp.full(shape, 1.0 + i) for i in range(number)}


def active(tx: Any, params: Any, steps: int) -> list[set[str]]:
    return [
        {name for name, t in parts_of(state).items() if t.kind == "split" and t.selection}
        for state in states(tx, steps, params)
    ]


@pytest.mark.parametrize("order", ["descending", "ascending", "random"])
@pytest.mark.parametrize(("number", "kept"), [(6, 1), (6, 2), (7, 3)])
def test_every_block_has_its_turn_in_every_pass(order, number, kept):
    tx = subspace.frugal(projection=subspace.blocks(order), density=lambda size: kept, update_gap=1)
    # Queues have number / kept blocks, rounded up; the shorter ones come round earlier.
    length = -(-number // kept)
    found = active(tx, layers(number), 2 * length)
    assert all(len(names) == kept for names in found)
    for queue in range(kept):
        place = [number - 1 - i for i in range(number)] if order == "descending" else range(number)
        members = [f"layer{i}" for i in list(place)[queue::kept]]
        turns = [next(iter(names & set(members))) for names in found]
        for start in range(0, len(turns) - len(members) + 1, len(members)):
            assert Counter(turns[start : start + len(members)]) == Counter(members)
        if order != "random":
            assert turns == [members[i % len(members)] for i in range(len(turns))]


def test_random_orders_differ_between_passes_and_seeds():
    def turns(seed: int) -> list[set[str]]:
        tx = subspace.frugal(
            projection=subspace.blocks("random"), density=lambda size: 1, update_gap=1, seed=seed
        )
        return active(tx, layers(8), 16)

    found = turns(0)
    assert found == turns(0)
    assert found[:8] != found[8:]
    assert found != turns(1)


def test_numbers_in_names_count_by_value():
    tx = subspace.frugal(projection=subspace.blocks("ascending"), density=0.08, update_gap=1)
    assert active(tx, layers(12), 12) == [{f"layer{i}"} for i in range(12)]


def test_own_choice_of_the_active_blocks():
    tx = subspace.frugal(
        projection=subspace.blocks("ascending", choose=lambda count: jnp.array([2, 0])),
        density=lambda size: 2,
        update_gap=1,
    )
    assert active(tx, layers(6), 2) == [{"layer4", "layer1"}] * 2


def test_slots_have_room_for_one_layer():
    params = {f"blocks/{i}": {"up": jnp.ones((4, 8)), "bias": jnp.ones(8)} for i in range(5)}
    for kept in (1, 2):
        tx: Any = subspace.frugal(
            projection=subspace.blocks(group=subspace.by_layer),
            density=lambda size, kept=kept: kept,
            always_full=(),
        )
        slots = tx.init(params).selected[0].mu
        assert [sorted(x.shape for x in slot) for slot in slots] == [[(4, 8), (8,)]] * kept
    assert {t.leaf.size for t in subspace.treatments(tx, params).parameters} == {5}


def test_blocks_of_unequal_structure():
    params = {
        "a": {"x": jnp.ones((2, 2)), "y": jnp.ones((3, 3))},
        "b": {"x": jnp.ones((2, 2)), "z": jnp.ones((2, 2))},
        "c": {"w": jnp.ones((4, 2))},
    }
    tx: Any = subspace.frugal(
        optax.sgd(0.5, momentum=0.9),
        optax.set_to_zero(),
        subspace.blocks("ascending", lambda name: name.split("/")[0]),
        lambda size: 1,
        update_gap=2,
    )
    (slot,) = jax.tree.leaves(tx.init(params).selected[0], is_leaf=lambda x: isinstance(x, list))[0]
    assert sorted(x.shape for x in slot) == [(2, 2), (2, 2), (3, 3), (4, 2)]
    update, state = jax.jit(tx.update), tx.init(params)
    for turn in range(6):
        grads = jax.tree.map(lambda x, turn=turn: x * (1 + turn), params)
        updates, state = update(grads, state, params)
        for number, (name, group) in enumerate(updates.items()):
            # The second step on a block has 0.9 of the first gradient besides its own.
            size = 0.5 * (1 + turn + (0.9 * turn if turn % 2 else 0))
            expected = -size if turn // 2 == number else 0.0
            for x in jax.tree.leaves(group):
                np.testing.assert_allclose(x, expected, rtol=1e-6, err_msg=name)


def test_by_layer():
    assert [subspace.by_layer(name) for name in ("h/3/mlp/0/w", "h10/w", "w", "norm/s")] == [
        "h/3",
        "h10",
        "w",
        "norm",
    ]


def test_badam_moves_and_decays_the_active_block_only():
    params = {"embed": jnp.ones(3), **layers(3)}
    tx = jaxopt_lab.badam(0.1, update_gap=2, weight_decay=0.5, always_full=("embed",))
    update, state = jax.jit(tx.update), tx.init(params)
    for step in range(6):
        updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
        turn = f"layer{2 - step // 2}"
        for name, u in updates.items():
            # A gradient of zero leaves only the decay.
            expected = -0.05 * params[name] if name in ("embed", turn) else 0 * params[name]
            assert_close(u, expected, 1e-6)
        assert int(state[0].full.count) == int(state[0].selected[0].count) == step % 2 + 1


def test_badam_of_one_block_is_adamw_until_it_starts_again():
    params = {"a": jnp.ones((3, 2)), "b": jnp.ones(4)}
    tx = jaxopt_lab.badam(0.1, 3, weight_decay=0.1, group=lambda name: "all")
    adam = optax.adamw(0.1, weight_decay=0.1)
    state, adam_state = tx.init(params), adam.init(params)
    for step in range(6):
        grads = jax.tree.map(lambda x, step=step: jnp.sin(x + step), params)
        if step == 3:
            adam_state = adam.init(params)
        updates, state = tx.update(grads, state, params)
        expected, adam_state = adam.update(grads, adam_state, params)
        assert_close(updates, expected, 2e-5)  # optax corrects the bias in float32


def test_frozen_gradients_may_be_anything():
    params = layers(2)
    tx: Any = jaxopt_lab.badam(0.1)
    grads = {"layer0": jnp.full((2, 3), jnp.nan), "layer1": jnp.ones((2, 3))}
    updates, state = tx.update(grads, tx.init(params), params)
    assert_same(updates["layer0"], np.zeros((2, 3), np.float32))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((updates, state)))
