"""The leaves of an inner state and their codecs: choosing, decoding, encoding.

The array of codes that stands for a leaf takes its place in the inner state, in whatever box Flax
puts around an array there, and has its shape. What else belongs to it, and what it was made by, is
in a list of its own: who wraps or places arrays meets arrays where there were arrays.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _checks, _compat, _flax, _tree
from jaxopt_lab.quantization.codecs import Bfloat16, Codec, Int8, bfloat16, int8
from jaxopt_lab.quantization.rounding import noise_seeds

CodecChoice = Codec | Callable[[str, Any], Codec | None]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rest"], meta_fields=["codec", "dtype", "shape"]
)
@dataclasses.dataclass(frozen=True)
class Encoding:
    """What belongs to one encoded leaf beside its codes.

    Attributes:
      rest: what the codec's `encode` returned, with None in place of its first array, which is in
        the inner state; for `int8` with float32 scales of shape (*leading axes, blocks of a row).
      codec: by which the leaf is encoded.
      dtype: of the decoded leaf.
      shape: of the decoded leaf when it was made.
    """

    rest: Any
    codec: Codec
    dtype: np.dtype
    shape: tuple[int, ...]


def _made_with(encoding: Encoding) -> str:
    known = isinstance(encoding.codec, (Bfloat16, Int8))
    codec = repr(encoding.codec) if known else type(encoding.codec).__name__
    return f"{codec} of {encoding.dtype}"


_flax.register(Encoding, ["rest"], _made_with)


class QuantizedState(NamedTuple):
    """State of `quantize_state`.

    Attributes:
      count: steps taken; int32, shape (); with the seed it gives the step's random key.
      inner_state: the inner state with codes, of a leaf's shape, in place of encoded leaves.
      encoding: a tuple with an `Encoding` for each encoded leaf of the inner state, else None.
    """

    count: jax.Array
    inner_state: Any
    encoding: Any

    def belongs_beside(self) -> tuple[Any, Any]:
        """Returns the inner state, and for each leaf of it what belongs to whom the leaf does."""
        return self.inner_state, self.encoding


class EncodedLeaf(NamedTuple):
    """One encoded leaf, put together again."""

    encoded: Any  # arrays, as the codec returned them
    encoding: Encoding

    @property
    def codec(self) -> Codec:
        """By which it is encoded."""
        return self.encoding.codec

    def decode(self) -> jax.Array:
        """Returns the leaf that the inner transformation sees."""
        if isinstance(self.codec, (Bfloat16, Int8)):
            return _decode(self.codec, self.encoded, self.encoding.dtype)
        return self.codec.decode(self.encoded, self.encoding.dtype)


class Unpacked(NamedTuple):
    """The leaves of an inner state, each an `EncodedLeaf` or as it is."""

    paths: list[Any]  # without the keys of boxes
    leaves: list[Any]
    structure: Any  # of the inner state

    @property
    def names(self) -> list[str]:
        """The paths as text, such as `0/mu/kernel`."""
        return [jax.tree_util.keystr(p, simple=True, separator="/") for p in self.paths]

    def decoded(self) -> Any:
        """Returns the state that the inner transformation sees."""
        return self.structure.unflatten(map(decoded, self.leaves))

    def abstract(self) -> Any:
        """Returns its shapes and dtypes."""
        return self.structure.unflatten(map(abstract, self.leaves))

    def pack(self, count: jax.Array, leaves: list[Any]) -> QuantizedState:
        """Returns the state with other leaves."""
        codes, encodings = [], []
        for leaf in leaves:
            if is_encoded(leaf):
                first, rest = _split(leaf.encoded)
                codes.append(first)
                encodings.append(dataclasses.replace(leaf.encoding, rest=rest))
            else:
                codes.append(leaf)
                encodings.append(None)
        return QuantizedState(count, self.structure.unflatten(codes), tuple(encodings))


def check(codec: CodecChoice, min_size: Any, seed: Any) -> None:
    """Refuses options that `quantize_state` and `fused_step` share."""
    _checks.check_positive_integer(min_size=min_size)
    _checks.check_seed(seed)
    for factory in (bfloat16, int8):
        if codec is factory:
            name = factory.__name__
            raise TypeError(f"codec must be a codec, got the function {name!r}: call it, {name}()")
    if not callable(codec) and not _is_codec(codec):
        raise TypeError(
            "codec must be a codec, such as int8(), or a function of a path and a leaf; got "
            f"{_checks.shown(codec)}"
        )


def flatten(inner_state: Any) -> Unpacked:
    """Returns the leaves of an inner state as they are."""
    leaves, structure = jax.tree.flatten(inner_state)
    boxes, _ = jax.tree_util.tree_flatten_with_path(inner_state, is_leaf=_flax.is_box)
    return Unpacked([path for path, _ in boxes], leaves, structure)


def unpack(state: QuantizedState) -> Unpacked:
    """Returns the leaves of the inner state with their encodings."""
    plain = flatten(state.inner_state)
    leaves = [
        leaf if encoding is None else EncodedLeaf(_joined(leaf, encoding.rest), encoding)
        for leaf, encoding in zip(plain.leaves, state.encoding, strict=True)
    ]
    return plain._replace(leaves=leaves)


def unpack_own(state: Any, codec: CodecChoice, min_size: int) -> Unpacked:
    """Returns the leaves of a state that these options made.

    Raises:
      TypeError: it is no state of `quantize_state`.
      ValueError: it was made with other options; the message has the first leaf that differs.
    """
    if not isinstance(state, QuantizedState):
        raise TypeError(
            f"expected a state of type QuantizedState, got {type(state).__name__}: was it made by "
            "another transformation's init? The state of the plain optimizer goes in by "
            "quantization.encode_state(tx, state, params)"
        )
    found = unpack(state)
    for name, path, leaf in zip(found.names, found.paths, found.leaves):
        own = _choose(codec, name, path, abstract(leaf), min_size)
        check_encoding(name, leaf.codec if is_encoded(leaf) else None, own)
    return found


def check_encoding(name: str, found: Codec | None, own: Codec | None) -> None:
    """Refuses a leaf that is encoded otherwise than the transformation at hand would.

    Raises:
      ValueError: the message has both codecs.
    """
    if found == own or _is_one_of_many(found, own):
        return
    was = "exact" if found is None else f"encoded by {found}"
    would = "keeps it exact" if own is None else f"encodes it by {own}"
    raise ValueError(
        f"state leaf '{name}' is {was}, but this transformation {would}: the state was made with "
        "another codec or min_size. quantization.decode_state with the transformation that made "
        "it, then encode_state with this one, move it"
    )


def abstract(leaf: Any) -> Any:
    """Returns shape and dtype that a leaf has, or had when it was made."""
    if is_encoded(leaf):
        return jax.ShapeDtypeStruct(leaf.encoding.shape, leaf.encoding.dtype)
    dtype = getattr(leaf, "dtype", None)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf) if dtype is None else dtype)


def decoded(leaf: Any) -> Any:
    """Returns the leaf that the inner transformation sees."""
    return leaf.decode() if is_encoded(leaf) else leaf


def encode_new(
    inner_state: Any, params: Any, codec: CodecChoice, min_size: int, seed: int
) -> QuantizedState:
    """Encodes the state that `inner.init` made of `params`.

    Raises:
      TypeError: there is an encoded state in it already.
    """
    if has_encoded_state(inner_state):
        raise TypeError(
            "inner keeps an encoded state already: quantize_state of quantize_state would encode "
            "codes. Take one, with a function of the path for codecs that differ"
        )
    plain = flatten(inner_state)
    count = jnp.zeros((), jnp.int32)
    key = _step_key(seed, count)
    chosen = [
        _choose(codec, name, path, abstract(leaf), min_size)
        for name, path, leaf in zip(plain.names, plain.paths, plain.leaves)
    ]
    seeds = _seeds(chosen, range(len(chosen)), key)
    leaves = [
        leaf if own is None else _encode(own, _opaque(leaf), key, index, **seeds.get(index, {}))
        for index, (own, leaf) in enumerate(zip(chosen, plain.leaves))
    ]
    state = plain.pack(count, leaves)
    # `optax.tree.map_params` asks with a node without leaves what stands where parameters do.
    known = (tuple, list, dict)
    nodes = jax.tree.leaves(params, is_leaf=lambda x: x is not None and not isinstance(x, known))
    if nodes and not jax.tree.leaves(params):
        return state._replace(encoding=nodes[0])
    return state


def encode_like(
    before: Unpacked,
    leaves: list[Any],
    seed: int,
    count: jax.Array,
    done: Set[int] = frozenset(),
) -> list[Any]:
    """Encodes leaves as they were before.

    Args:
      before: the leaves before.
      leaves: the new ones, decoded, in the same order.
      seed: of the step's random key, with `count`.
      count: steps taken.
      done: which leaves are not to be encoded, because they are already.

    Returns:
      The new leaves, encoded where those before are.

    Raises:
      ValueError: a leaf has changed its shape; the message has its path.
    """
    key = _step_key(seed, count)
    left = [i for i, leaf in enumerate(before.leaves) if is_encoded(leaf) and i not in done]
    codecs = [leaf.codec if is_encoded(leaf) else None for leaf in before.leaves]
    known = _scales(before, leaves, left) | _seeds(codecs, left, key)
    new = list(leaves)
    for i in left:
        leaf = _encode(before.leaves[i].codec, leaves[i], key, i, **known.get(i, {}))
        # The shape of a shard, or of one of several mapped states, is not that of the leaf.
        own = dataclasses.replace(leaf.encoding, shape=before.leaves[i].encoding.shape)
        new[i] = leaf._replace(encoding=own)
    return new


def flatten_like(before: Unpacked, inner_state: Any) -> list[Any]:
    """Returns the leaves of the state that an update returned.

    Raises:
      ValueError: it has another structure, or an array has another shape, as broadcasting gives it.
    """
    try:
        after = before.structure.flatten_up_to(inner_state)
    except ValueError as error:
        raise ValueError(
            "the inner transformation returned a state of another structure than it was given: "
            f"was the state made by another transformation's init? {error}"
        ) from error
    for name, leaf, new in zip(before.names, before.leaves, after):
        old = jnp.shape(jax.tree.leaves(leaf)[0])
        if old != jnp.shape(new):
            raise ValueError(
                f"state leaf '{name}' has shape {old} and would get shape {jnp.shape(new)}: the "
                "gradients must have the shapes of the parameters that the state was made for"
            )
    return after


def check_gradients(updates: Any, params: Any) -> None:
    """Refuses gradients that have not the shapes of the parameters.

    Raises:
      ValueError: the message has the path and both shapes.
    """
    if jax.tree.structure(updates) == jax.tree.structure(params):
        _tree.check_updates(updates, params, "params")


def has_encoded_state(state: Any) -> bool:
    """Whether there is a `QuantizedState` in a tree."""
    nodes = jax.tree.leaves(state, is_leaf=is_quantized)
    return any(map(is_quantized, nodes))


def is_quantized(node: Any) -> bool:
    """Whether a node is a `QuantizedState`."""
    return isinstance(node, QuantizedState)


def is_encoded(leaf: Any) -> bool:
    """Whether a leaf is an `EncodedLeaf`."""
    return isinstance(leaf, EncodedLeaf)


def _split(encoded: Any) -> tuple[Any, Any]:
    """Returns the first array, and the tree with None in its place."""
    (first, *others), structure = jax.tree.flatten(encoded)
    return first, structure.unflatten([None, *others])


def _joined(first: Any, rest: Any) -> Any:
    leaves, structure = jax.tree.flatten(rest, is_leaf=lambda x: x is None)
    return structure.unflatten([first if leaf is None else leaf for leaf in leaves])


def _step_key(seed: int, count: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), count)


def _encode(codec: Codec, leaf: Any, key: jax.Array, index: int, **known: Any) -> EncodedLeaf:
    leaf = jnp.asarray(leaf)
    if isinstance(codec, Int8) or known:
        encoded = _encode_known(codec, leaf, known)
    else:
        encoded = codec.encode(leaf, jax.random.fold_in(key, index))
    return EncodedLeaf(encoded, Encoding(None, codec, leaf.dtype, leaf.shape))


# What is traced once for all leaves of one shape and dtype: a model has many of few. The compiler
# sees no difference, but a step of many leaves is there in half the time.


@functools.partial(jax.jit, static_argnums=0)
def _encode_known(codec: Any, leaf: jax.Array, known: dict[str, Any]) -> Any:
    return codec.encode(leaf, None, **known)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _decode(codec: Codec, encoded: Any, dtype: np.dtype) -> jax.Array:
    return codec.decode(encoded, dtype)


@functools.partial(jax.jit, static_argnums=0)
def _scales_of(codec: Int8, leaf: jax.Array) -> jax.Array:
    return codec.scales(leaf)


def _seeds(
    codecs: Sequence[Codec | None], indices: Iterable[int], key: jax.Array
) -> dict[int, dict[str, jax.Array]]:
    """Returns the seeds of stochastic rounding, made for all leaves at once.

    They are those of each leaf's own key; one by one, they would take the compiler longer than all
    else together.
    """
    chosen = [i for i in indices if codecs[i] == Bfloat16(stochastic=True)]
    if not chosen:
        return {}
    seeds = jax.vmap(lambda i: noise_seeds(jax.random.fold_in(key, i)))(np.asarray(chosen))
    each = _compat.members(seeds, len(chosen))
    return {i: {"seeds": own} for i, own in zip(chosen, each)}


def _scales(
    before: Unpacked, leaves: list[Any], indices: list[int]
) -> dict[int, dict[str, jax.Array]]:
    """Returns the scales of leaves with the codec `int8`, those of one parameter tied together.

    Untied, XLA fuses the codes of one moment with the reduction of the other, and so reads their
    gradient three times.
    """
    found: dict[Any, dict[int, jax.Array]] = collections.defaultdict(dict)
    for index in indices:
        path, codec = before.paths[index], before.leaves[index].codec
        if isinstance(codec, Int8):
            parameter = tuple(
                key for key in path if getattr(key, "name", None) not in _tree.MOMENTS
            )
            found[parameter][index] = _scales_of(codec, jnp.asarray(leaves[index]))
    tied = [jax.lax.optimization_barrier(group) for group in found.values()]
    return {index: {"scales": scales} for group in tied for index, scales in group.items()}


def _opaque(leaf: jax.Array) -> jax.Array:
    # Compiled, a state of zeros is a constant, and XLA would spend seconds to encode it itself.
    return jnp.where(jax.lax.optimization_barrier(jnp.ones((), bool)), leaf, jnp.ones_like(leaf))


def _is_one_of_many(found: Any, own: Any) -> bool:
    """Whether two codecs are of one type, whose instances are equal only to themselves."""
    return type(found) is type(own) and type(found).__eq__ is object.__eq__


def _is_codec(codec: Any) -> bool:
    return hasattr(codec, "encode") and hasattr(codec, "decode")


def _choose(codec: CodecChoice, name: str, path: Any, leaf: Any, min_size: int) -> Codec | None:
    """Returns the codec of a leaf of the inner state, given its shape and dtype, or None."""
    if math.prod(leaf.shape) < min_size:
        return None
    found = leaf.dtype
    by_path = not _is_codec(codec)
    chosen: Any = cast(Any, codec)(name, leaf) if by_path else codec
    if chosen is None:
        return None
    if not _is_codec(chosen):
        raise TypeError(
            f"codec returned {chosen!r} for the state leaf '{name}'; expected a codec or None"
        )
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
