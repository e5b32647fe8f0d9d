"""What holds for one method: where it must equal a simpler one, and which axes it looks at."""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from tests.oracles import clip_coordinates as clip_oracle
from tests.oracles import regimes
from tests.transforms.rules import OPTIMIZERS

KEY = jax.random.key(0)
PARAMS = {
    "kernel": jax.random.normal(KEY, (6, 4)),
    "bias": jax.random.normal(jax.random.fold_in(KEY, 1), (4,)),
}


def run(tx: optax.GradientTransformation, params=PARAMS, steps: int = 10):
    """Parameters after some steps of gradients that do not depend on the optimizer."""

    @jax.jit
    def trajectory(params):
        def step(carry, key):
            params, state = carry
            grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape, p.dtype), params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.fold_in(KEY, 2), steps)
        return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]

    return trajectory(params)


def assert_close(a, b, rtol=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol), a, b)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.99), (0.95, 0.98), (0.9, 0.9), (0.5, 0.0)])
def test_lion_equals_optax(b1, b2):
    ours = jaxopt_lab.lion(0.01, b1, b2, weight_decay=0.1)
    theirs = optax.lion(0.01, b1, b2, weight_decay=0.1)
    assert_close(run(ours), run(theirs), 1e-6)


def test_adabelief_equals_optax_where_both_exist():
    # optax corrects the bias by 1 - b**t in float32, which is off by 2e-5 at b = 0.999.
    ours, theirs = (
        jaxopt_lab.adabelief(0.01, eps=1e-8),
        optax.adabelief(0.01, eps=1e-8, eps_root=1e-8),
    )
    assert_close(run(ours), run(theirs), 2e-5)


def test_adamp_without_projection_is_adamw():
    ours = jaxopt_lab.adamp(0.01, weight_decay=0.1, delta=0.0)
    assert_close(run(ours), run(optax.adamw(0.01, weight_decay=0.1)), 2e-5)


def test_adamp_on_vectors_is_adamw():
    params = {"bias": PARAMS["bias"], "scale": jnp.float32(2.0)}
    ours = jaxopt_lab.adamp(0.01, weight_decay=0.1)
    assert_close(run(ours, params), run(optax.adamw(0.01, weight_decay=0.1), params), 2e-5)


def test_sgdp_without_projection_is_sgd():
    ours = jaxopt_lab.sgdp(0.01, momentum=0.9, nesterov=True, delta=0.0)
    assert_close(run(ours), run(optax.sgd(0.01, momentum=0.9, nesterov=True)))


def test_exadam_with_huge_eps_has_no_cross_terms():
    # d1 = d2 = 1: the direction is (m + g) / c1 over eps.
    ours: Any = jaxopt_lab.scale_by_exadam(eps=1e8, dynamic_step_size=False)
    grads = {"w": jnp.array([1.0, -2.0])}
    updates, _ = ours.update(grads, ours.init(grads))
    np.testing.assert_allclose(updates["w"] * 1e8, 11 * grads["w"], rtol=1e-5)


def test_diffgrad_of_a_constant_gradient_is_half_of_adam():
    grads = {"w": jnp.array([0.5, -2.0])}
    ours: Any = jaxopt_lab.scale_by_diffgrad(eps=1e-12)
    adam: Any = optax.scale_by_adam(eps=1e-12)
    state, adam_state = ours.init(grads), adam.init(grads)
    for _ in range(3):
        updates, state = ours.update(grads, state)
        expected, adam_state = adam.update(grads, adam_state)
    np.testing.assert_allclose(updates["w"], expected["w"] / 2, rtol=3e-5)


def test_diffgrad_stays_in_the_first_basin():
    # The published notebook's first function: Adam overshoots to 0.2001, diffGrad finds -0.3001.
    def gradient(x):
        return jnp.where(x <= 0, 2 * x + 0.6, 2 * x - 0.4)

    def final(tx):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(gradient(x), state, x)
            return (x + updates, state), None

        x = jnp.float32(-1.0)
        return jax.lax.scan(step, (x, tx.init(x)), length=299)[0][0]

    np.testing.assert_allclose(final(jaxopt_lab.diffgrad(0.1, b1=0.95)), -0.3001, atol=2e-4)


