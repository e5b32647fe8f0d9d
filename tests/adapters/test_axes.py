"""Which axes of a kernel are inputs and outputs, without a word from the user."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxopt_lab import adapters
from tests.adapters import models

KEY = jax.random.key(0)
HEADS = ((), (0,), (1, 2))
OUT = ((), (0, 1), (2,))


def window(rank):
    return (), tuple(range(rank + 1)), (rank + 1,)


class Attention(nn.Module):
    bias: bool

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(
            2, qkv_features=4, use_bias=self.bias, name="attention"
        )(x, x)


class Convolution(nn.Module):
    sizes: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @nn.compact
    def __call__(self, x):
        if self.transposed:
            return nn.ConvTranspose(6, self.sizes)(x)
        return nn.Dense(3)(nn.Conv(6, self.sizes, feature_group_count=self.groups)(x))


def nnx_attention(bias):
    return nnx.MultiHeadAttention(2, 8, 4, 8, use_bias=bias, decode=False, rngs=nnx.Rngs(0))


ATTENTION = {"query": HEADS, "key": HEADS, "value": HEADS, "out": OUT}
CASES = {
    # Two heads of two: no more than the shapes of all four tells them from stacks.
    "linen attention": (Attention(True), (2, 3, 8), ATTENTION),
    "linen attention without biases": (Attention(False), (2, 3, 8), ATTENTION),
    "nnx attention": (nnx_attention(True), (2, 3, 8), ATTENTION),
    "nnx attention without biases": (nnx_attention(False), (2, 3, 8), ATTENTION),
    "conv 1-D": (Convolution((3,)), (2, 7, 4), {"Conv_0": window(1)}),
    "conv 2-D": (Convolution((3, 2)), (2, 5, 5, 4), {"Conv_0": window(2)}),
    "conv 3-D": (Convolution((2, 3, 2)), (2, 4, 4, 4, 4), {"Conv_0": window(3)}),
    "conv 1-D in groups": (Convolution((3,), 2), (2, 7, 4), {"Conv_0": window(1)}),
    "conv transposed": (Convolution((3,), 1, True), (2, 7, 4), {"ConvTranspose_0": window(1)}),
}


def function(layer, x):
    """Returns the parameters of a layer, and a function of them."""
    if isinstance(layer, nnx.Module):
        graph, params = nnx.split(layer, nnx.Param)
        return params, lambda p, x: nnx.merge(graph, p)(x)
    return layer.init(KEY, x)["params"], lambda p, x: layer.apply({"params": p}, x)


@pytest.mark.parametrize("name", CASES)
def test_layers_of_flax_need_no_axes(name):
    layer, shape, expected = CASES[name]
    x = models.draw(3, *shape)
    params, apply = function(layer, x)
    config = adapters.LoraConfig(target_modules=list(expected), r=2)
    base, factors = adapters.init_adapters(params, config, KEY)
    assert {k.name.split("/")[-2]: k.axes for k in base.kernels} == expected
    factors = jax.tree.map(lambda x: 0.3 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), factors)
    whole = jax.jit(lambda f, x: apply(adapters.apply_adapters(base, f), x))(factors, x)
    split = jax.jit(lambda f, x: adapters.factored(apply)(base, f, x))(factors, x)
    np.testing.assert_allclose(split, whole, 0, 1e-5 * np.abs(whole).max())
    assert np.abs(whole - apply(params, x)).max() > 0.01


def test_a_depthwise_kernel_is_told_apart_by_its_shape():
    params = {
        "Conv_0": {"kernel": jnp.ones((3, 1, 6)), "bias": jnp.ones(6)},
        "Conv_1": {"kernel": jnp.ones((3, 6, 6)), "bias": jnp.ones(6)},
    }
    config = adapters.LoraConfig(target_modules="all-linear", r=1)
    assert [kernel.name for kernel in config.kernels(params)] == ["Conv_1/kernel"]
    config = adapters.LoraConfig(target_modules=["Conv_0"], r=1)
    assert config.kernels(params)[0].axes == window(1)


@pytest.mark.parametrize(
    "shapes",
    [
        {"query": (4, 4, 4), "key": (4, 4, 4), "value": (4, 4, 4), "out": (4, 4, 4)},
        {"query": (16, 4, 4), "key": (16, 4, 4), "value": (16, 4, 4), "out": (16, 4, 4)},
        {"query": (16, 4, 4), "key": (16, 4, 4), "value": (16, 4, 4)},
    ],
)
def test_what_may_be_a_stack_must_be_named(shapes):
    params = {"attention": {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}}
    config = adapters.LoraConfig(target_modules=["query"], r=2)
    with pytest.raises(ValueError, match=r"'attention/query/kernel' of shape .* cannot be known"):
        config.kernels(params)
    named = adapters.LoraConfig(target_modules=["query"], r=2, kernel_axes=adapters.FLAX_KERNELS)
    assert named.kernels(params)[0].axes == HEADS


def test_the_table_of_flax_knows_every_convolution():
    """Of these alone nothing tells the first size of a window from a number of layers."""
    for sizes in ((3,), (3, 2), (3, 3, 3), (2, 3, 3)):
        params = {"my_conv": {"kernel": jnp.ones((*sizes, 4, 6))}}
        config = adapters.LoraConfig(
            target_modules=["my_conv"], r=2, kernel_axes=adapters.FLAX_KERNELS
        )
        assert config.kernels(params)[0].axes == window(len(sizes))
    # Axes of one's own are taken at their word.
    own = {"my_conv": models.Dims((-4, -3, -2), (-1,))}
    config = adapters.LoraConfig(target_modules=["my_conv"], r=2, kernel_axes=own)
    params = {"my_conv": {"kernel": jnp.ones((2, 3, 3, 4, 6))}}
    assert config.kernels(params)[0].axes == ((0,), (1, 2, 3), (4,))
