"""Attention by every code that runs here, under one signature."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels

Attention = Callable[..., Any]

ROUTES = ("mosaic_gpu", "mosaic_tpu", "triton", "chunked")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A problem with equal numbers of queries and keys."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    dtype: str
    feature: str | None = None  # "alibi" or "prefix", of a quarter of the keys

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        mask = "causal" if self.causal else "full"
        words = f"{self.batch}x{self.length} h{heads} d{self.head_dim} {mask} {self.dtype}"
        return words if self.feature is None else f"{words} {self.feature}"

    def arguments(self) -> dict[str, Any]:
        """What `pallas_kernels.attention` is given beside query, key and value."""
        given: dict[str, Any] = {"is_causal": self.causal}
        if self.feature == "alibi":
            given["bias"] = pallas_kernels.Alibi(pallas_kernels.alibi_slopes(self.heads))
        elif self.feature == "prefix":
            given["prefix_lengths"] = self.length // 4
        return given

    def dense_arguments(self) -> dict[str, Any]:
        """The same for a code that knows no rule: a bias or a mask over queries and keys."""
        given: dict[str, Any] = {"is_causal": self.causal}
        places = jnp.arange(self.length)
        if self.feature == "alibi":
            distances = jnp.abs(places[:, None] - places).astype(self.dtype)
            slopes = pallas_kernels.alibi_slopes(self.heads).astype(self.dtype)
            given["bias"] = -slopes[None, :, None, None] * distances
        elif self.feature == "prefix":
            seen = (places <= places[:, None]) | (places < self.length // 4)
            given = {"mask": seen[None, None]}
        return given

    def structs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Query, key and value, (B, T, N, d)."""
        return tuple(
            jax.ShapeDtypeStruct((self.batch, self.length, heads, self.head_dim), self.dtype)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )


def shapes(platform: str) -> tuple[Shape, ...]:
    """The named shapes for a kind of device: 16,384 tokens on accelerators, fewer on a CPU."""
    if platform == "cpu":
        return (
            *(
                Shape(1, length, 8, 8, 64, causal, dtype)
                for length in (256, 1024, 4096)
                for causal in (True, False)
                for dtype in ("float32", "bfloat16")
            ),
            Shape(1, 2048, 8, 2, 128, True, "float32"),
            *(Shape(1, 4096, 8, 8, 64, True, "float32", x) for x in ("alibi", "prefix")),
        )
    return (
        *(
            Shape(16384 // length or 1, length, 2048 // d, 2048 // d, d, causal, "bfloat16")
            for d in (64, 128, 256)
            for length in (2048, 4096, 16384, 32768)
            for causal in (False, True)
        ),
        Shape(4, 4096, 32, 8, 128, True, "bfloat16"),
        *(Shape(2, 8192, 16, 16, 128, True, "bfloat16", x) for x in ("alibi", "prefix")),
    )


def contenders(shape: Shape) -> dict[str, Attention | str]:
    """Returns every code by name, or the reason why it cannot serve `shape` here."""
    explained = pallas_kernels.explain(*shape.structs(), **shape.arguments())
    found: dict[str, Attention | str] = {}
    for name in ROUTES:
        reason = explained.refusals[name]
        found[name] = reason or functools.partial(
            pallas_kernels.attention, **shape.arguments(), implementation=name
        )
    found["jax.nn xla"] = _jax_nn(shape, "xla")
    platform = jax.default_backend()
    if platform == "gpu":
        found["jax.nn cudnn"] = _jax_nn(shape, "cudnn")
    if shape.feature is not None:
        return found
    found["pallas.ops"] = _shipped(shape, platform)
    if importlib.util.find_spec("tokamax") is None:
        found["tokamax"] = "is not installed"
    else:
        import tokamax  # pyright: ignore[reportMissingImports]

        found["tokamax"] = functools.partial(tokamax.dot_product_attention, is_causal=shape.causal)
    return found


def _jax_nn(shape: Shape, implementation: Any) -> Attention:
    """`jax.nn`'s function, which makes its dense bias or mask as a part of the program."""

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q, k, v, **shape.dense_arguments(), implementation=implementation
        )

    return attend


def _shipped(shape: Shape, platform: str) -> Attention | str:
    """The kernel that comes with jax for this platform."""
    scale = shape.head_dim**-0.5
    if shape.heads != shape.kv_heads:
        return "shares no keys between heads"
    if platform == "gpu":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            from jax.experimental.pallas.ops.gpu import attention as ops

        return lambda q, k, v: ops.mha(q, k, v, None, sm_scale=scale, causal=shape.causal)
    if platform == "tpu":
        from jax.experimental.pallas.ops.tpu import flash_attention as ops

        def flash(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
            output = ops.flash_attention(q, k, v, causal=shape.causal, sm_scale=scale)
            return output.swapaxes(1, 2)

        return flash
    return "has no kernel for a CPU"


def exact(shape: Shape, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The result of the next wider dtype, in linear memory: what errors are measured against."""
    wider = jnp.float64 if shape.dtype == "float32" else jnp.float32
    with jax.enable_x64(wider == jnp.float64):
        q, k, v = (x.astype(wider) for x in (q, k, v))
        found = pallas_kernels.attention(
            q, k, v, **shape.arguments(), implementation="chunked", precision="highest"
        )
        return found.astype(jnp.float32)
