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

from pallas_kernels.attention import api, arguments


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
        Flax's own function only, which is called in that case.
      is_causal: Whether a query sees only keys up to its own position.
      force_fp32_for_softmax: Has no effect: softmax is float32 here in any case.
      qk_attn_weights_einsum: Replaces a product; hands the call to Flax's own function.
      attn_weights_value_einsum: Likewise.

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

        common = {
            "bias": bias, "mask": None if mask is None else mask != 0,
            "broadcast_dropout": broadcast_dropout, "dropout_rng": dropout_rng,
            "dropout_rate": dropout_rate, "deterministic": deterministic, "dtype": dtype,
            "precision": precision, "module": module,
        }  # fmt: skip
        if isinstance(module, nnx.Module):
            return nnx.dot_product_attention(query, key, value, **common, is_causal=is_causal)
        own.pop("module")
        return linen.dot_product_attention(
            query, key, value, **common, **own, force_fp32_for_softmax=force_fp32_for_softmax
        )
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    fixed = {k: v for k, v in defaults.items() if k not in ("is_causal", "implementation")}
    signature = inspect.signature(api.attention).bind(
        query, key, value, bias, None if mask is None else mask != 0,
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
