"""What each compressor promises: bytes, constants, exactness; and what feedback makes of it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import distributed
from jaxopt_lab.distributed.one_bit_adam import one_bit_mean
from tests.distributed import modes, runs

AXIS, SIZE, KEYS = modes.AXIS, 45, 2000
ALL: dict[str, Any] = {
    "top_k": distributed.top_k(0.1),
    "random_k": distributed.random_k(0.1),
    "random_k_unbiased": distributed.random_k(0.1, unbiased=True),
    "identity": distributed.identity(),
    "sign_l1": distributed.sign(),
    "sign_l2": distributed.sign("l2"),
    "int8": distributed.stochastic_int8(16),
    "int4": distributed.stochastic_int4(16),
}
UNBIASED = ["random_k_unbiased", "identity", "int8", "int4"]
VECTORS = {
    "normal": np.random.default_rng(0).standard_normal(SIZE),
    "one_hot": np.eye(SIZE)[7],
    "heavy": np.random.default_rng(1).standard_cauchy(SIZE),
}


@functools.cache
def round_trips(name):
    """Returns a compiled function from a vector to what it becomes with each of many keys."""
    keys = jax.random.split(jax.random.key(0), KEYS)

    def one(x, key):
        return ALL[name].decompress(ALL[name].compress(x, key), SIZE, key)

    return jax.jit(lambda x: jax.vmap(one, (None, 0))(x, keys))


@pytest.mark.parametrize("name", ALL)
def test_payload_bytes(name):
    for size in (1, 7, 8, 33, 1000):
        payload = jax.eval_shape(
            ALL[name].compress,
            jax.ShapeDtypeStruct((size,), jnp.float32),
            jax.eval_shape(lambda: jax.random.key(0)),
        )
        found = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(payload))
        assert found == ALL[name].payload_bytes(size)
    hash(ALL[name])


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", VECTORS)
def test_constants(name, kind):
    x = VECTORS[kind].astype(np.float32)
    found = np.asarray(round_trips(name)(x), np.float64)
    assert np.all(np.asarray(round_trips(name)(0 * x)) == 0)
    error = np.sum((found - x) ** 2, axis=1)
    # Five standard errors of a mean over the keys, and float32's rounding.
    slack = 5 * error.std() / np.sqrt(KEYS) + 1e-5 * np.sum(x.astype(np.float64) ** 2)
    norm = float(np.sum(x.astype(np.float64) ** 2))
    alpha, omega = ALL[name].contraction(SIZE), ALL[name].variance(SIZE)
    if alpha is not None:
        assert error.mean() <= (1 - alpha) * norm + slack
    if omega is not None:
        assert name in UNBIASED
        assert error.mean() <= omega * norm + slack
        off = np.abs(found.mean(axis=0) - x)
        # 45 entries: five standard errors are passed once in 40000 runs; the seed is fixed.
        assert np.all(off <= 5 * found.std(axis=0) / np.sqrt(KEYS) + 1e-5 * np.abs(x).max())
    if name == "sign_l2":
        assert (error.mean() > norm) == (kind != "normal")


@pytest.mark.parametrize("name", ["top_k", "random_k", "identity"])
def test_selection_is_exact(name):
    x = VECTORS["heavy"].astype(np.float32)
    found = np.asarray(round_trips(name)(x))
    assert np.array_equal(found + (x - found), np.broadcast_to(x, found.shape))
    assert np.all((found == 0) | (found == x))


@pytest.mark.parametrize("make", [distributed.stochastic_int8, distributed.stochastic_int4])
def test_nan_is_sent_with_its_block(make):
    """Blocks as large as those of which the maximum of XLA's library for CPUs passes over NaN."""
    compressor, key = make(256), jax.random.key(0)
    x = jnp.ones(64 * 256).at[300].set(jnp.nan)
    sent = jax.jit(lambda x: compressor.decompress(compressor.compress(x, key), x.size, key))(x)
    np.testing.assert_array_equal(np.isnan(sent).reshape(64, 256).all(1), np.arange(64) == 1)
    assert np.isnan(sent).sum() == 256


