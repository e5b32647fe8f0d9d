"""`attention` in the form that Flax's layers call, nnx and Linen.

Linen looks at the names of a function's parameters and passes only what it finds, so that one with
``**kwargs`` would silently get no mask; nnx passes all of its own and fails on a missing one. The
functions here spell out every name of both.
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import _options
from pallas_kernels.attention import api, arguments
from pallas_kernels.attention.mask import Mask, visible


def flax_attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
) -> jax.Array:
    """The ``attention_fn`` of `flax.nnx.MultiHeadAttention` and its Linen counterpart.

    What Flax's own function does in O(T S) memory, by `attention`. A layer hands its causal mask
    over as an array, which cannot be recognised while tracing: give the layer no mask and use
    ``make_flax_attention_fn(is_causal=True)``, so that hidden blocks are not computed.

    A layer that decodes gives one query, its whole cache and a mask of what is filled. So where
    there is a mask and there are fewer queries than keys, T < S, the last query stands at the last
    key that the mask of its batch entry shows, and causal masks and windows count from there.
    Elsewhere the first query stands at position 0; ``make_flax_attention_fn(query_offset=...)``
    overrides both.

    Args:
      query: (..., T, N, d).
      key: (..., S, K, d).
      value: (..., S, K, dv).
      bias: Broadcasts to (..., N, T, S).
      mask: bool, or zeros and ones of any dtype as Flax makes them; broadcasts to (..., N, T, S).
      broadcast_dropout: Whether all batch entries and heads share one dropout mask.
      dropout_rng: A PRNG key, needed for dropout.
      dropout_rate: Probability that an attention weight is dropped.
      deterministic: Whether there is no dropout, whatever the rate.
      dtype: The inputs are cast to it; by default to their common dtype.
      precision: Of the products.
      module: Given by Flax when it wants the attention weights sown into this layer. They exist in
        Flax's own function only, which is called in that case. Rows that see no key are 0 then too;
        their sown weights are Flax's own, an average over all keys.
      is_causal: Whether a query sees only keys up to its own position.
      force_fp32_for_softmax: Has no effect: softmax is float32 here in any case.
      qk_attn_weights_einsum: Replaces a product; hands the call to Flax's own function.
      attn_weights_value_einsum: Replaces the other product; hands the call to Flax's own function.

    Returns:
      (..., T, N, dv).

    Examples:
      >>> from flax import nnx
      >>> import jax.numpy as jnp, pallas_kernels
      >>> layer = nnx.MultiHeadAttention(
      ...     4, 32, decode=False, rngs=nnx.Rngs(0), attention_fn=pallas_kernels.flax_attention_fn)
      >>> layer(jnp.ones((2, 16, 32))).shape
      (2, 16, 32)
    """
    return _attend(
        {}, query, key, value, bias, mask, broadcast_dropout, dropout_rng, dropout_rate,
        deterministic, dtype, precision, module, is_causal, force_fp32_for_softmax,
        qk_attn_weights_einsum, attn_weights_value_einsum,
    )  # fmt: skip


def make_flax_attention_fn(**defaults: Any) -> Any:
    """Returns a `flax_attention_fn` with other arguments of `attention` fixed.

    Args:
      **defaults: Keyword arguments of `attention` that Flax does not pass, such as
        ``local_window_size``, ``logits_soft_cap``, ``implementation`` or ``query_segment_ids``;
        ``is_causal=True`` holds whatever the layer says.

    Raises:
      TypeError: A name is none of them.

    Examples:
      >>> from flax import linen
      >>> import jax, jax.numpy as jnp, pallas_kernels
      >>> causal = pallas_kernels.make_flax_attention_fn(is_causal=True, local_window_size=8)
      >>> layer = linen.MultiHeadDotProductAttention(4, attention_fn=causal)
      >>> x = jnp.ones((2, 16, 32))
      >>> layer.apply(layer.init(jax.random.key(0), x), x).shape
      (2, 16, 32)
    """
    names = set(inspect.signature(api.attention).parameters)
    passed = set(inspect.signature(flax_attention_fn).parameters) - {"is_causal"}
    allowed = names - passed - {"return_residual"}
    for name in defaults:
        if name not in allowed:
            raise TypeError(
                f"{name!r} cannot be fixed here; expected some of {', '.join(sorted(allowed))}"
            )

    def attention_fn(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        is_causal: bool = False,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Any = None,
        attn_weights_value_einsum: Any = None,
    ) -> jax.Array:
        return _attend(
            defaults, query, key, value, bias, mask, broadcast_dropout, dropout_rng, dropout_rate,
            deterministic, dtype, precision, module, is_causal, force_fp32_for_softmax,
            qk_attn_weights_einsum, attn_weights_value_einsum,
        )  # fmt: skip

    attention_fn.__doc__ = flax_attention_fn.__doc__
    return attention_fn


def _attend(
    defaults: dict[str, Any],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    broadcast_dropout: bool,
    dropout_rng: jax.Array | None,
    dropout_rate: float,
    deterministic: bool,
    dtype: Any,
    precision: Any,
    module: Any,
    is_causal: bool,
    force_fp32_for_softmax: bool,
    qk_attn_weights_einsum: Any,
    attn_weights_value_einsum: Any,
) -> jax.Array:
    query, key, value = map(_options.array, ("query", "key", "value"), (query, key, value))
    mask = None if mask is None else _options.array("mask", mask)
    causal = is_causal or defaults.get("is_causal", False)
    own = {
        "module": module,
        "qk_attn_weights_einsum": qk_attn_weights_einsum,
        "attn_weights_value_einsum": attn_weights_value_einsum,
    }
    if any(x is not None for x in own.values()):
        if defaults:
            given = ", ".join(name for name, x in own.items() if x is not None)
            raise NotImplementedError(
                f"{given} asks for Flax's own attention, which does not know {', '.join(defaults)}"
            )
        from flax import linen, nnx

        mask = _with_all_axes(query, mask)
        if causal and mask is not None:
            # Flax's own causal mask, where it has one, begins at position 0 in any case.
            mask = mask & _causal(query, key, _first_position(query, key, mask))
            is_causal = False
        common = {
            "bias": bias, "mask": mask,
            "broadcast_dropout": broadcast_dropout, "dropout_rng": dropout_rng,
            "dropout_rate": dropout_rate, "deterministic": deterministic, "dtype": dtype,
            "precision": precision, "module": module,
        }  # fmt: skip
        if isinstance(module, nnx.Module):
            output = nnx.dot_product_attention(query, key, value, **common, is_causal=is_causal)
        else:
            own.pop("module")
            output = linen.dot_product_attention(
                query, key, value, **common, **own, force_fp32_for_softmax=force_fp32_for_softmax
            )
        if mask is None:
            return output
        return jnp.where(mask.any(axis=-1).swapaxes(-1, -2)[..., None], output, 0)
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    fixed = {k: v for k, v in defaults.items() if k not in ("is_causal", "implementation")}
    mask = _with_all_axes(query, mask)
    counts = causal or fixed.get("local_window_size") is not None
    if counts and fixed.get("query_offset") is None:
        fixed["query_offset"] = _first_position(query, key, mask)
    signature = inspect.signature(api.attention).bind(
        query, key, value, bias, mask,
        is_causal=causal, precision=precision,
        dropout_rate=0.0 if deterministic else dropout_rate,
        dropout_rng=None if deterministic else dropout_rng, **fixed,
    )  # fmt: skip
    signature.apply_defaults()
    call = {
        name: x
        for name, x in signature.arguments.items()
        if name not in ("implementation", "return_residual")
    }
    checked = arguments.canonical(**call, broadcast_dropout=broadcast_dropout)
    return api.run(checked, defaults.get("implementation"), return_residual=False)


def _first_position(query: jax.Array, key: jax.Array, mask: jax.Array | None) -> Any:
    """Returns where the first query stands, as `attention` takes its ``query_offset``."""
    queries, keys = query.shape[-3], key.shape[-3]
    if mask is None or queries >= keys:
        return 0
    positions = jnp.arange(keys, dtype=jnp.int32).reshape((1,) * (mask.ndim - 1) + (keys,))
    last = jnp.where(mask, positions, -1).max(axis=(-3, -2, -1))
    return jnp.broadcast_to(last - (queries - 1), query.shape[:-3])


def _with_all_axes(query: jax.Array, mask: jax.Array | None) -> jax.Array | None:
    """Returns a mask of truths with as many axes as the scores (..., N, T, S)."""
    if mask is None:
        return None
    mask = jnp.asarray(mask) != 0
    return mask.reshape((1,) * (query.ndim - mask.ndim) + mask.shape)


def _causal(query: jax.Array, key: jax.Array, offset: Any) -> jax.Array:
    """Returns the causal mask (..., 1, T, S)."""
    leading = query.shape[:-3]
    offsets = jnp.broadcast_to(jnp.asarray(offset, jnp.int32), leading).reshape(-1)
    seen = visible(Mask(right=0, offsets=offsets), offsets.size, query.shape[-3], key.shape[-3])
    return seen.reshape(*leading, *seen.shape[1:])
