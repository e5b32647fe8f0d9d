"""The models of `models` that can be built here, in their own containers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

LAYERS, WIDTH, HIDDEN, TOKENS = 3, 8, 20, 50


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(y)
        hidden = nn.gelu(nn.Dense(HIDDEN)(x))
        return x + nn.Dense(WIDTH)(hidden), None


class Linen(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(TOKENS, WIDTH)(tokens)
        if self.scanned:
            scan = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            block = nn.scan(Block, length=LAYERS, **scan)()
        else:
            block = Block()
        return nn.Dense(TOKENS, name="head")(nn.LayerNorm()(block(x, None)[0]))


def _linen(scanned: bool) -> Any:
    init = Linen(scanned).init
    return jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 5), jnp.int32))["params"]


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)


class Nnx(nnx.Module):
    def __init__(self, scanned: bool, rngs: nnx.Rngs):
        self.embed = nnx.Embed(TOKENS, WIDTH, rngs=rngs)
        if scanned:
            self.blocks = nnx.split_rngs(splits=LAYERS)(nnx.vmap(NnxBlock))(rngs)
        else:
            self.blocks = nnx.List([NnxBlock(rngs)])
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, TOKENS, use_bias=False, rngs=rngs)


def _nnx(scanned: bool) -> Any:
    return nnx.state(nnx.eval_shape(lambda: Nnx(scanned, nnx.Rngs(0))), nnx.Param)


def _equinox() -> Any:
    import equinox as eqx

    class Block(eqx.Module):
        norm: Any
        first: Any
        second: Any

        def __init__(self, key):
            self.norm = eqx.nn.LayerNorm(WIDTH)
            self.first = eqx.nn.Linear(WIDTH, HIDDEN, key=key)
            self.second = eqx.nn.Linear(HIDDEN, WIDTH, use_bias=False, key=key)

    class Model(eqx.Module):
        embedding: Any
        blocks: Any
        attention: Any
        convolution: Any
        depthwise: Any
        lstm: Any
        gru: Any
        norm: Any
        head: Any

        def __init__(self, key):
            self.embedding = eqx.nn.Embedding(TOKENS, WIDTH, key=key)
            self.blocks = eqx.filter_vmap(Block)(jax.random.split(key, LAYERS))
            self.attention = eqx.nn.MultiheadAttention(2, WIDTH, key=key)
            self.convolution = eqx.nn.Conv2d(3, 6, 1, key=key)
            self.depthwise = eqx.nn.Conv2d(6, 6, 3, groups=6, key=key)
            self.lstm = eqx.nn.LSTMCell(WIDTH, WIDTH, key=key)
            self.gru = eqx.nn.GRUCell(WIDTH, WIDTH, key=key)
            self.norm = eqx.nn.LayerNorm(WIDTH)
            self.head = eqx.nn.Linear(WIDTH, TOKENS, key=key)

    model = eqx.filter_eval_shape(Model, jax.random.key(0))
    return eqx.filter(model, lambda x: isinstance(x, jax.ShapeDtypeStruct))


BUILT: dict[str, Callable[[], Any]] = {
    "linen_transformer": lambda: _linen(False),
    "linen_transformer_scanned": lambda: _linen(True),
    "nnx_transformer": lambda: _nnx(False),
    "nnx_transformer_scanned": lambda: _nnx(True),
}
if importlib.util.find_spec("equinox"):
    BUILT["equinox"] = _equinox
