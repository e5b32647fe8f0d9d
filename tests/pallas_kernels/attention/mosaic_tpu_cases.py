"""Attention programs to compile for absent TPUs, as `compile_in_child` expects them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import core
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.mosaic_tpu import ROUTE
from pallas_kernels.attention.problem import Operands, Settings

LENGTH = 2048


def program(
    *,
    width: int = 128,
    heads: int = 2,
    kv_heads: int = 2,
    length: int = LENGTH,
    dtype: str = "bfloat16",
    segments: bool = False,
    bias: tuple[int, ...] | None = None,
    causal: bool = True,
    backward: bool = True,
    prefixes: bool = False,
) -> tuple[Any, Any, Any]:
    """Returns attention over random-shaped inputs, with its gradients if `backward`."""

    def struct(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))

    query = struct(1, length, heads, width)
    key = struct(1, length, kv_heads, width)
    ids = struct(1, length, dtype="int32") if segments else None
    numbers = struct(1, dtype="int32") if prefixes else None
    mask = Mask(
        right=0 if causal else None,
        query_segment_ids=ids,
        key_value_segment_ids=ids,
        starts=numbers,
        prefix_lengths=numbers,
    )
    operands = Operands(query, key, key, bias=None if bias is None else struct(*bias), mask=mask)
    settings = Settings(scale=width**-0.5)
    if not backward:
        return lambda operands: core.attend(ROUTE, settings, operands)[0], (operands,), ()

    def gradients(operands: Operands, cotangent: jax.Array) -> Any:
        def fn(query: Any, key: Any, value: Any, bias: Any) -> jax.Array:
            changed = operands._replace(query=query, key=key, value=value, bias=bias)
            return core.attend(ROUTE, settings, changed)[0]

        output, vjp = jax.vjp(fn, operands.query, operands.key, operands.value, operands.bias)
        return output, vjp(cotangent)

    return gradients, (operands, query), ()


def width_64() -> Any:
    return program(width=64)


def width_128() -> Any:
    return program()


def width_256() -> Any:
    return program(width=256)


def full() -> Any:
    return program(causal=False, backward=False)


def float32() -> Any:
    return program(dtype="float32")


def grouped() -> Any:
    return program(heads=8, kv_heads=2, segments=True)


def with_bias() -> Any:
    return program(bias=(1, 2, LENGTH, LENGTH))


def with_key_bias() -> Any:
    return program(bias=(1, 1, 1, LENGTH))


def with_prefixes() -> Any:
    return program(prefixes=True)
