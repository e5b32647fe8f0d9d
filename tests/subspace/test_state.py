"""The state: how large it is, and what jax, optax and orbax do with it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from orbax.checkpoint import v1 as ocp

import jaxopt_lab
from jaxopt_lab import subspace
from tests.subspace.trees import (
    PARAMS,
    PROJECTIONS,
    assert_close,
    assert_same,
    grads_at,
    states,
    trajectory,
)

WIDE = {"gate": jnp.zeros((32, 64)), "up": jnp.zeros((32, 64))}


def bytes_of(tx: Any, params: Any) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tx.init(params)))


def adam(name: str, density: float) -> Any:
    return subspace.frugal(projection=PROJECTIONS[name], density=density)


# Of two matrices (32, 64): indices of 4 bytes, a basis of float32 for the smaller side or for both,
# a flag of 4 bytes.
OWN = {
    "columns": lambda d: 4 * d * 2 * 32,
    "columns_out": lambda d: 4 * d * 2 * 64,
    "entries": lambda d: 4 * d * 2 * 32 * 64,
    "blocks": lambda d: 2 * 4 * (0 < d < 1),
    "svd": lambda d: 2 * 4 * 32 * 32 * d,
    "svd_both": lambda d: 2 * 4 * (32 + 64) * 32 * d,
    "dct": lambda d: 2 * 4 * 32 * d,
}
COUNTERS = 3 * 4


@pytest.mark.parametrize("name", PROJECTIONS)
def test_bytes_fall_with_the_density(name):
    size = 2 * 32 * 64
    found = [bytes_of(adam(name, d), WIDE) for d in (0.0, 0.5, 1.0)]
    assert found[0] == COUNTERS
    assert found[2] == 8 * size + COUNTERS
    assert found[1] <= 8 * 0.5 * size + OWN[name](0.5) + COUNTERS
    if name != "svd_both":  # whose compact arrays are half of the smaller side on both
        assert found[1] == 8 * 0.5 * size + OWN[name](0.5) + COUNTERS
    smaller = bytes_of(adam(name, 0.25), WIDE)
    assert smaller < found[1] or name == "blocks"  # a quarter of two blocks is still one of them


def test_error_feedback_costs_the_leaves():
    plain = subspace.frugal(density=0.5)
    fed = subspace.frugal(density=0.5, error_feedback=True)
    assert bytes_of(fed, WIDE) - bytes_of(plain, WIDE) == 4 * 2 * 32 * 64


@pytest.mark.parametrize("name", PROJECTIONS)
def test_init_of_shapes_and_abstract_init(name):
    tx = adam(name, 0.5)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), PARAMS)
    made = tx.init(PARAMS)
    assert_same(tx.init(shapes), made)
    abstract = jax.eval_shape(tx.init, shapes)
    assert jax.tree.structure(abstract) == jax.tree.structure(made)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(abstract)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(made)
    ]
    assert str(subspace.treatments(tx, shapes)) == str(subspace.treatments(tx, PARAMS))


@pytest.mark.parametrize("name", PROJECTIONS)
def test_optax_finds_what_belongs_to_parameters(name):
    tx = adam(name, 0.5)
    state = tx.init(PARAMS)
    marked: Any = optax.tree.map_params(
        tx, lambda x: "moment", state, transform_non_params=lambda x: "other"
    )
    assert marked.count == "other"
    assert marked.full.count == "other"
    assert marked.full.mu["bias"] == "moment"
    assert marked.selected[0].count == "other"
    if name != "blocks":  # whose slots belong to no single parameter
        assert marked.selected[0].mu["first"] == marked.selected[0].nu["second"] == "moment"


@pytest.mark.parametrize("name", ["entries", "blocks", "svd"])
def test_run_resumes_from_orbax_at_any_step(name, tmp_path):
    tx = subspace.frugal(
        None, None, PROJECTIONS[name], 0.5, update_gap=3, stagger=1 if name == "blocks" else 2
    )
    update = jax.jit(tx.update)
    reached = states(tx, 5)
    shapes = jax.eval_shape(tx.init, PARAMS)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    for step in range(1, 5):
        ocp.save(tmp_path / str(step), reached[step - 1])
        restored = ocp.load(tmp_path / str(step), shapes)
        assert jax.tree.structure(restored) == jax.tree.structure(reached[0])
        continued = update(grads_at(step), restored, PARAMS)
        assert_same(continued, update(grads_at(step), reached[step - 1], PARAMS))
        assert_same(continued[1], reached[step])


def test_vmap_over_runs_and_scan_over_steps():
    tx = subspace.frugal(density=0.5, update_gap=2)

    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=4)[0][0]

    runs = jax.tree.map(lambda x: jnp.stack([x, 2 * x, -x]), PARAMS)
    together = jax.jit(jax.vmap(run))(runs)
    one = jax.jit(run)
    for i in range(3):
        alone = one(jax.tree.map(lambda x, i=i: x[i], runs))
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), alone, 1e-5)


def test_state_keeps_its_structure_and_dtypes():
    for name in PROJECTIONS:
        tx = adam(name, 0.5)
        before, (_, after) = jax.eval_shape(lambda tx=tx: (tx.init(PARAMS), trajectory(tx, 2)))
        assert jax.tree.structure(before) == jax.tree.structure(after)
        assert [(x.shape, x.dtype) for x in jax.tree.leaves(before)] == [
            (x.shape, x.dtype) for x in jax.tree.leaves(after)
        ]


def test_inject_hyperparams_of_all_but_shapes_and_counts():
    plain = jaxopt_lab.frugal_adamw(0.1, 0.5, 2, weight_decay=0.1)
    counts = ("density", "update_gap", "stagger", "seed")
    make = optax.inject_hyperparams(jaxopt_lab.frugal_adamw, static_args=counts)
    injected = make(0.1, 0.5, 2, weight_decay=0.1)
    # A decay rate that is an array has its logarithm taken in float32: 2e-5 at 0.999.
    assert_close(trajectory(injected, 4)[0], trajectory(plain, 4)[0], 5e-5)


def test_treatments_say_what_happens_to_each_parameter():
    params = {
        **PARAMS,
        "lm_head": jnp.zeros((8, 3)),
        "conv": jnp.zeros((3, 3, 2, 2)),
        "narrow": jnp.zeros((1, 9)),
    }
    found = subspace.treatments(subspace.frugal(density=0.5), params)
    assert [str(t) for t in found.parameters] == [
        "bias (6,): full (1 axis)",
        "conv (3, 3, 2, 2): split 9 of 18 (matrix, inputs 0 1 2, outputs 3)",
        "first (4, 8): split 2 of 4 (matrix)",
        "lm_head (8, 3): full (embedding or output layer by its path)",
        "narrow (1, 9): whole (all 1 are kept)",
        "second (8, 6): split 4 of 8 (matrix)",
    ]
    everything = subspace.frugal(density=1.0, always_full=r"^(conv|bias)$")
    kinds = [t.kind for t in subspace.treatments(everything, params).parameters]
    assert kinds == ["full", "full", "whole", "whole", "whole", "whole"]


@pytest.mark.parametrize(
    "always_full",
    [
        [r"first", "bias"],
        {"bias": True, "first": True, "second": False},
        lambda params: {"bias": True, "first": True, "second": False},
    ],
    ids=["patterns", "tree", "function"],
)
def test_always_full_in_every_form(always_full):
    tx: Any = subspace.frugal(density=0.5, always_full=always_full)
    kinds = [t.kind for t in subspace.treatments(tx, PARAMS).parameters]
    assert kinds == ["full", "full", "split"]
    np.testing.assert_array_equal(tx.init(PARAMS).full.mu["first"], 0 * PARAMS["first"])
