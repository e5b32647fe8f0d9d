"""One small function of each kind of layer, as raw parameters, in Linen and in NNX."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxopt_lab import adapters

Dims = optax.contrib.MuonDimensionNumbers
STACKED = Dims((1,), (2,))


class Model(NamedTuple):
    """A function of parameters and one input."""

    params: Any
    apply: Any
    x: jax.Array
    targets: list[str]
    kernel_axes: dict[str, Any] | None = None


def draw(seed: int, *shape: int) -> jax.Array:
    # `jnp.asarray` would compile a program for each shape.
    return jax.device_put(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def raw() -> Model:
    params = {
        "up": {"kernel": draw(1, 6, 8), "bias": draw(2, 8)},
        "down": {"kernel": draw(3, 8, 6)},
    }

    def apply(params, x):
        hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
        return jnp.einsum("oh,bth->bto", params["down"]["kernel"].T, hidden)

    return Model(params, apply, draw(4, 2, 3, 6), ["up", "down"])


class LinenModel(nn.Module):
    """Attention and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attention")(x, x)
        return nn.Dense(6, name="dense")(x)


def linen() -> Model:
    model, x = LinenModel(), draw(5, 2, 3, 8)
    params = model.init(jax.random.key(1), x)["params"]
    names = ["query", "key", "value", "attention.out", "dense"]
    return Model(params, lambda p, x: model.apply({"params": p}, x), x, names)


class NnxModel(nnx.Module):
    """The same, in NNX."""

    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, 8, 8, decode=False, rngs=rngs)
        self.dense = nnx.Linear(8, 6, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.attention(x))


def nnx_state() -> Model:
    model = NnxModel(nnx.Rngs(3))
    graph, state = nnx.split(model, nnx.Param)
    names = ["query", "key", "value", "attention.out", "dense"]
    return Model(state, lambda p, x: nnx.merge(graph, p)(x), draw(6, 2, 3, 8), names)


def nnx_module() -> Model:
    return nnx_state()._replace(params=NnxModel(nnx.Rngs(3)), apply=lambda model, x: model(x))


def convolution() -> Model:
    layer = nn.Conv(5, (3, 2), strides=(2, 1), padding="SAME", name="Conv_0")
    x = draw(7, 2, 6, 5, 4)
    params = {"Conv_0": layer.init(jax.random.key(2), x)["params"]}
    return Model(
        params,
        lambda p, x: layer.apply({"params": p["Conv_0"]}, x),
        x,
        ["Conv_0"],
    )


def scanned() -> Model:
    params = {"layers": {"kernel": draw(8, 3, 6, 6) / 3, "bias": draw(9, 3, 6)}}

    def apply(params, x):
        @jax.checkpoint
        def layer(x, p):
            return jnp.tanh(x @ p["kernel"] + p["bias"]), None

        return jax.lax.scan(layer, x, params["layers"])[0]

    return Model(params, apply, draw(10, 4, 6), ["layers"], {"layers": STACKED})


def experts() -> Model:
    params = {"experts": {"kernel": draw(11, 3, 5, 6)}}

    def apply(params, x):
        return jnp.einsum("ebi,eio->beo", x, params["experts"]["kernel"])

    return Model(params, apply, draw(12, 3, 4, 5), ["experts"], {"experts": STACKED})


def used_otherwise() -> Model:
    """Kernels that no product can be split for."""
    params = {"w": draw(13, 6, 6), "tied": draw(14, 7, 6)}

    def apply(params, x):
        embedded = params["tied"][jnp.arange(4)]  # looked up, and multiplied below
        return (jnp.sin(params["w"]) @ (x + embedded).T).T @ params["tied"].T

    return Model(params, apply, draw(15, 4, 6), ["w", "tied"])


MODELS = {
    f.__name__: f
    for f in (
        raw, linen, nnx_state, nnx_module, convolution, scanned, experts, used_otherwise,
    )
}  # fmt: skip


@functools.cache
def model(name: str) -> Model:
    return MODELS[name]()


def config(m: Model, **changes) -> adapters.LoraConfig:
    arguments = {"target_modules": m.targets, "r": 2, "lora_alpha": 3} | changes
    return adapters.LoraConfig(kernel_axes=m.kernel_axes, **arguments)
