"""Programs of the route "mosaic_gpu" to compile for absent chips: a forward and a backward pass."""

from __future__ import annotations

import functools
import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp

from pallas_kernels.attention import core
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.mosaic_gpu import ROUTE
from pallas_kernels.attention.problem import Operands, Settings

BATCH, LENGTH, HEADS, KV_HEADS = 2, 2048, 8, 2
HEAD_DIMS = (64, 128, 256)


def _gradients(
    head_dim: int,
    *,
    dtype: Any = jnp.bfloat16,
    length: int = LENGTH,
    window: int | None = None,
    causal: bool = False,
    soft_cap: float | None = None,
    bias_dtype: Any = None,
    segments: bool = False,
    dropout_rate: float = 0.0,
    prefixes: bool = False,
) -> tuple[Any, tuple[Any, ...], tuple[()]]:
    def array(*shape: int, dtype: Any = dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    ids = array(BATCH, length, dtype=jnp.int32) if segments else None
    operands = Operands(
        query=array(BATCH, length, HEADS, head_dim),
        key=array(BATCH, length, KV_HEADS, head_dim),
        value=array(BATCH, length, KV_HEADS, head_dim),
        bias=None if bias_dtype is None else array(1, HEADS, length, length, dtype=bias_dtype),
        mask=Mask(
            left=window,
            right=0 if causal else None,
            query_segment_ids=ids,
            key_value_segment_ids=ids,
            starts=array(BATCH, dtype=jnp.int32) if prefixes else None,
            prefix_lengths=array(BATCH, dtype=jnp.int32) if prefixes else None,
        ),
        seeds=array(BATCH, HEADS, dtype=jnp.int32) if dropout_rate else None,
    )
    settings = Settings(scale=head_dim**-0.5, soft_cap=soft_cap, dropout_rate=dropout_rate)

    def fn(operands: Operands, cotangent: jax.Array) -> Any:
        def attend(query: Any, key: Any, value: Any, bias: Any) -> Any:
            inputs = operands._replace(query=query, key=key, value=value, bias=bias)
            return cast(Any, core.differentiable(ROUTE, settings, inputs))[0]

        output, vjp = cast(Any, jax.vjp(attend, *operands[:4]))
        return output, vjp(cotangent)

    return fn, (operands, operands.query), ()


KINDS = {
    "plain": {},
    "causal": {"causal": True},
    "causal_window_cap": {"causal": True, "window": 500, "soft_cap": 30.0},
    "prefixes": {"causal": True, "prefixes": True},
    "bias_segments": {"bias_dtype": jnp.bfloat16, "segments": True},
    "float32_bias": {"bias_dtype": jnp.float32},
    "ragged_dropout": {"length": 1001, "dropout_rate": 0.1, "dtype": jnp.float16},
}

for (_kind, _options), _d in itertools.product(KINDS.items(), HEAD_DIMS):
    globals()[f"{_kind}_{_d}"] = functools.partial(_gradients, _d, **_options)