def test_everything_kept_is_the_identity():
    x, key = jnp.asarray(VECTORS["normal"], jnp.float32), jax.random.key(0)
    both: tuple[Any, ...] = distributed.top_k(1.0), distributed.random_k(1.0)
    for c in both:
        assert np.array_equal(c.decompress(c.compress(x, key), SIZE, key), x)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA:CPU makes of top_k")
@pytest.mark.parametrize("two_phase", [False, True])
def test_simulated_replicas_select_instead_of_sorting(two_phase):
    """A part of a selection, as one replica's payload is, must not turn it into a sort."""
    tx = distributed.error_feedback(distributed.top_k(0.01), AXIS, two_phase=two_phase)

    def direction(g):
        return tx.update(g, tx.init(g))[0]

    lowered = jax.jit(jax.vmap(direction, axis_name=AXIS)).lower(jnp.ones((8, 4000)))
    program = lowered.compile().as_text() or ""
    assert " sort(" not in program
    assert "TopK" in program


def test_one_bit_mean_conserves_and_masks():
    """Compressed plus errors is the input; what is masked stays zero everywhere."""
    K, d, L = 4, 45, 64
    rng = np.random.default_rng(0)
    present = np.arange(L) < d
    x, e = (np.where(present, rng.standard_normal((K, L)), 0).astype(np.float32) for _ in range(2))
    s = np.where(present.reshape(K, -1), rng.standard_normal((K, L // K)), 0).astype(np.float32)
    mapped: Any = modes.mapped("vmap", lambda x, e, s, p: one_bit_mean(x, e, s, p, AXIS), K)
    mean, e_new, s_new = map(np.asarray, mapped(x, e, s, np.stack([present] * K)))
    before = x.mean(0) + e.mean(0) + s.reshape(-1)
    after = mean[0] + e_new.mean(0) + s_new.reshape(-1)
    np.testing.assert_allclose(after, before, atol=2e-6)  # a few roundings of numbers up to 4
    assert np.all(mean == mean[:1])
    for tail in (mean[:, d:], e_new[:, d:], s_new.reshape(-1)[d:]):
        assert np.all(tail == 0)


def test_one_bit_adam_freezes_and_warms_up_as_adam():
    grads = runs.gradients(12, 3, 11).astype(np.float32)
    grads[:, :, 2] = 0  # no gradient: no second moment
    tx = distributed.scale_by_one_bit_adam(6, AXIS, bias_correction=True)
    _, early = runs.directions(tx, grads[:6])
    found, late = runs.directions(tx, grads)
    assert np.array_equal(early.nu, late.nu)
    assert np.all(late.mu == late.mu[:1])
    assert np.all(np.asarray(found)[:, :, 2] == 0)
    adam = optax.scale_by_adam()
    state = adam.init(jnp.zeros(11))
    for t in range(6):
        updates: Any
        updates, state = adam.update(jnp.asarray(grads[t].mean(axis=0)), state)
        # Adam's own correction 1 - 0.999^t in float32 is off by up to 2e-5.
        np.testing.assert_allclose(found[0, t], updates, rtol=1e-4, atol=1e-6)


def test_momentum_mask():
    grads = runs.gradients(6, 2, 6, seed=1).astype(np.float32)
    mask = np.arange(6) < 4
    tx = distributed.scale_by_one_bit_adam(2, AXIS, momentum_mask=mask)
    found, state = runs.directions(tx, grads)
    assert np.all(np.asarray(found)[:, 2:, 4:] == 0)
    assert np.all(np.asarray(found)[:, :2] != 0)
    assert np.all(np.asarray(state.worker_error)[:, 4:] == 0)
    shorter, _ = runs.directions(distributed.scale_by_one_bit_adam(2, AXIS), grads[:, :, :4])
    # Entries left out are as if they did not exist, but for the parts' borders: here one part.
    np.testing.assert_allclose(found[:, :, :4], shorter, rtol=1e-5)


def test_identities_between_methods():
    grads = runs.gradients(10, 3, 9).astype(np.float32)
    top, same = distributed.top_k(count=2), distributed.identity()
    mean = grads.mean(axis=1)
    for tx in (
        distributed.ef21(same, AXIS),
        distributed.ef21(same, AXIS, weights=[1, 2, 5]),
        distributed.econtrol(same, AXIS),
        distributed.error_feedback(same, AXIS),
        distributed.error_feedback(same, AXIS, two_phase=True),
    ):
        found, _ = runs.directions(tx, grads)
        np.testing.assert_allclose(found[0], mean, atol=1e-5)  # sums of ten differences
    plain, _ = runs.directions(distributed.ef21(top, AXIS), grads)
    weighted, _ = runs.directions(distributed.ef21(top, AXIS, weights=[2, 2, 2]), grads)
    without, state = runs.directions(distributed.econtrol(top, AXIS, feedback=0.0), grads)
    assert np.array_equal(plain, weighted)
    np.testing.assert_allclose(without, plain, atol=1e-6)
    _, before = runs.directions(distributed.econtrol(top, AXIS, feedback=0.0), grads[:9])
    total = np.asarray(state.error + state.estimate)
    np.testing.assert_allclose(total, before.error + grads[9], atol=1e-5)  # numbers up to 20
    constant = np.broadcast_to(grads[:1], (5, *grads.shape[1:]))
    found, _ = runs.directions(distributed.ef21(top, AXIS), constant)
    np.testing.assert_allclose(found[0, -1], mean[0], atol=1e-6)  # ceil(9 / 2) steps


def test_powersgd_is_linear_exact_at_full_rank_and_recovers_from_zero():
    grads = runs.gradients(5, 3, 8, 6).astype(np.float32)
    tx = distributed.powersgd(2, AXIS, min_compression_rate=0.0)
    found, _ = runs.directions(tx, grads)
    alone, _ = runs.directions(tx, grads.mean(axis=1, keepdims=True))
    np.testing.assert_allclose(found[0], alone[0], atol=1e-4)  # subspaces turn with rounding
    rng = np.random.default_rng(2)
    left, right = rng.standard_normal((8, 2)), rng.standard_normal((5, 3, 2, 6))
    low_rank = (left @ right).astype(np.float32)
    found, _ = runs.directions(tx, low_rank[:1])
    np.testing.assert_allclose(found[0], low_rank[:1].mean(axis=1), atol=1e-5)
    sparse = np.zeros((3, 1, 8, 6), np.float32)
    sparse[1:, :, 7, 3] = 1.0  # after a zero gradient, in a row that no unit vector of QR(0) meets
    found, _ = runs.directions(tx, sparse)
    np.testing.assert_allclose(found[0].sum(axis=0), sparse[:, 0].sum(axis=0), atol=1e-5)


@functools.cache
def distance(method: str) -> float:
    """Distance to the optimum of 8 quadratics of 20 variables after 4000 steps of 0.05, Top-1."""
    rng = np.random.default_rng(0)
    curvature = jnp.asarray(rng.uniform(0.5, 2.0, (8, 20)))
    centres = jnp.asarray(5 * rng.standard_normal((8, 20)))
    top = distributed.top_k(count=1)
    tx = {
        "none": lambda: distributed.compressed_mean(top, AXIS),
        "ef14": lambda: distributed.error_feedback(top, AXIS),
        "ef21": lambda: distributed.ef21(top, AXIS),
        "econtrol": lambda: distributed.econtrol(top, AXIS),
    }[method]()

    def train(a, c):
        def step(carry, _):
            x, state = carry
            direction: Any
            direction, state = tx.update(a * (x - c), state)
            return (x - 0.05 * direction, state), None

        start = jnp.zeros(20, a.dtype)
        return jax.lax.scan(step, (start, tx.init(start)), length=4000)[0][0]

    found = jax.jit(jax.vmap(train, axis_name=AXIS))(curvature, centres)[0]
    return float(jnp.linalg.norm(found - (curvature * centres).sum(0) / curvature.sum(0)))


def test_what_feedback_is_for():
    """Without it descent stops far away, with the classical one at a bias, else nowhere."""
    with jax.enable_x64(True):
        found = {m: distance(m) for m in ("none", "ef14", "ef21", "econtrol")}
    print(found)
    assert found["none"] > 5 > found["ef14"] > 0.1
    assert found["ef21"] < 1e-10
    assert found["econtrol"] < 1e-10
