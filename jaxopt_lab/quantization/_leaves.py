"""The leaves of an inner state and their codecs: choosing, decoding, encoding."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Set
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _hyperparams, _tree
from jaxopt_lab.quantization.codecs import Bfloat16, Codec, Int8

CodecChoice = Codec | Callable[[str, Any], Codec | None]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["encoded"], meta_fields=["codec", "dtype"]
)
@dataclasses.dataclass(frozen=True)
class EncodedLeaf:
    """One leaf of the inner state as its codec left it."""

    encoded: Any  # arrays
    codec: Codec
    dtype: np.dtype  # of the decoded leaf

    def decode(self) -> jax.Array:
        """Returns the leaf that the inner transformation sees."""
        return self.codec.decode(self.encoded, self.dtype)


class QuantizedState(NamedTuple):
    """State of `quantize_state`."""

    count: jax.Array  # steps taken; int32, shape (); with the seed it gives the step's random key
    inner_state: Any  # the inner state with `EncodedLeaf` in place of each encoded leaf


def check(codec: CodecChoice, min_size: Any, seed: Any) -> None:
    """Refuses options that `quantize_state` and `fused_step` share."""
    _hyperparams.check_positive_integer(min_size=min_size)
    _hyperparams.check_seed(seed)
    if not callable(codec) and not _is_codec(codec):
        raise TypeError(
            "codec must be a codec, such as int8(), or a function of a path and a leaf; got "
            f"{type(codec).__name__}"
        )


def flatten(inner_state: Any) -> tuple[list[tuple[Any, Any]], Any]:
    """Returns paths and leaves of an encoded inner state, and its structure."""
    return jax.tree_util.tree_flatten_with_path(inner_state, is_leaf=is_encoded)


def decoded(leaf: Any) -> Any:
    """Returns the leaf that the inner transformation sees."""
    return leaf.decode() if is_encoded(leaf) else leaf


def encode_new(inner_state: Any, codec: CodecChoice, min_size: int, seed: int) -> QuantizedState:
    """Encodes the state that `inner.init` made."""

    def encode(path: Any, leaf: Any, index: int) -> Any:
        chosen = _choose(codec, path, leaf, min_size)
        return leaf if chosen is None else _encode(chosen, _opaque(leaf), key, index)

    key = _step_key(seed, jnp.zeros((), jnp.int32))
    flat, structure = jax.tree_util.tree_flatten_with_path(inner_state)
    leaves = [encode(path, leaf, index) for index, (path, leaf) in enumerate(flat)]
    return QuantizedState(jnp.zeros((), jnp.int32), structure.unflatten(leaves))


def encode_like(
    flat: list[tuple[Any, Any]],
    leaves: list[Any],
    seed: int,
    count: jax.Array,
    done: Set[int] = frozenset(),
) -> list[Any]:
    """Encodes leaves as they were before.

    Args:
      flat: as `flatten` returns it, the state before.
      leaves: the new ones, decoded, in the same order.
      seed: of the step's random key, with `count`.
      count: steps taken.
      done: which leaves are not to be encoded, because they are already.

    Returns:
      The new leaves, encoded where those before are.
    """
    key = _step_key(seed, count)
    left = [i for i, (_, before) in enumerate(flat) if is_encoded(before) and i not in done]
    scales = _scales(flat, leaves, left)
    new = list(leaves)
    for i in left:
        new[i] = _encode(flat[i][1].codec, leaves[i], key, i, **scales.get(i, {}))
    return new


def _step_key(seed: int, count: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), count)


def _encode(codec: Codec, leaf: Any, key: jax.Array, index: int, **known: Any) -> EncodedLeaf:
    leaf = jnp.asarray(leaf)
    encoded = codec.encode(leaf, jax.random.fold_in(key, index), **known)
    return EncodedLeaf(encoded, codec, leaf.dtype)


def _scales(flat: Any, leaves: list[Any], indices: list[int]) -> dict[int, dict[str, jax.Array]]:
    """Returns the scales of leaves with the codec `int8`, those of one parameter tied together.

    Untied, XLA fuses the codes of one moment with the reduction of the other, and so reads their
    gradient three times.
    """
    found: dict[Any, dict[int, jax.Array]] = collections.defaultdict(dict)
    for index in indices:
        path, before = flat[index]
        if isinstance(before.codec, Int8):
            parameter = tuple(
                key for key in path if getattr(key, "name", None) not in _tree.MOMENTS
            )
            found[parameter][index] = before.codec.scales(jnp.asarray(leaves[index]))
    tied = [jax.lax.optimization_barrier(group) for group in found.values()]
    return {index: {"scales": scales} for group in tied for index, scales in group.items()}


def _opaque(leaf: jax.Array) -> jax.Array:
    # Compiled, a state of zeros is a constant, and XLA would spend seconds to encode it itself.
    return jnp.where(jax.lax.optimization_barrier(jnp.ones((), bool)), leaf, jnp.ones_like(leaf))


def _is_codec(codec: Any) -> bool:
    return hasattr(codec, "encode") and hasattr(codec, "decode")


def is_encoded(leaf: Any) -> bool:
    """Whether a leaf is an `EncodedLeaf`."""
    return isinstance(leaf, EncodedLeaf)


def _choose(codec: CodecChoice, path: Any, leaf: Any, min_size: int) -> Codec | None:
    """Returns the codec of a leaf of the inner state, or None."""
    if math.prod(jnp.shape(leaf)) < min_size:
        return None
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    found = leaf.dtype
    by_path = not _is_codec(codec)
    chosen: Any = cast(Any, codec)(name, leaf) if by_path else codec
    if chosen is None:
        return None
    if not jnp.issubdtype(found, jnp.floating):
        if not by_path and not jnp.issubdtype(found, jnp.complexfloating):
            return None
        raise TypeError(
            f"state leaf '{name}' has dtype {found}: only real floating leaves can be encoded; "
            "choose None for it with a function of the path"
        )
    if isinstance(chosen, Bfloat16) and found.itemsize <= 2:
        return None
    if isinstance(chosen, Int8) and chosen.signed is None:
        return dataclasses.replace(chosen, signed=not _tree.is_non_negative(path))
    return chosen
