r"""Any optax transformation with a compact state.

    inner_state = decode(state);  inner.update;  state = encode(inner_state)

Compiled for a GPU, bfloat16 state fuses with the update. int8 needs the scale of a block before its
codes: a first kernel makes the scales and the new parameter, a second makes the new moments again
and encodes them. With dynamic levels, or where a last axis is no multiple of the block size, XLA
keeps new moments in full precision in between.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import _hyperparams, _tree
from jaxopt_lab.quantization.codecs import Bfloat16, Codec, Int8

# What the contract of `jaxopt_lab.testing` asks and stochastic rounding does not promise.
CONTRACT_EXCEPTIONS = {
    "nesting_invariance": "the random bits of a leaf depend on its position in the state",
}

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


def quantize_state(
    inner: optax.GradientTransformation,
    codec: CodecChoice,
    *,
    min_size: int = 4096,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the state of a transformation encoded between steps.

    Each update decodes the state to the dtypes that `inner.init` made, calls `inner.update`, and
    encodes the result. Encoded are the floating leaves with at least `min_size` elements; smaller
    leaves and counters stay exact. Call `init` under `jax.jit` where the full state would not fit.
    `flax.nnx.Optimizer` cannot carry an encoded state; with nnx, split the model and keep the state
    beside it.

    Args:
      inner: any optax transformation.
      codec: `bfloat16()`, `int8()`, another `Codec`, or a function `(path, leaf) -> codec or None`
        of the leaves with at least `min_size` elements, where a path is such as `0/mu/kernel` and
        None keeps the leaf exact. `int8(signed=None)` becomes unsigned for leaves known to be
        non-negative by their field's name (`nu`, `nu_max`, `sum_of_squares`) and signed for all
        others; `bfloat16` leaves 16-bit leaves as they are.
      min_size: smallest number of elements of an encoded leaf.
      seed: of stochastic rounding. The key of a step is made of the seed and the number of steps
        taken, so that a run resumes with the same bits; no key is stored.

    Returns:
      A `GradientTransformationExtraArgs`.

    Raises:
      ValueError: `min_size` below 1.
      TypeError: `codec` is neither a codec nor a function, `min_size` or `seed` no integer, or, at
        init, a codec for a leaf that is not real floating point.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import quantization
      >>> params = {"kernel": jnp.ones((64, 64)), "bias": jnp.ones(64)}
      >>> tx = quantization.quantize_state(optax.adamw(1e-3), quantization.int8(code="dynamic"))
      >>> state = jax.jit(tx.init)(params)
      >>> sum(leaf.nbytes for leaf in jax.tree.leaves(state))  # optax.adamw: 33284
      8840

    References:
      Dettmers et al., `8-bit Optimizers via Block-wise Quantization
      <https://arxiv.org/abs/2110.02861>`_, ICLR 2022.
    """
    _hyperparams.check_positive_integer(min_size=min_size)
    _hyperparams.check_seed(seed)
    if not callable(codec) and not _is_codec(codec):
        raise TypeError(
            "codec must be a codec, such as int8(), or a function of a path and a leaf; got "
            f"{type(codec).__name__}"
        )
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> QuantizedState:
        def encode(path: Any, leaf: Any, index: int) -> Any:
            chosen = _choose(codec, path, leaf, min_size)
            return leaf if chosen is None else _encode(chosen, _opaque(leaf), key, index)

        key = _step_key(seed, jnp.zeros((), jnp.int32))
        flat, structure = jax.tree_util.tree_flatten_with_path(inner.init(params))
        leaves = [encode(path, leaf, index) for index, (path, leaf) in enumerate(flat)]
        return QuantizedState(jnp.zeros((), jnp.int32), structure.unflatten(leaves))

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, QuantizedState]:
        state = _tree.check_state(state, QuantizedState)
        count = _hyperparams.increment(state.count)
        flat, structure = jax.tree_util.tree_flatten_with_path(
            state.inner_state, is_leaf=_is_encoded
        )
        decoded = [leaf.decode() if _is_encoded(leaf) else leaf for _, leaf in flat]
        updates, inner_state = inner.update(
            updates, structure.unflatten(decoded), params, **extra_args
        )
        key = _step_key(seed, count)
        leaves = structure.flatten_up_to(inner_state)
        scales = _scales(flat, leaves)
        new = [
            _encode(before.codec, leaf, key, index, **scales.get(index, {}))
            if _is_encoded(before)
            else leaf
            for index, ((_, before), leaf) in enumerate(zip(flat, leaves))
        ]
        return updates, QuantizedState(count, structure.unflatten(new))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _step_key(seed: int, count: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), count)


def _encode(codec: Codec, leaf: Any, key: jax.Array, index: int, **known: Any) -> EncodedLeaf:
    leaf = jnp.asarray(leaf)
    encoded = codec.encode(leaf, jax.random.fold_in(key, index), **known)
    return EncodedLeaf(encoded, codec, leaf.dtype)


def _scales(flat: Any, leaves: list[Any]) -> dict[int, dict[str, jax.Array]]:
    """Returns the scales of leaves with the codec `int8`, those of one parameter tied together.

    Untied, XLA fuses the codes of one moment with the reduction of the other, and so reads their
    gradient three times.
    """
    found: dict[Any, dict[int, jax.Array]] = collections.defaultdict(dict)
    for index, (path, before) in enumerate(flat):
        if _is_encoded(before) and isinstance(before.codec, Int8):
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


def _is_encoded(leaf: Any) -> bool:
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
