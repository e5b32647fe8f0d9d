"""Attention over a union of disjoint sets of keys, from the attention over each of them.

    w_i = exp(lse_i - max lse);   output = sum w_i output_i / sum w_i;   lse = log sum exp(lse_i)

A part without keys has lse -inf and weight 0. The rule is associative and commutative, which is
what split caches, rings of devices and chunked prefill rely on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _options
from pallas_kernels._dtypes import wide


def merge_attention(
    output1: jax.Array, lse1: jax.Array, output2: jax.Array, lse2: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Merges the attention of the same queries over two disjoint sets of keys.

    With ``m = max(lse1, lse2)`` and ``w_i = exp(lse_i - m)``::

        output = (w_1 output1 + w_2 output2) / (w_1 + w_2)
        lse    = m + log(w_1 + w_2)

    A part whose lse is -inf saw no key: whatever its output holds, NaN included, is ignored. Where
    both parts are empty the output is 0 and the lse -inf. Computed in float32 (float64 if an input
    is), and differentiable in all four arguments: gradients are finite, and those of an empty part
    are 0.

    Args:
      output1: Outputs over the first set of keys (..., T, N, dv), floating.
      lse1: Log-sum-exp of their scores (..., T, N), floating, in natural units.
      output2: Outputs over the second set, with the shape and dtype of `output1`.
      lse2: Their log-sum-exp, with the shape of `lse1`.

    Returns:
      The output in the dtype of `output1`, and the lse in float32 (float64 if an input is).

    Raises:
      ValueError: Shapes or dtypes do not belong together.

    Example:
      >>> ones = jnp.ones((1, 1, 1, 2))
      >>> zero = jnp.zeros((1, 1, 1))
      >>> output, lse = merge_attention(ones, zero, 3 * ones, zero)
      >>> output[0, 0, 0].tolist(), round(float(lse[0, 0, 0]), 4)
      ([2.0, 2.0], 0.6931)
    """
    output1, lse1, output2, lse2 = map(
        _options.array, ("output1", "lse1", "output2", "lse2"), (output1, lse1, output2, lse2)
    )
    if output1.ndim < 1 or output1.shape != output2.shape:
        raise ValueError(
            f"output2 has shape {output2.shape}; expected that of output1, {output1.shape}"
        )
    if output1.dtype != output2.dtype or not jnp.issubdtype(output1.dtype, jnp.floating):
        raise ValueError(
            f"output1 and output2 have dtypes {output1.dtype} and {output2.dtype}; expected one "
            "floating dtype for both"
        )
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        if lse.shape != output1.shape[:-1]:
            raise ValueError(
                f"{name} has shape {lse.shape}; expected {output1.shape[:-1]}, the shape of the "
                f"outputs {output1.shape} without its last axis"
            )
        if not jnp.issubdtype(lse.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {lse.dtype}; expected a floating dtype")
    dtype = wide(output1.dtype, lse1.dtype, lse2.dtype)
    output, lse = merge_parts(
        jnp.stack([output1.astype(dtype), output2.astype(dtype)]),
        jnp.stack([lse1.astype(dtype), lse2.astype(dtype)]),
    )
    return output.astype(output1.dtype), lse


def merge_parts(outputs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Merges any number of parts along the first axis: (P, ..., dv) and (P, ...), one float dtype.

    Returns the output (..., dv) and the lse (...).
    """
    # The maximum only shifts the exponents: detached everywhere, its derivative cancels exactly.
    peak = lax.stop_gradient(lses.max(axis=0))
    peak = jnp.where(peak == -jnp.inf, 0, peak)
    weights = jnp.exp(lses - peak[None])
    total = weights.sum(axis=0)
    empty = total == 0
    total = jnp.where(empty, 1, total)
    # Selected and not only multiplied by 0: an empty part may hold NaN.
    outputs = jnp.where(weights[..., None] > 0, outputs, 0)
    output = (weights[..., None] * outputs).sum(axis=0) / total[..., None]
    return output, jnp.where(empty, -jnp.inf, peak + jnp.log(total))
