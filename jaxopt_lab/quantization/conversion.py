r"""A running optimizer goes into compact state, and out of it.

plain -> encode_state -> state of quantize_state -> decode_state -> plain'
plain' is what the codes stand for, and encode_state(plain') has the same codes
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _flax, _tree
from jaxopt_lab.quantization import _leaves
from jaxopt_lab.quantization._leaves import QuantizedState, Unpacked


def encode_state(
    tx: optax.GradientTransformation, state: Any, params: optax.Params, *, seed: int = 0
) -> Any:
    """Moves the state of a plain optimizer into the state of the same optimizer in few bytes.

    Leaves that `tx` encodes are rounded once to what their codec can hold; all others, counters
    included, are taken over, so that the run goes on where it was. Leaves are found by their names:
    a checkpoint that was restored into dictionaries and lists will do, and `opt_state` of a
    `flax.nnx.Optimizer` too.

    Args:
      tx: the transformation that goes on, with `quantize_state(inner, ...)` somewhere in it.
      state: the state of the transformation that has `inner` in its place: tree of arrays with the
        shapes of `tx`'s state before encoding.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are used.
      seed: of the stochastic rounding to bfloat16, this once.

    Returns:
      A state of `tx`. Its leaves have the dtypes that `tx.init` gives them.

    Raises:
      ValueError: there is no `quantize_state` in `tx`, or `state` has other leaves than its plain
        form; the message has the first that differs, or both shapes.
      TypeError: `tx` is no transformation, or `seed` no integer.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from jaxopt_lab import quantization
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> adamw = optax.adamw(1e-3)
      >>> _, state = adamw.update(params, adamw.init(params), params)  # ... a run so far
      >>> tx = quantization.quantize_state(adamw, quantization.int8())
      >>> state = encode_state(tx, state, params)
      >>> updates, state = tx.update(params, state, params)
      >>> int(state.inner_state[0].count)
      2

    See Also:
      `decode_state`, the way back.
    """
    _checks.check_seed(seed)
    expected = _expected(tx, params)
    if _leaves.has_encoded_state(state):
        raise ValueError("state is encoded already; decode_state makes it plain")
    template = _map_states(lambda own: _leaves.unpack(own).abstract(), expected)
    plain = _by_name(state, template)
    nodes, structure = jax.tree.flatten(expected, is_leaf=_leaves.is_quantized)
    plains = structure.flatten_up_to(plain)
    found = [
        _encoded(own, x, seed) if _leaves.is_quantized(own) else x for own, x in zip(nodes, plains)
    ]
    return structure.unflatten(found)


def decode_state(tx: optax.GradientTransformation, state: Any, params: optax.Params) -> Any:
    """Moves a compact state into the state of the plain optimizer.

    Args:
      tx: the transformation that made the state, with `quantize_state(inner, ...)` in it.
      state: its state, also as `flax.nnx.Optimizer` holds it.
      params: the parameters, arrays or `jax.ShapeDtypeStruct`; only shapes and dtypes are used.

    Returns:
      The state of the transformation that has `inner` in place of `quantize_state(inner, ...)`:
      arrays of the dtypes that `inner.init` makes, with the values that `inner.update` would see
      next. `encode_state` makes the same codes of them.

    Raises:
      ValueError: there is no `quantize_state` in `tx`, or the state was made by another
        transformation, codec or `min_size`; the message has the first leaf that differs.
      TypeError: `tx` is no transformation.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from jaxopt_lab import quantization
      >>> params = {"kernel": jnp.ones((64, 64))}
      >>> adamw = optax.adamw(1e-3)
      >>> tx = quantization.quantize_state(adamw, quantization.int8())
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> plain = decode_state(tx, state, params)
      >>> updates, plain = adamw.update(params, plain, params)
      >>> plain[0].mu["kernel"].dtype, int(plain[0].count)
      (dtype('float32'), 2)

    See Also:
      `encode_state`, the way there.
    """
    expected = _expected(tx, params)
    if jax.tree.structure(state) != jax.tree.structure(expected):
        # flax.nnx.Optimizer holds every array in a variable and hands the rule none of them.
        state, expected = _flax.unboxed(state), _expected(tx, _flax.unboxed(params))
    wanted, structure = jax.tree.flatten(expected, is_leaf=_leaves.is_quantized)
    found, given = jax.tree.flatten(state, is_leaf=_leaves.is_quantized)
    if structure != given or any(
        _leaves.is_quantized(x) != _leaves.is_quantized(own) for x, own in zip(found, wanted)
    ):
        raise ValueError(f"state was made by another transformation: {given}, not {structure}")
    for x, own in zip(found, wanted):
        if _leaves.is_quantized(own):
            _check_own(_leaves.unpack(x), _leaves.unpack(own))
    return _map_states(lambda own: _leaves.unpack(own).decoded(), state)


def _expected(tx: Any, params: Any) -> Any:
    """Returns the state that `tx.init` would make, without making it."""
    _checks.check_transformation(tx=tx)
    expected = jax.eval_shape(tx.init, params)
    if not _leaves.has_encoded_state(expected):
        raise ValueError("tx keeps no encoded state: there is no quantize_state in it")
    return expected


def _map_states(change: Any, state: Any) -> Any:
    return jax.tree.map(
        lambda node: change(node) if _leaves.is_quantized(node) else node,
        state,
        is_leaf=_leaves.is_quantized,
    )


def _by_name(state: Any, template: Any) -> Any:
    """Returns the leaves of `state` in the tree of `template`.

    Raises:
      ValueError: the names or the shapes differ; the message has the first.
    """
    leaves, expected = dict(_without_boxes(state)), _without_boxes(template)
    missing = [name for name, _ in expected if name not in leaves]
    extra = sorted(leaves.keys() - {name for name, _ in expected})
    if missing or extra:
        what = f"'{missing[0]}' is missing" if missing else f"'{extra[0]}' is not expected"
        raise ValueError(f"state is not that of the plain optimizer inside tx: {what}")
    found = []
    for name, own in expected:
        leaf = leaves[name]
        if jnp.shape(leaf) != own.shape:
            raise ValueError(
                f"state leaf '{name}' has shape {jnp.shape(leaf)}; tx makes it with shape "
                f"{own.shape}: was it made for other parameters?"
            )
        if jnp.issubdtype(own.dtype, jax.dtypes.prng_key):
            found.append(leaf)
        else:
            found.append(jnp.asarray(leaf).astype(own.dtype))
    return jax.tree.structure(template).unflatten(found)


def _without_boxes(tree: Any) -> list[tuple[str, Any]]:
    """Returns names and leaves; the `value` of a box of Flax is not part of a name."""
    return [(name.removesuffix("/value"), leaf) for name, leaf in _tree.leaves_with_names(tree)]


def _encoded(own: QuantizedState, plain: Any, seed: int) -> QuantizedState:
    like = _leaves.unpack(own)
    leaves = like.structure.flatten_up_to(plain)
    counts = [
        leaf
        for path, leaf in zip(like.paths, leaves)
        if getattr(path[-1] if path else None, "name", None) == "count" and jnp.shape(leaf) == ()
    ]
    # Where the rule counts its steps, random bits go on as if the state had always been encoded.
    count = jnp.asarray(counts[0] if counts else 0, jnp.int32)
    return like.pack(count, _leaves.encode_like(like, leaves, seed, count))


def _check_own(found: Unpacked, own: Unpacked) -> None:
    if found.names != own.names:
        raise ValueError(
            "state was made by another transformation: it has the leaves "
            f"{found.names[:5]}, expected {own.names[:5]}"
        )
    for name, x, wanted in zip(own.names, found.leaves, own.leaves):
        codecs = [leaf.codec if _leaves.is_encoded(leaf) else None for leaf in (x, wanted)]
        _leaves.check_encoding(name, *codecs)
