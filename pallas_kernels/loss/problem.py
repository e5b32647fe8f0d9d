"""What every implementation gets: arrays in one form, and the settings that are static."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax

from pallas_kernels import _compat
from pallas_kernels._dtypes import wide


class Operands(NamedTuple):
    """The arrays that make logits. D width, V vocabulary (of this shard); ... axes of tokens."""

    hidden: jax.Array  # (..., D)
    weight: jax.Array  # (D, V), or (V, D) with `Settings.vocabulary_axis` 0; any floating dtype
    labels: jax.Array  # int32 (...), counted from this shard's first class; others match none
    bias: jax.Array | None = None  # (V,)
    class_weights: jax.Array | None = None  # `wide` (V,)


class Tokens(NamedTuple):
    """What is known of each token before there are logits."""

    counted: jax.Array | None  # bool (...), False where ignored; None: all count
    known: jax.Array  # bool (...), False where a counted label names no class
    weights: jax.Array | None  # `wide` (...), the class weight of the label; None: all 1
    total: jax.Array | None  # `wide` (), the sum of all class weights


class Rows(NamedTuple):
    """Sums over a row of logits s, each (...) in `wide`."""

    lse: jax.Array  # log sum exp s
    picked: jax.Array  # s of the label, 0 where the label is another shard's
    total: jax.Array | None  # sum of class weight times s; None without label smoothing


class Settings(NamedTuple):
    """What is known at trace time and hashable."""

    vocabulary: int  # the number of classes, of all shards
    vocabulary_axis: int  # of the weight
    soft_cap: float | None
    label_smoothing: float
    z_loss: float
    precision: Any
    axis_name: Hashable  # over which the vocabulary is sharded
    block_vocabulary: int
    block_tokens: int  # of the plan with gradients in the forward pass

    @property
    def smooths(self) -> bool:
        """Whether sums of whole rows are needed."""
        return self.label_smoothing != 0


def product_dtype(hidden: jax.Array, backward: bool = False) -> Any:
    """Returns the dtype of what is multiplied: the hidden states', or float32 where that is better.

    A CPU multiplies nothing less than float32. The gradient of a logit is the part of one class in
    the mean of all tokens, which is 0 in float16.
    """
    if _compat.device().platform == "cpu" or (backward and hidden.dtype == "float16"):
        return wide(hidden.dtype)
    return hidden.dtype