def test_muon_gives_matrices_orthogonal_updates():
    tx: Any = jaxopt_lab.scale_by_muon(consistent_rms=0.2)
    params = {"w": jnp.zeros((64, 256))}
    grads = {"w": jax.random.normal(KEY, (64, 256))}
    updates, _ = tx.update(grads, tx.init(params))
    # 0.2 sqrt(256) times singular values of 0.68 to 1.14.
    singular = jnp.linalg.svdvals(updates["w"]) / (0.2 * 16)
    assert float(singular.min()) > 0.65
    assert float(singular.max()) < 1.2


def test_muon_batches_equal_shapes_without_mixing_them():
    tx: Any = jaxopt_lab.scale_by_muon()
    keys = jax.random.split(KEY, 3)
    grads = {"a": jax.random.normal(keys[0], (4, 6)), "b": jax.random.normal(keys[1], (6, 4))}
    grads["c"] = jax.random.normal(keys[2], (4, 6))
    together, _ = tx.update(grads, tx.init(grads))
    for name, g in grads.items():
        alone, _ = tx.update({name: g}, tx.init({name: g}))
        np.testing.assert_allclose(together[name], alone[name], rtol=1e-4, atol=1e-5)
    dots = str(jax.make_jaxpr(tx.update)(grads, tx.init(grads))).count("dot_general")
    # The Gram matrix, its square, and the polynomial times the matrix, once for all of them; the
    # CPU and the accelerators have a form each.
    assert dots == 2 * 3


def test_muon_leaves_embeddings_the_head_and_vectors_to_adam():
    params = {
        "embed": {"embedding": jnp.ones((9, 4))},
        "block": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4), "conv": jnp.ones((3, 3, 4, 5))},
        "attention": {"query": jnp.ones((6, 2, 3))},
        "lm_head": {"kernel": jnp.ones((4, 9))},
    }
    numbers = jaxopt_lab.muon_dimension_numbers(params)
    matrices = [name for name, leaf in _named(numbers) if leaf is not None]
    assert matrices == ["attention/query", "block/conv", "block/kernel"]
    assert numbers["attention"]["query"] == optax.contrib.MuonDimensionNumbers((0,), (1, 2))
    assert numbers["block"]["conv"] == optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)


def test_muon_in_bfloat16_iteration_is_near():
    grads = {"w": jax.random.normal(KEY, (16, 24))}
    plain: Any = jaxopt_lab.scale_by_muon()
    exact, _ = plain.update(grads, plain.init(grads))
    tx: Any = jaxopt_lab.scale_by_muon(ns_dtype=jnp.bfloat16)
    fast, _ = tx.update(grads, tx.init(grads))
    # Five iterations in 8 bits, as the references run them; the largest entry is above 0.5.
    np.testing.assert_allclose(fast["w"], exact["w"], atol=0.08)
    assert not np.array_equal(fast["w"], exact["w"])


