r"""BlockFFN: a feed-forward layer of many small experts, of which each token uses few.

    R = ReLU(x W_r)     A = RMSNorm(R)     y = sum_i A_i W_down,i swish(W_up,i x)

Experts are not gated, and a token without active experts gives 0. Tokens that follow each other
share experts, so that a chunk of them reads only the union of theirs.

Song et al., arXiv:2507.08771 (thunlp/BlockFFN).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._dtypes import wide
from pallas_kernels._options import floating, index, positive


def relu_rms_router(
    scores: jax.Array, scale: jax.Array | None = None, *, epsilon: float = 1e-6
) -> jax.Array:
    r"""How much each expert counts for each token: a ReLU and a norm over the experts.

    .. math::
      R = \max(S, 0), \qquad A_i = g_i \frac{R_i}{\sqrt{\frac{1}{n} \sum_j R_j^2 + \epsilon}}

    The ReLU decides which experts are active, and how many, and the norm keeps the size of the
    layer's output where that number changes.

    Args:
      scores: floating (..., experts), the product of tokens and the router's matrix.
      scale: g, floating (experts,), learned; None for ones.
      epsilon: what keeps the quotient finite, positive.

    Returns:
      The activations (..., experts), in the dtype of `scores`.

    Raises:
      TypeError: `scores` or `scale` is not floating, or `epsilon` no number.
      ValueError: `scale` has another shape, or `epsilon` is not positive.

    Examples:
      >>> import jax.numpy as jnp, pallas_kernels
      >>> a = pallas_kernels.relu_rms_router(jnp.array([1.0, -1.0, 0.5, -2.0]))
      >>> [f"{x:.3f}" for x in a]
      ['1.789', '0.000', '0.894', '0.000']

    References:
      Song et al., `BlockFFN <https://arxiv.org/abs/2507.08771>`_, COLM 2025.
    """
    scores = floating("scores", scores)
    epsilon = positive("epsilon", epsilon)
    active = jnp.maximum(scores.astype(wide(scores.dtype)), 0)
    found = active * lax.rsqrt(jnp.mean(active**2, axis=-1, keepdims=True) + epsilon)
    if scale is not None:
        scale = floating("scale", scale)
        if scale.shape != scores.shape[-1:]:
            raise ValueError(
                f"scale has shape {scale.shape}; expected {scores.shape[-1:]}, one an expert"
            )
        found *= jnp.expand_dims(scale.astype(found.dtype), range(scores.ndim - 1))
    return found.astype(scores.dtype)


def block_ffn(
    x: jax.Array,
    activations: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    chunk: int | None = None,
    capacity: int | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    r"""A feed-forward layer of experts, all of them or those that a chunk of tokens uses.

    .. math::
      y = \sum_i A_i \, W_{\mathrm{down},i}^\top \,
      \mathrm{swish}(W_{\mathrm{up},i}^\top x)

    Without `chunk` all experts are computed, and those of activation 0 count nothing. With it, the
    tokens of a chunk take `capacity` experts out of the matrices, those that any of them uses, and
    compute these alone. A chunk that uses more computes all: the result never depends on the
    capacity. Shapes are static, so that both serve training and decoding; under `jax.vmap` a chunk
    computes both ways. The gradient of an activation is 0 where a chunk leaves its expert out, as
    it is behind the router's ReLU.

    Args:
      x: floating (tokens, width).
      activations: floating (tokens, experts), such as of `relu_rms_router`.
      up: floating (experts, width, hidden).
      down: floating (experts, hidden, width).
      chunk: the number of tokens that share their experts, which divides the tokens; None for no
        chunks.
      capacity: how many experts a chunk computes, with `chunk` alone.
      precision: of the products, as in `jax.lax.dot_general`.

    Returns:
      The outputs (tokens, width), in the dtype of `x`. Sums are in float32.

    Raises:
      TypeError: an array is not floating, or `chunk` or `capacity` no integer.
      ValueError: shapes do not match, or `chunk` does not divide the tokens, or comes alone.

    Examples:
      >>> import jax, jax.numpy as jnp, pallas_kernels
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> x, up, down = (jax.random.normal(k, s) for k, s in zip(
      ...     keys, [(8, 16), (32, 16, 4), (32, 4, 16)]))
      >>> a = pallas_kernels.relu_rms_router(jax.random.normal(keys[3], (8, 32)) - 2)
      >>> y = pallas_kernels.block_ffn(x, a, up, down, chunk=4, capacity=8)
      >>> bool(jnp.allclose(y, pallas_kernels.block_ffn(x, a, up, down), atol=1e-5))
      True

    References:
      Song et al., `BlockFFN <https://arxiv.org/abs/2507.08771>`_, COLM 2025.
    """
    x, activations = floating("x", x), floating("activations", activations)
    up, down = floating("up", up), floating("down", down)
    _check_shapes(x, activations, up, down)
    if (chunk is None) != (capacity is None):
        raise ValueError(f"chunk={chunk!r} with capacity={capacity!r}; expected both or none")
    if chunk is None or capacity is None:
        return _all(x, activations, up, down, precision)
    tokens, experts = activations.shape
    size, most = index("chunk", chunk), index("capacity", capacity)
    if size < 1 or tokens % size:
        raise ValueError(f"chunk={size}; expected a divisor of the {tokens} tokens")
    if not 1 <= most <= experts:
        raise ValueError(f"capacity={most}; expected 1 to {experts}, the number of experts")

    def one(pair: Any) -> jax.Array:
        tokens, active = pair
        used = jnp.any(active != 0, axis=0)
        # Those that are used come first, in their order.
        places = jnp.argsort(~used, stable=True)[:most]

        def few(tokens: jax.Array, active: jax.Array) -> jax.Array:
            return _all(tokens, active[:, places], up[places], down[places], precision)

        def every(tokens: jax.Array, active: jax.Array) -> jax.Array:
            return _all(tokens, active, up, down, precision)

        return lax.cond(used.sum() <= most, few, every, tokens, active)

    chunks = x.reshape(-1, size, x.shape[1]), activations.reshape(-1, size, experts)
    return lax.map(one, chunks).reshape(x.shape)


def _all(x: jax.Array, active: jax.Array, up: jax.Array, down: jax.Array, precision: Any) -> Any:
    """Returns the sum over all experts that are given."""
    sums = wide(x.dtype)
    hidden = jnp.einsum(
        "td,edf->tef", x, up.astype(x.dtype), precision=precision, preferred_element_type=sums
    )
    hidden = (jax.nn.silu(hidden) * active.astype(sums)[..., None]).astype(x.dtype)
    found = jnp.einsum(
        "tef,efd->td", hidden, down.astype(x.dtype), precision=precision,
        preferred_element_type=sums,
    )  # fmt: skip
    return found.astype(x.dtype)


def _check_shapes(x: jax.Array, activations: jax.Array, up: jax.Array, down: jax.Array) -> None:
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; expected (tokens, width)")
    if up.ndim != 3 or up.shape[1] != x.shape[1]:
        raise ValueError(f"up has shape {up.shape}; expected (experts, {x.shape[1]}, hidden)")
    experts, width, hidden = up.shape
    if down.shape != (experts, hidden, width):
        raise ValueError(f"down has shape {down.shape}; expected {(experts, hidden, width)}")
    if activations.shape != (x.shape[0], experts):
        raise ValueError(
            f"activations have shape {activations.shape}; expected {(x.shape[0], experts)}"
        )
