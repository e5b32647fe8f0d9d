"""Each compressed method beside its float64 program, in every mode, and across a save."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import distributed
from tests.distributed import modes, runs
from tests.oracles import econtrol as econtrol_oracle
from tests.oracles import ef21 as ef21_oracle
from tests.oracles import error_feedback as feedback_oracle
from tests.oracles import one_bit_adam as one_bit_oracle
from tests.oracles import powersgd as powersgd_oracle

AXIS, SIZE, STEPS = modes.AXIS, 13, 20
TOP, TOP_ORACLE = distributed.top_k(count=3), feedback_oracle.top_k(3)
METHODS: dict[str, Any] = {
    "one_bit_adam": (
        lambda K: distributed.scale_by_one_bit_adam(8, AXIS, b2=0.9),
        lambda g: one_bit_oracle.directions(g, freeze_step=8, b2=0.9),
    ),
    "error_feedback": (
        lambda K: distributed.error_feedback(TOP, AXIS, error_decay=0.9),
        lambda g: feedback_oracle.directions(g, TOP_ORACLE, error_decay=0.9),
    ),
    "two_phase": (
        lambda K: distributed.error_feedback(distributed.sign(), AXIS, two_phase=True),
        lambda g: feedback_oracle.two_phase_directions(g, feedback_oracle.sign_l1),
    ),
    "ef21": (
        lambda K: distributed.ef21(TOP, AXIS, momentum=0.5),
        lambda g: ef21_oracle.directions(g, TOP_ORACLE, momentum=0.5),
    ),
    "ef21_w": (
        lambda K: distributed.ef21(TOP, AXIS, init="gradient", weights=range(1, K + 1)),
        lambda g: ef21_oracle.directions(
            g, TOP_ORACLE, init="gradient", L=range(1, g.shape[1] + 1)
        ),
    ),
    "econtrol": (
        lambda K: distributed.econtrol(TOP, AXIS),
        lambda g: econtrol_oracle.directions(g, TOP_ORACLE, eta=3 / SIZE),
    ),
}
RANDOM: dict[str, Any] = {
    "random_k": lambda: distributed.error_feedback(distributed.random_k(0.3), AXIS, seed=3),
    "int8": lambda: distributed.compressed_mean(distributed.stochastic_int8(8), AXIS),
    "int4": lambda: distributed.error_feedback(
        distributed.stochastic_int4(4), AXIS, two_phase=True
    ),
    "powersgd": lambda: distributed.powersgd(1, AXIS, min_compression_rate=0.0),
}


def tree_of(vectors: np.ndarray) -> dict[str, np.ndarray]:
    """Cuts the last axis, of 13, into a matrix, a scalar and a vector; in the tree's order."""
    lead = vectors.shape[:-1]
    matrix = vectors[..., :6].reshape(*lead, 2, 3)
    return {"a": matrix, "b": vectors[..., 6], "c": vectors[..., 7:]}


def vectors_of(tree: dict[str, jax.Array], axes: int) -> np.ndarray:
    found = [np.asarray(tree[name]) for name in "abc"]
    return np.concatenate([x.reshape(*x.shape[:axes], -1) for x in found], axis=-1)


def transformation(method: str, replicas: int) -> optax.GradientTransformation:
    return METHODS[method][0](replicas) if method in METHODS else RANDOM[method]()


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("method", METHODS)
def test_equals_the_float64_program(method, replicas):
    grads = runs.gradients(STEPS, replicas, SIZE)
    with jax.enable_x64(True):
        found, _ = runs.directions(transformation(method, replicas), tree_of(grads))
        found = vectors_of(found, 2)
    expected = METHODS[method][1](grads)
    # Sums of 13 numbers in another order, carried over 20 steps; 1e-8 is eps of Adam.
    for own in found:
        np.testing.assert_allclose(own, expected, rtol=1e-9, atol=1e-10)
    assert np.all(found == found[:1])


@pytest.mark.parametrize("replicas", [1, 3])
def test_powersgd_equals_the_float64_program(replicas):
    grads = runs.gradients(STEPS, replicas, 6, 5)
    tx = distributed.powersgd(2, AXIS, min_compression_rate=0.0)
    with jax.enable_x64(True):
        state: Any = jax.vmap(tx.init, axis_name=AXIS)(grads[0])
        found, _ = runs.directions(tx, grads)
        expected = powersgd_oracle.directions(grads, np.asarray(state.query[0]))
        # Gram-Schmidt and Householder agree to the rounding of the condition, some hundreds.
        np.testing.assert_allclose(found[0], expected, rtol=1e-8, atol=1e-9)


