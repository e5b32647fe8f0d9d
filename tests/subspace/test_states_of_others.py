"""A state that was made with other arguments is refused by name, never used."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx, serialization

import jaxopt_lab
from jaxopt_lab import subspace

PARAMS = {
    "bias": jnp.ones(6),
    **{f"layer{i}": jnp.full((8, 6), 1.0 + i) for i in range(4)},
    "square": jnp.eye(8),
}
GRADS = jax.tree.map(lambda x: 0.1 * x, PARAMS)


def out_in(params: Any) -> Any:
    numbers = optax.contrib.MuonDimensionNumbers(1, 0)
    return jax.tree.map(lambda x: numbers if jnp.ndim(x) == 2 else None, params)


def frugal(*args: Any, **options: Any) -> Any:
    return subspace.frugal(*args, **{"density": 0.25, **options})


MADE: dict[str, Any] = {
    "columns": frugal(),
    "outputs": frugal(projection=subspace.columns("out")),
    "denser": frugal(density=0.5),
    "in full": frugal(density=1.0),
    "free": frugal(density=0.0),
    "entries": frugal(projection=subspace.entries()),
    "blocks": frugal(projection=subspace.blocks()),
    "blocks ascending": frugal(projection=subspace.blocks("ascending")),
    "blocks grouped": frugal(
        projection=subspace.blocks(group=lambda name: {"layer0": "z"}.get(name, name))
    ),
    "svd": frugal(projection=subspace.svd()),
    "svd larger": frugal(projection=subspace.svd("larger")),
    "svd both": frugal(projection=subspace.svd("both")),
    "dct": frugal(projection=subspace.dct()),
    "dct of type 2": frugal(projection=subspace.dct(2)),
    "staggered": frugal(stagger=2),
    "staggered more": frugal(stagger=3),
    "one more full": frugal(always_full=["layer1", "bias"]),
    "transposed": frugal(dimension_numbers=out_in),
    "error feedback": frugal(error_feedback=True),
    "lion": frugal(optax.scale_by_lion()),
    "bare adam": frugal(optax.scale_by_adam()),
    "momentum": frugal(optax.trace(0.9)),
    "decayed": frugal(optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(0.1))),
}


@functools.cache
def made_by(name: str) -> Any:
    """A state without arrays: what is compared is known while tracing."""
    return jax.eval_shape(MADE[name].init, PARAMS)


def step(tx: Any, state: Any) -> Any:
    return jax.eval_shape(tx.update, GRADS, state, PARAMS)


@pytest.mark.parametrize("name", MADE)
def test_every_other_state_is_refused(name):
    step(MADE[name], made_by(name))
    for other in MADE:
        if other != name:
            with pytest.raises((ValueError, TypeError), match="made by another transformation"):
                step(MADE[name], made_by(other))


@pytest.mark.parametrize(
    ("made", "used", "error", "message"),
    [
        ("staggered", "columns", ValueError, r"it has 2 phases \(stagger\), expected 1"),
        (
            "columns",
            "denser",
            ValueError,
            "'layer0' is split, 2 of 8 inputs, .* there, expected split, 4 of 8 inputs",
        ),
        (
            "columns",
            "one more full",
            ValueError,
            "'layer1' is split, 2 of 8 inputs, .* there, expected full",
        ),
        ("free", "columns", ValueError, "'layer0' is free there, expected split, 2 of 8 inputs"),
        ("error feedback", "columns", ValueError, "error .*error_feedback=False"),
        ("columns", "error feedback", ValueError, "error .*error_feedback=True"),
        ("lion", "bare adam", TypeError, "type ScaleByAdamState .*got ScaleByLionState"),
    ],
)
def test_the_message_says_which_leaf_and_what_was_expected(made, used, error, message):
    with pytest.raises(error, match=message):
        step(MADE[used], made_by(made))


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: jaxopt_lab.galore_adamw(1e-2, **{"rank": 2, **o}),
        lambda **o: jaxopt_lab.dct_adamw(1e-2, **{"rank": 2, "update_gap": 2, **o}),
        lambda rank=2, **o: jaxopt_lab.frugal_adamw(1e-2, lambda size: rank, 2, **o),
    ],
    ids=["galore_adamw", "dct_adamw", "frugal_adamw"],
)
def test_ready_made_rules_refuse_another_rank_and_stagger(make):
    tx = make()
    step(tx, jax.eval_shape(tx.init, PARAMS))
    for options in ({"rank": 3}, {"stagger": 2}, {"always_full": ["layer0", "bias"]}):
        with pytest.raises(ValueError, match="made by another transformation"):
            step(tx, jax.eval_shape(make(**options).init, PARAMS))


def test_pickled_states_are_looked_at_too():
    state = pickle.loads(pickle.dumps(MADE["svd"].init(PARAMS)))
    step(MADE["svd"], state)
    with pytest.raises(ValueError, match=r"directions of the outputs.*expected .* inputs"):
        step(MADE["columns"], state)


def test_bytes_of_flax_are_looked_at_too():
    saved = serialization.to_bytes(MADE["svd"].init(PARAMS))
    step(MADE["svd"], serialization.from_bytes(MADE["svd"].init(PARAMS), saved))
    denser = frugal(density=0.5, projection=subspace.svd())
    with pytest.raises(ValueError, match=r"selection of 'layer0' .*\(6, 2\).*\(6, 3\)"):
        step(denser, serialization.from_bytes(denser.init(PARAMS), saved))


def test_what_a_state_does_not_depend_on_may_change():
    state = made_by("columns")
    for options in (
        {"update_gap": 7},
        {"seed": 3},
        {"on_refresh": "keep"},
        {"free": optax.identity()},
        {"projected_scale": 0.5},
    ):
        step(frugal(**options), state)


class Net(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(8, 6, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(6, 8, rngs=nnx.Rngs(1))


@pytest.mark.parametrize(
    "always_full", [None, lambda params: jax.tree.map(lambda x: x.ndim < 2, params)]
)
def test_other_paths_of_one_tree_are_no_other_state(always_full):
    """`flax.nnx.Optimizer` hands over other paths at the update than at init."""
    model, options = Net(), {"update_gap": 2, "always_full": always_full}
    optimizer = nnx.Optimizer(
        model, frugal(projection=subspace.svd(), stagger=2, **options), wrt=nnx.Param
    )
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    for _ in range(4):
        optimizer.update(model, grads)
    optimizer.tx = frugal(projection=subspace.svd(), **options)
    with pytest.raises(ValueError, match="phases"):
        optimizer.update(model, grads)
    optimizer.tx = frugal(projection=subspace.svd("larger"), stagger=2, **options)
    with pytest.raises(ValueError, match="made by another transformation: 'first/kernel"):
        optimizer.update(model, grads)
