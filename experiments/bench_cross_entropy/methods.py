"""An output layer and its loss by every code that runs here, under one signature."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import pallas_kernels

Loss = Callable[..., jax.Array]  # hidden, weight, labels

BASE = "plain"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Tokens, width of the hidden states, and classes."""

    tokens: int
    width: int
    vocabulary: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.tokens} tokens x {self.width}, {self.vocabulary} classes, {self.dtype}"

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads ``tokens,width,vocabulary,dtype``."""
        *sizes, dtype = text.split(",")
        tokens, width, vocabulary = map(int, sizes)
        return cls(tokens, width, vocabulary, jnp.dtype(dtype).name)

    def draw(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns hidden, weight and labels, whose logits have a variance of one."""
        keys = jax.random.split(jax.random.key(0), 3)
        hidden = jax.random.normal(keys[0], (self.tokens, self.width), self.dtype)
        weight = jax.random.normal(keys[1], (self.width, self.vocabulary), self.dtype)
        labels = jax.random.randint(keys[2], (self.tokens,), 0, self.vocabulary)
        return hidden, weight * self.width**-0.5, labels


def shapes(platform: str) -> tuple[Shape, ...]:
    """The shapes for a kind of device."""
    if platform == "cpu":
        return (
            Shape(1024, 512, 16384, "float32"),
            Shape(4096, 1024, 65536, "float32"),
            Shape(1024, 512, 16384, "bfloat16"),
        )
    return (Shape(8192, 2048, 152064, "bfloat16"), Shape(8192, 4096, 32000, "bfloat16"))


def contenders() -> dict[str, Loss]:
    """Returns every code by name."""
    ours = pallas_kernels.cross_entropy
    return {
        BASE: plain,
        "cross_entropy": ours,
        "gradient in forward": functools.partial(ours, gradient_in_forward=True),
    }


def plain(hidden: jax.Array, weight: jax.Array, labels: jax.Array) -> jax.Array:
    """Logits in float32, and optax's loss of them."""
    logits = jnp.matmul(hidden, weight, preferred_element_type=jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def passes(loss: Loss) -> dict[str, Callable[..., Any]]:
    """The programs that are timed."""
    return {"forward": loss, "gradient": jax.value_and_grad(loss, (0, 1))}