@pytest.mark.parametrize("make", [jaxopt_lab.adamp, jaxopt_lab.muon])
def test_explicit_axes_of_attention_kernels_and_stacked_layers(make):
    # An attention kernel (embed, heads, head_dim) is its (embed, heads * head_dim) matrix, and a
    # stack of layers is its layers.
    w = PARAMS["kernel"]
    attention = {"kernel": optax.contrib.MuonDimensionNumbers(0, (1, 2))}
    ours: Any = run(
        make(0.01, weight_decay=0.1, dimension_numbers=attention), {"kernel": w.reshape(6, 2, 2)}
    )
    flat = _with_same_noise(make(0.01, weight_decay=0.1), w, (6, 2, 2))
    np.testing.assert_allclose(ours["kernel"].reshape(6, 4), flat, rtol=1e-4, atol=1e-5)

    stacked = {"kernel": optax.contrib.MuonDimensionNumbers(1, 2)}
    tx: Any = make(0.01, dimension_numbers=stacked)
    layers = jnp.stack([w, 2 * w[::-1]])
    grads = jax.random.normal(KEY, layers.shape)
    updates, _ = tx.update({"kernel": grads}, tx.init({"kernel": layers}), {"kernel": layers})
    one: Any = make(0.01)
    for i in range(2):
        params = {"kernel": layers[i]}
        alone, _ = one.update({"kernel": grads[i]}, one.init(params), params)
        np.testing.assert_allclose(updates["kernel"][i], alone["kernel"], rtol=1e-4, atol=1e-6)


def _with_same_noise(tx: Any, w: Any, shape: Any) -> Any:
    """Runs `tx` on a matrix with the noise that `run` draws for another shape of it."""
    params: Any = {"kernel": w}
    state = tx.init(params)
    for key in jax.random.split(jax.random.fold_in(KEY, 2), 10):
        grads = {"kernel": jax.random.normal(key, shape).reshape(w.shape)}
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params["kernel"]


def _named(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(
        tree, is_leaf=lambda x: x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
    )
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in flat]


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.29, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("regime", regimes.REGIMES)
def test_clip_coordinates_equals_a_sort(fraction, regime):
    grads = {
        str(shape): regimes.gradients(regime, shape, 5)[1][-1].astype(np.float32)
        for shape in regimes.SHAPES
    }
    tx: Any = jaxopt_lab.clip_coordinates(fraction, scale=0.75)
    clipped, _ = tx.update(jax.tree.map(jnp.asarray, grads), tx.init(grads))
    expected = clip_oracle.clip(grads, fraction, scale=0.75)
    # The order statistic is exact, and only its product with the scale is rounded.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), clipped, expected)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_clip_coordinates_in_16_bits(dtype):
    grads = jnp.asarray([3, -1, 0.5, -0.25, 10, 0, -4, 0.125], dtype)
    tx: Any = jaxopt_lab.clip_coordinates(0.25)
    clipped, _ = tx.update(grads, optax.EmptyState())
    assert [float(g) for g in clipped] == [3, -1, 0.5, -0.25, 3, 0, -3, 0.125]


@pytest.mark.parametrize(
    "rule", [r for r in OPTIMIZERS if "mu_dtype" in inspect.signature(r.make).parameters], ids=str
)
def test_mu_dtype_halves_the_first_moment_and_nothing_else(rule):
    def moments(tx):
        state: Any = jax.eval_shape(tx.init, PARAMS)
        return [x.dtype for x in jax.tree.leaves(state) if x.ndim]

    full, narrow = moments(rule()), moments(rule(mu_dtype=jnp.bfloat16))
    assert set(full) == {jnp.dtype(jnp.float32)}
    assert narrow.count(jnp.dtype(jnp.bfloat16)) == len(jax.tree.leaves(PARAMS))
    # bfloat16 keeps 8 bits of each step's momentum; ten steps of a rate of 0.01 move 0.1.
    tx: Any = rule(mu_dtype=jnp.bfloat16)
    if "lion" not in str(rule):  # the sign of a nearly cancelled momentum is decided by rounding
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.02), run(tx), run(rule()))


def test_one_minus_power_keeps_its_digits():
    from jaxopt_lab import _hyperparams

    t = np.arange(1, 2001)
    for b in (0.9, 0.99, 0.999, 0.9999):
        found = jax.vmap(lambda n, b=b: _hyperparams.one_minus_power(b, n, jnp.float32))(t)
        exact = -np.expm1(t * np.log(b))
        # 3e-7 is three units in the last place; `1 - b**t` is off by 2e-5 and 2e-4 here.
        np.testing.assert_allclose(found, exact, rtol=5e-7)