@functools.cache
def short_run(method: str, replicas: int, mode: str):
    grads = tree_of(runs.gradients(4, replicas, SIZE).astype(np.float32))
    tx = METHODS[method][0](replicas) if method in METHODS else RANDOM[method]()
    if method == "one_bit_adam":
        tx = distributed.scale_by_one_bit_adam(2, AXIS, b2=0.9)
    update = modes.mapped(mode, tx.update, replicas)
    state = modes.mapped(mode, tx.init, replicas)(jax.tree.map(lambda g: g[0], grads))
    found, states = [], [state]
    for t in range(4):
        updates, state = update(jax.tree.map(lambda g, t=t: g[t], grads), state)
        found.append(vectors_of(updates, 1))
        states.append(state)
    return update, grads, np.stack(found), states


# Compiling the random numbers takes seconds a mode.
SLOW = [pytest.param(m, k, marks=pytest.mark.slow) for m in RANDOM for k in (1, 8)]


@pytest.mark.parametrize(
    ("method", "replicas"),
    [*((m, k) for m in METHODS for k in (1, 3, 8)), *((m, 3) for m in RANDOM), *SLOW],
)
def test_all_modes_agree(method, replicas):
    _, _, expected, _ = short_run(method, replicas, "vmap")
    by_count = {1: ["unchecked"], 3: ["shard_map"], 8: ["pmap"]}
    for mode in by_count[replicas]:
        _, _, found, _ = short_run(method, replicas, mode)
        # float32: sums in another order, divided by a root of moments of some 0.1.
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)
        assert np.all(found == found[:, :1])


@pytest.mark.parametrize("method", [*METHODS, *RANDOM])
def test_resumes_bit_for_bit(method):
    update, grads, expected, states = short_run(method, 3, "vmap")
    state = jax.tree.map(lambda x: jnp.asarray(np.array(x)), states[2])
    for t in (2, 3):
        updates, state = update(jax.tree.map(lambda g, t=t: g[t], grads), state)
        assert np.array_equal(vectors_of(updates, 1), expected[t])


@pytest.mark.parametrize("method", [*METHODS, *RANDOM])
def test_zero_in_zero_out_and_dtypes(method):
    tx = transformation(method, 2)
    grads = {"a": jnp.zeros((2, 4, 3), jnp.bfloat16), "b": jnp.zeros(2), "c": jnp.zeros((2, 0))}

    def three(g):
        state = tx.init(g)
        start = state
        for _ in range(3):
            updates, state = tx.update(g, state)
        return updates, start, state

    updates, start, state = jax.jit(jax.vmap(three, axis_name=AXIS))(grads)
    for got, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads)):
        assert got.dtype == g.dtype
        assert np.all(np.asarray(got, np.float32) == 0)
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(state)):
        assert old.dtype == new.dtype


@pytest.mark.parametrize("method", [*METHODS, *RANDOM])
def test_results_are_known_to_be_equal(method):
    tx = transformation(method, 2)

    def directions(g, params):
        return tx.update({"a": g[0]}, tx.init({"a": params}))[0]

    specs = {"mesh": modes.mesh(2), "in_specs": (jax.P(AXIS), jax.P()), "out_specs": jax.P()}
    jax.eval_shape(jax.shard_map(directions, **specs), jnp.ones((2, 4, 3)), jnp.ones((4, 3)))


@pytest.mark.parametrize("method", [*METHODS, *RANDOM])
def test_an_empty_tree_is_accepted(method):
    tx = transformation(method, 2)
    run = modes.mapped("shard_map", lambda x: tx.update({}, tx.init({}))[0], 2)
    assert jax.eval_shape(run, jnp.ones(2)) == {}


