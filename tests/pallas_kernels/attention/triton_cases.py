"""The Triton route's forward and backward pass, as `compile_in_child` expects programs."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import core, triton
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.problem import Operands, Settings

BATCH, LENGTH, HEADS, KV_HEADS = 2, 2048, 8, 4


def gradient(
    head_dim: int, dtype: Any = jnp.bfloat16, *, features: str = "causal", length: int = LENGTH
) -> Any:
    """Returns a program of values and gradients, with the blocks of the chip it is compiled for."""
    struct = jax.ShapeDtypeStruct
    query = struct((BATCH, length, HEADS, head_dim), dtype)
    key = struct((BATCH, length, KV_HEADS, head_dim), dtype)
    rest: dict[str, Any] = {}
    settings: dict[str, Any] = {}
    if features in ("bias", "full bias"):
        batch = BATCH if features == "full bias" else 1
        rest["bias"] = struct((batch, HEADS, length, length), dtype)
    if features in ("segments", "everything"):
        ids = struct((BATCH, length), jnp.int32)
        rest |= {"query_segment_ids": ids, "key_value_segment_ids": ids}
    if features == "everything":
        settings = {"soft_cap": 30.0, "dropout_rate": 0.1}
        rest |= {
            "bias": struct((BATCH, 1, 1, length), jnp.float32),
            "dense": struct((1, 1, length, length), jnp.bool_),
            "query_lengths": struct((BATCH,), jnp.int32),
            "sinks": struct((HEADS,), jnp.float32),
            "seeds": struct((BATCH, HEADS), jnp.int32),
        }

    if features == "by rule":
        rest["diagonals"] = struct((1, HEADS, 2 * length - 1), jnp.float32)
    if features == "prefixes":
        rest |= {name: struct((BATCH,), jnp.int32) for name in ("starts", "prefix_lengths")}

    def fn(query: Any, key: Any, value: Any, cotangents: Any, rest: Any) -> Any:
        others = ("bias", "sinks", "seeds", "diagonals")
        arrays = {name: rest.get(name) for name in others[:2]}
        of_mask = {k: v for k, v in rest.items() if k not in others}

        def attend(query: Any, key: Any, value: Any, bias: Any, sinks: Any) -> Any:
            mask = Mask(right=0, **of_mask)
            last = (rest.get(name) for name in others[2:])
            operands = Operands(query, key, value, bias, sinks, mask, *last)
            return core.attend(triton.ROUTE, Settings(head_dim**-0.5, **settings), operands)

        out, vjp = jax.vjp(attend, query, key, value, *arrays.values())
        return out, vjp(cotangents)

    lse = struct((BATCH, HEADS, length), jnp.float32)
    return fn, (query, key, key, (query, lse), rest), ()


causal_64 = functools.partial(gradient, 64)
causal_128 = functools.partial(gradient, 128)
causal_256 = functools.partial(gradient, 256)
bias_64 = functools.partial(gradient, 64, features="bias")
full_bias_64 = functools.partial(gradient, 64, features="full bias")
segments_64 = functools.partial(gradient, 64, features="segments")
everything_64 = functools.partial(gradient, 64, features="everything")
by_rule_64 = functools.partial(gradient, 64, features="by rule")
by_rule_128 = functools.partial(gradient, 128, features="by rule")
by_rule_256 = functools.partial(gradient, 256, features="by rule")
prefixes_64 = functools.partial(gradient, 64, features="prefixes")
ragged_80 = functools.partial(gradient, 80, length=2000)
float32_64 = functools.partial(gradient, 64, jnp.float32)
