"""Checks the arguments of `cross_entropy` and brings them into the one form that all take.

Every error is raised while tracing and names the argument, what was found and what was expected.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _compat, _options
from pallas_kernels._dtypes import wide
from pallas_kernels.loss.problem import Operands, Settings, Tokens

REDUCTIONS = ("mean", "sum", "none")


class Canonical(NamedTuple):
    """A checked call."""

    settings: Settings
    operands: Operands
    tokens: Tokens


def canonical(
    hidden: Any,
    weight: Any,
    labels: Any,
    bias: Any,
    *,
    class_weights: Any,
    ignore_index: int | None,
    label_smoothing: float,
    z_loss: float,
    logits_soft_cap: float | None,
    vocabulary_axis: int,
    axis_name: Any,
    precision: Any,
    block_vocabulary: int | None,
    block_tokens: int | None,
) -> Canonical:
    """Returns the call in canonical form; see `cross_entropy` for the arguments.

    Raises:
      ValueError: A shape or a value is wrong.
      TypeError: A dtype is wrong.
    """
    hidden, weight = _options.floating("hidden", hidden), _options.floating("weight", weight)
    labels = _options.array("labels", labels)
    axis = _vocabulary_axis(vocabulary_axis)
    _check_arrays(hidden, weight, labels, axis)
    own = weight.shape[axis]
    shards, first = _shards(_options.hashable("axis_name", axis_name), own)
    dtype = wide(hidden.dtype)
    bias = None if bias is None else _of_classes("bias", bias, own)
    if class_weights is not None:
        class_weights = _of_classes("class_weights", class_weights, own)
        class_weights = lax.stop_gradient(class_weights.astype(dtype))

    inside = (labels >= 0) & (labels < min(own * shards, jnp.iinfo(labels.dtype).max + 1))
    counted, known = None, inside
    if ignore_index is not None:
        ignore_index = _options.index("ignore_index", ignore_index)
        low, high = jnp.iinfo(labels.dtype).min, jnp.iinfo(labels.dtype).max
        if low <= ignore_index <= high:
            counted = labels != jnp.asarray(ignore_index, labels.dtype)
            known = inside | ~counted
            inside &= counted
    labels = jnp.where(inside, labels, 0).astype(jnp.int32) - first
    labels = jnp.where(inside, labels, -1)

    settings = Settings(
        vocabulary=own * shards,
        vocabulary_axis=axis,
        soft_cap=_options.soft_cap(logits_soft_cap),
        label_smoothing=_in_range("label_smoothing", label_smoothing, 1),
        z_loss=_in_range("z_loss", z_loss, math.inf),
        precision=_options.precision(precision),
        axis_name=axis_name,
        block_vocabulary=_block_vocabulary(block_vocabulary, own, labels.size),
        block_tokens=_block_tokens(block_tokens, labels.size, hidden.shape[-1]),
    )
    operands = Operands(hidden, weight, labels, bias, class_weights)
    # Arguments that are equal on all devices of a `shard_map` have gradients that are summed over
    # them, which is what the transpose of this cast does.
    axes = _compat.varying_axes(*jax.tree.leaves(operands))
    operands = jax.tree.map(lambda x: _compat.vary(x, axes), operands)
    weights = total = None
    if class_weights is not None:
        weights, total = _weights_of_labels(class_weights, labels, axis_name)
    return Canonical(settings, operands, Tokens(counted, known, weights, total))


def _vocabulary_axis(axis: Any) -> int:
    axis = _options.index("vocabulary_axis", axis)
    if axis not in (0, 1, -1, -2):
        raise ValueError(
            f"vocabulary_axis={axis}; expected 1 for a weight (width, vocabulary), or 0 for "
            "(vocabulary, width)"
        )
    return axis % 2


def _check_arrays(hidden: jax.Array, weight: jax.Array, labels: jax.Array, axis: int) -> None:
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels has dtype {labels.dtype}; expected integers, one class a token")
    if hidden.ndim == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden has shape {hidden.shape}; expected (..., width)")
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"weight has shape {weight.shape}; expected (width, vocabulary)")
    width = hidden.shape[-1]
    if weight.shape[1 - axis] != width:
        other = f"; with vocabulary_axis={1 - axis} it would" if weight.shape[axis] == width else ""
        raise ValueError(
            f"weight has shape {weight.shape}, whose axis {1 - axis} is not the width {width} of "
            f"hidden {hidden.shape} (vocabulary_axis={axis}){other}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"labels has shape {labels.shape}; expected {hidden.shape[:-1]}, hidden's without width"
        )


def _shards(axis_name: Any, own: int) -> tuple[int, Any]:
    """Returns how many parts the vocabulary has, and the first class of this one."""
    if axis_name is None:
        return 1, 0
    try:
        return lax.axis_size(axis_name), lax.axis_index(axis_name).astype(jnp.int32) * own
    except (NameError, TypeError) as error:
        raise ValueError(
            f"axis_name={axis_name!r} is no axis here; expected that of a shard_map or vmap around "
            "this call, over which the vocabulary of weight is split"
        ) from error


def _of_classes(name: str, value: Any, vocabulary: int) -> jax.Array:
    x = _options.floating(name, value)
    if x.shape != (vocabulary,):
        raise ValueError(
            f"{name} has shape {x.shape}; expected ({vocabulary},), one for each class"
        )
    return x


def _in_range(name: str, value: Any, high: float) -> float:
    value = _options.number(name, value)
    if not 0 <= value <= high or math.isinf(value):
        limit = "at least 0" if math.isinf(high) else f"from 0 to {high}"
        raise ValueError(f"{name}={value}; expected a number {limit}")
    return value


def _weights_of_labels(
    class_weights: jax.Array, labels: jax.Array, axis_name: Any
) -> tuple[jax.Array, jax.Array]:
    """Returns the weight of each token's class, and the sum of all classes'."""
    own = (labels >= 0) & (labels < class_weights.shape[0])
    weights = jnp.where(own, class_weights[jnp.where(own, labels, 0)], 0)
    total = class_weights.sum()
    return (weights, total) if axis_name is None else lax.psum((weights, total), axis_name)


def _block_vocabulary(given: Any, length: int, tokens: int) -> int:
    """Returns blocks of about equal sizes, whose logits fit a cache or fill an accelerator."""
    if given is not None:
        return min(_options.positive_index("block_vocabulary", given), length)
    entries = 2**21 if _compat.device().platform == "cpu" else 2**23
    most = max(512, entries // max(1, tokens)) if isinstance(tokens, int) else 512
    if length <= most:
        return length
    even = math.ceil(length / math.ceil(length / most))
    return min(length, -(-even // 128) * 128)


def _block_tokens(given: Any, tokens: int, width: int) -> int:
    """Returns how many tokens have all their logits in memory at once.

    Each step reads and writes the gradient of the weight, so few steps are fast; by default the
    logits of one are an eighth of that gradient. What divides the tokens needs no padding.
    """
    most = max(8, width // 8) if given is None else _options.positive_index("block_tokens", given)
    if not isinstance(tokens, int) or tokens <= most:  # symbolic, in a program to be exported
        return most
    fewest = -(-tokens // most)
    parts = next((x for x in range(fewest, 2 * fewest) if tokens % x == 0), fewest)
    return -(-tokens // parts)