@pytest.mark.parametrize("method", [*METHODS, *RANDOM])
def test_refusals(method):
    tx = transformation(method, 2)
    with pytest.raises(ValueError, match="axis 'replica' is not bound"):
        tx.init(jnp.ones((4, 3)))

    def update(g, init_with):
        return tx.update(g, tx.init(init_with))

    def over_two(*arguments):
        return jax.eval_shape(jax.vmap(update, axis_name=AXIS), *arguments)

    with pytest.raises(TypeError, match="integer parameters cannot be optimized"):
        over_two(jnp.ones((2, 4, 3)), jnp.ones((2, 4, 3), jnp.int32))
    with pytest.raises(TypeError, match="expected real floating point"):
        over_two(jnp.ones((2, 4, 3), jnp.int32), jnp.ones((2, 4, 3)))
    if method != "int8":  # has no tree in its state
        with pytest.raises(ValueError, match="updates"):
            over_two({"x": jnp.ones((2, 4, 3))}, {"y": jnp.ones((2, 4, 3))})
    with pytest.raises(TypeError, match="expected a state of type"):
        jax.eval_shape(
            jax.vmap(lambda g: tx.update(g, optax.EmptyState()), axis_name=AXIS), jnp.ones((2, 3))
        )
    summed = jax.shard_map(
        lambda g: update(g, g)[0], mesh=modes.mesh(2), in_specs=jax.P(), out_specs=jax.P()
    )
    with pytest.raises(ValueError, match="the same on all replicas"):
        jax.eval_shape(summed, jnp.ones((4, 3)))


HALF: Any = 0.5
BAD = [
    (lambda: distributed.top_k(0.0), ValueError, r"fraction must be in \(0, 1\], got 0.0"),
    (lambda: distributed.top_k(count=0), ValueError, "count must be a positive integer, got 0"),
    (lambda: distributed.top_k(), ValueError, "either fraction or count"),
    (lambda: distributed.random_k(1.5), ValueError, r"fraction must be in \(0, 1\], got 1.5"),
    (lambda: distributed.sign(cast(Any, "max")), ValueError, "scale must be one of"),
    (lambda: distributed.stochastic_int8(0), ValueError, "block_size must be a positive integer"),
    (lambda: distributed.error_feedback(TOP, AXIS, error_decay=0.0), ValueError, "error_decay"),
    (lambda: distributed.compressed_mean(TOP, AXIS, seed=HALF), TypeError, "seed must be an"),
    (lambda: distributed.ef21(TOP, AXIS, init=cast(Any, "one")), ValueError, "init must be one of"),
    (lambda: distributed.ef21(TOP, AXIS, weights=[1, 0]), ValueError, "positive numbers"),
    (lambda: distributed.ef21(TOP, AXIS, momentum=1.0), ValueError, "momentum must be in"),
    (lambda: distributed.econtrol(TOP, AXIS, feedback=1.5), ValueError, "feedback must be in"),
    (lambda: distributed.powersgd(0, AXIS), ValueError, "rank must be a positive integer"),
    (lambda: distributed.one_bit_adam(0.1, 0, AXIS), ValueError, "freeze_step must be a positive"),
    (lambda: distributed.one_bit_adam(0.1, 9, AXIS, b1=1.0), ValueError, r"b1 must be in \[0, 1\)"),
]


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "method",
    [
        distributed.compressed_mean,
        distributed.error_feedback,
        distributed.ef21,
        distributed.econtrol,
    ],
)
def test_what_is_no_compressor_is_refused_by_name(method):
    with pytest.raises(TypeError, match=r"compressor must be .* got 'replica'"):
        method("replica", TOP)
    with pytest.raises(TypeError, match=r"got top_k: call it first, as in top_k\(...\)"):
        method(distributed.top_k, AXIS)


@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (distributed.ef21(TOP, AXIS, weights=[1, 2, 3]), "each of the 2 replicas, got 3"),
        (distributed.econtrol(distributed.sign("l2"), AXIS), "no contraction constant"),
        (
            distributed.error_feedback(distributed.random_k(0.1, unbiased=True), AXIS),
            "needs a contractive compressor",
        ),
        (
            distributed.scale_by_one_bit_adam(1, AXIS, momentum_mask={"x": True}),
            "mask does not match",
        ),
        (
            distributed.scale_by_one_bit_adam(1, AXIS, momentum_mask=np.ones(3, bool)),
            "does not broadcast",
        ),
    ],
)
def test_bad_at_init(tx, message):
    with pytest.raises(ValueError, match=message):
        jax.vmap(tx.init, axis_name=AXIS)(jnp.ones((2, 20)))
