"""Dropout on the inputs of the low-rank branch: whose, how often, and where it cannot be.

With zero kernels and identity factors of full rank the layer's output is s times the inputs that
are left, so that each mask can be read off.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import adapters
from tests.adapters import models

KEY = jax.random.key(0)
WIDTH = 8
RATE = 0.25
KEPT = 1 / (1 - RATE)


def config(targets: Any = "all-linear", **changes):
    arguments: dict[str, Any] = {"r": WIDTH, "lora_alpha": WIDTH, "lora_dropout": RATE} | changes
    return adapters.LoraConfig(target_modules=targets, **arguments)


def identities(params, lora):
    base, factors = adapters.init_adapters(params, lora, KEY)

    def whole(x):
        return jnp.broadcast_to(jnp.eye(*x.shape[-2:]), x.shape)

    return base, jax.tree.map(whole, factors)


def ones(*shape):
    return jnp.ones((*shape, WIDTH))


def test_inputs_are_dropped_one_by_one_and_the_rest_divided():
    base, factors = identities({"w": jnp.zeros((WIDTH, WIDTH))}, config())
    model = jax.jit(adapters.factored(lambda p, x: x @ p["w"]))
    x = models.draw(1, 500, WIDTH)
    found = model(base, factors, x, key=KEY)
    dropped = found == 0
    np.testing.assert_allclose(found, np.where(dropped, 0, KEPT * x), 1e-6)
    # 4000 independent draws: five standard deviations of the mean are 0.034.
    assert abs(np.mean(dropped) - RATE) < 0.035
    assert abs(np.corrcoef(dropped[:, 0], dropped[:, 1])[0, 1]) < 0.25  # five of 1/sqrt(500)
    again = model(base, factors, x, key=KEY)
    other = model(base, factors, x, key=jax.random.key(1))
    np.testing.assert_array_equal(again, found)
    assert (np.asarray(other == 0) != dropped).any()
    raw = model(base, factors, x, key=jax.random.key_data(KEY))
    np.testing.assert_array_equal(raw, found)
    # Evaluation has none, and the layer's own product never has.
    np.testing.assert_allclose(model(base, factors, x), x, 1e-6)
    full, _ = adapters.init_adapters({"w": jnp.eye(WIDTH)}, config(), KEY)
    np.testing.assert_allclose(model(full, factors, x, key=KEY), x + found, 1e-6)


def test_the_backward_pass_has_the_masks_of_the_forward_pass():
    base, factors = identities({"w": jnp.zeros((WIDTH, WIDTH))}, config())
    x = ones(4)

    def loss(factors, x):
        model = jax.checkpoint(lambda f, x: adapters.factored(lambda p, x: x @ p["w"])(
            base, f, x, key=KEY))  # fmt: skip
        return jnp.sum(model(factors, x))

    out = adapters.factored(lambda p, x: x @ p["w"])(base, factors, x, key=KEY)
    slope, of_x = jax.grad(loss, (0, 1))(factors, x)
    np.testing.assert_allclose(of_x, out, 1e-6)
    np.testing.assert_allclose(
        slope["w"]["lora_b"], jnp.tile(out.sum(0)[:, None], (1, WIDTH)), 1e-5
    )


def masks_differ(out):
    """Whether all rows of an array of outputs of ones have another mask."""
    rows = {tuple(row) for row in np.asarray(out == 0).reshape(out.shape[0], -1)}
    return len(rows) == out.shape[0]


def test_each_layer_use_and_step_has_a_mask_of_its_own():
    square = jnp.zeros((WIDTH, WIDTH))
    x = ones(6)

    def layers(p, x):
        return jnp.stack([x @ p["a"], x @ p["b"]])

    def uses(p, x):
        return jnp.stack([x @ p["a"], x @ p["a"], jax.jit(lambda x: x @ p["a"])(x)])

    def steps(p, x):  # one kernel at each step
        @jax.checkpoint
        def step(carry, _):
            return carry, x @ p["a"]

        return jax.lax.scan(step, 0, length=4)[1]

    def stack(p, x):  # another kernel at each step, each used twice
        def step(carry, kernel):
            return carry, jnp.stack([x @ kernel, x @ kernel])

        return jax.lax.scan(step, 0, p["layers"])[1].reshape(6, *x.shape)

    def nested(p, x):  # a stack that is walked over again and again
        def outer(carry, _):
            return carry, stack(p, x)

        return jax.lax.scan(outer, 0, length=2)[1].reshape(12, *x.shape)

    single, two = {"a": square}, {"a": square, "b": square}
    many = {"layers": jnp.zeros((3, WIDTH, WIDTH))}
    axes = {"layers": models.STACKED}
    for fun, params in [
        (layers, two), (uses, single), (steps, single), (stack, many), (nested, many),
    ]:  # fmt: skip
        lora = config(kernel_axes=axes if params is many else None)
        base, factors = identities(params, lora)
        out = jax.jit(adapters.factored(fun))(base, factors, x, key=KEY)
        assert masks_differ(out), fun.__name__
        assert set(np.unique(np.asarray(out).round(5))) == {0, np.float32(KEPT).round(5)}
        np.testing.assert_allclose(adapters.factored(fun)(base, factors, x), jnp.ones_like(out))


@pytest.mark.parametrize("name", ["convolution", "scanned", "experts"])
def test_the_mean_over_masks_is_the_function_without(name):
    """The branch is linear in the mask, whose mean is one."""
    m = models.MODELS[name]()
    lora = adapters.LoraConfig(
        target_modules=m.targets[:1], r=2, lora_dropout=RATE, kernel_axes=m.kernel_axes
    )
    base, factors = adapters.init_adapters(m.params, lora, KEY)
    factors = jax.tree.map(lambda x: 0.02 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), factors)
    model = adapters.factored(m.apply)
    expected = model(base, factors, m.x)
    keys = jax.random.split(KEY, 400)
    found = jax.jit(jax.vmap(lambda key: model(base, factors, m.x, key=key)))(keys)
    spread = np.std(found, 0)
    assert spread.max() > 0
    # Six standard deviations of a mean of 400, and the small curvature of what comes after.
    bound = 6 * spread.max() / 20 + 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(np.mean(found, 0), expected, 0, bound)


def test_embeddings_that_are_looked_up_have_none():
    params = {"embed": {"embedding": jnp.zeros((5, WIDTH))}, "w": jnp.zeros((WIDTH, WIDTH))}
    base, factors = identities(params, config(["embed", "w"]))

    def model(p, tokens):
        return p["embed"]["embedding"][tokens]

    tokens = jnp.arange(5)
    np.testing.assert_array_equal(
        adapters.factored(model)(base, factors, tokens, key=KEY), jnp.eye(5, WIDTH)
    )


def test_where_dropout_cannot_be_it_is_refused_by_name():
    params = {"w": jnp.zeros((WIDTH, WIDTH))}
    base, factors = identities(params, config())
    with pytest.raises(ValueError, match=r"apply_adapters has no dropout.*lora_dropout=0.25"):
        adapters.apply_adapters(base, factors)
    np.testing.assert_array_equal(adapters.merge_adapters(base, factors).params["w"], jnp.eye(8))

    def branch(p, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ p["w"], lambda: x)

    for fun in (branch, lambda p, x: x @ jnp.sin(p["w"])):
        adapters.factored(fun)(base, factors, ones(1))
        with pytest.raises(ValueError, match=r"lora_dropout=0.25 cannot act on kernel 'w'"):
            adapters.factored(fun)(base, factors, ones(1), key=KEY)
    grouped = nn.Conv(8, (3,), feature_group_count=2)
    x = ones(1, 5)
    conv = {"Conv_0": grouped.init(KEY, x)["params"]}
    axes = {"Conv_0": models.Dims((0, 1), (2,))}
    base, factors = adapters.init_adapters(conv, config(["Conv_0"], r=2, kernel_axes=axes), KEY)
    with pytest.raises(ValueError, match="kernel 'Conv_0/kernel', which is not used"):
        adapters.factored(lambda p, x: grouped.apply({"params": p["Conv_0"]}, x))(
            base, factors, x, key=KEY
        )
    for key in (0, jax.random.split(KEY), jnp.ones(3)):
        with pytest.raises(TypeError, match="key must be one random key"):
            adapters.factored(branch)(base, factors, ones(1), key=key)
    with pytest.raises(ValueError, match=r"lora_dropout=0.25 needs layers that use K"):
        config(use_dora=True)
    with pytest.raises(ValueError, match=r"lora_dropout=0.1 needs layers that use K"):
        adapters.PerpConfig(target_modules=["w"], lora_dropout=0.1)
    adapters.PerpConfig(target_modules=["w"], lora_dropout=0.1, form="lora_prune")
    for rate in (1.0, -0.1):
        with pytest.raises(ValueError, match=r"lora_dropout must be in \[0, 1\)"):
            config(lora_dropout=rate)
