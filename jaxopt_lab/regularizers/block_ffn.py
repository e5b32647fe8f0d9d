r"""BlockFFN's objectives: neighbouring tokens use the same experts, and chunks of them few.

For scores A (tokens, experts) of a router and activations R = ReLU(A),

    locality    mean of BCE(logits = a A_t, target = sigmoid(a A_(t+1)))
    sparsity    mean over chunks and experts of  1 - prod_k (1 - p_k),   p = R / sum_experts R

are added to the loss, times factors of about 1e-3 and 5e-2. Song et al., arXiv:2507.08771
(thunlp/BlockFFN).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _checks, _tree


def activation_locality_loss(
    scores: jax.Array, segment_ids: jax.Array | None = None, *, steep: float = 100.0
) -> jax.Array:
    r"""The cross-entropy of a token's active experts with those of the next token.

    .. math::
      L = \operatorname{mean}_{t, i}\; -\sigma_{t+1,i} \log \sigma_{t,i}
      - (1 - \sigma_{t+1,i}) \log(1 - \sigma_{t,i}),
      \qquad \sigma_{t,i} = \frac{1}{1 + e^{-\alpha A_{t,i}}}

    over neighbours of one segment. Its gradient goes into both tokens, as in the authors' code. The
    least value is the mean entropy of :math:`\sigma`, where all tokens are equal.

    Args:
      scores: floating (..., tokens, experts), the router's before its ReLU.
      segment_ids: integers (..., tokens); tokens of different numbers are no neighbours. None for
        one segment a row.
      steep: the slope :math:`\alpha` of the sigmoid.

    Returns:
      The loss, a scalar in float32 (float64 for float64); 0 where there are no neighbours.

    Raises:
      TypeError: `scores` are not floating, or `steep` no number.
      ValueError: shapes do not match, or `steep` is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import regularizers
      >>> steady = jnp.array([[1.0, -1.0], [1.0, -1.0]])
      >>> f"{regularizers.activation_locality_loss(steady, steep=1.0):.4f}"
      '0.5822'
      >>> f"{regularizers.activation_locality_loss(jnp.array([[1.0, -1.0], [-1.0, 1.0]])):.1f}"
      '100.0'

    References:
      Song et al., `BlockFFN <https://arxiv.org/abs/2507.08771>`_, COLM 2025.
    """
    scores = _tokens("scores", scores)
    _checks.check_positive(steep=steep)
    scaled = steep * scores
    here, target = scaled[..., :-1, :], jax.nn.sigmoid(scaled[..., 1:, :])
    losses = jax.nn.softplus(here) - target * here
    if segment_ids is None:
        together = jnp.ones(losses.shape[:-1], bool)
    else:
        _check_shape("segment_ids", segment_ids, scores.shape[:-1])
        segment_ids = jnp.asarray(segment_ids)
        together = segment_ids[..., :-1] == segment_ids[..., 1:]
    count = jnp.maximum(together.sum(), 1).astype(losses.dtype) * losses.shape[-1]
    return jnp.where(together[..., None], losses, 0).sum() / count


def chunk_sparsity_loss(
    activations: jax.Array, chunk: int, mask: jax.Array | None = None, *, eps: float = 1e-5
) -> jax.Array:
    r"""The mean probability that an expert is chosen by a token of a chunk.

    .. math::
      p_{k,i} = \frac{R_{k,i}}{\sum_j R_{k,j} + \epsilon}, \qquad
      L = \operatorname{mean}_{\text{chunks}, i}\;
      1 - \exp \sum_{k \in \text{chunk}} \log(1 - p_{k,i} + \epsilon)

    It is least where the tokens of a chunk share few experts.

    Args:
      activations: floating (..., tokens, experts), at least 0: after the ReLU, before the norm.
      chunk: the number of tokens in a chunk, 64 in the paper's trainings. A last chunk may be
        shorter.
      mask: bool (..., tokens), True for tokens that count; a chunk without any does not count
        either. None for all.
      eps: what keeps quotient and logarithm finite. With 0 the gradient of an expert that takes
        all of a token is not finite.

    Returns:
      The loss, a scalar in float32 (float64 for float64).

    Raises:
      TypeError: `activations` are not floating, or `chunk` is no integer.
      ValueError: shapes do not match, or `chunk` or `eps` is out of range.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import regularizers
      >>> shared, spread = jnp.array([[1.0, 0.0], [1.0, 0.0]]), jnp.eye(2)
      >>> [f"{regularizers.chunk_sparsity_loss(x, 2):.2f}" for x in (shared, spread)]
      ['0.50', '1.00']

    References:
      Song et al., `BlockFFN <https://arxiv.org/abs/2507.08771>`_, COLM 2025.
    """
    activations = _tokens("activations", activations)
    _checks.check_positive_integer(chunk=chunk)
    _checks.check_non_negative(eps=eps)
    total = activations.sum(-1, keepdims=True)
    # Where no expert is active there is nothing to divide, with eps 0 neither.
    p = activations / (jnp.where(total == 0, 1, total) + eps)
    logs = jnp.log(1 - p + eps)
    if mask is None:
        return jnp.mean(1 - jnp.exp(_chunks(logs, chunk).sum(-2)))
    _check_shape("mask", mask, activations.shape[:-1])
    counted = jnp.asarray(mask)[..., None]
    used = 1 - jnp.exp(_chunks(jnp.where(counted, logs, 0), chunk).sum(-2))
    chunks = _chunks(counted.astype(logs.dtype), chunk).max(-2)
    return (used * chunks).sum() / jnp.maximum(chunks.sum() * logs.shape[-1], 1)


def token_sparsity(activations: jax.Array) -> jax.Array:
    """The share of activations that are zero (TLS).

    Args:
      activations: floating (..., tokens, experts).

    Returns:
      A scalar from 0 to 1, float32 (float64 for float64).

    Raises:
      TypeError: `activations` are not floating.
      ValueError: they have fewer than two axes.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import regularizers
      >>> float(regularizers.token_sparsity(jnp.eye(4)))
      0.75
    """
    activations = _tokens("activations", activations)
    return jnp.mean(activations == 0, dtype=activations.dtype)


def chunk_sparsity(activations: jax.Array, chunk: int) -> jax.Array:
    """The share of experts that no token of a chunk uses (CLS).

    It is at most `token_sparsity`, and falls as chunks get longer: that share of the experts need
    not be read to compute `chunk` tokens at once.

    Args:
      activations: floating (..., tokens, experts).
      chunk: the number of tokens in a chunk; 8 in the paper. A last chunk may be shorter.

    Returns:
      A scalar from 0 to 1, float32 (float64 for float64).

    Raises:
      TypeError: `activations` are not floating, or `chunk` is no integer.
      ValueError: `activations` have fewer than two axes, or `chunk` is not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import regularizers
      >>> [float(regularizers.chunk_sparsity(jnp.eye(4), n)) for n in (1, 2, 4)]
      [0.75, 0.5, 0.0]
    """
    activations = _tokens("activations", activations)
    _checks.check_positive_integer(chunk=chunk)
    unused = _chunks(jnp.abs(activations), chunk).max(-2) == 0
    return jnp.mean(unused, dtype=activations.dtype)


def adaptive_factor(factor: float, latest: float, before: float) -> float:
    r"""The next factor of `chunk_sparsity_loss`, by how that loss went.

    .. math::
      \lambda \leftarrow \begin{cases}
      \gamma \lambda & \gamma \le 1 \\ \max(1.025, \gamma)\, \lambda & \gamma > 1
      \end{cases} \qquad \gamma = L_{\text{latest}} / L_{\text{before}}

    The paper keeps the factor for 1000 steps and then asks every 100, with the means of the loss
    over the last 100 steps and those before. It is computed on the host, between steps.

    Args:
      factor: the factor :math:`\lambda` so far, 0.05 at first.
      latest: the mean loss of the last window.
      before: the mean loss of the window before it.

    Returns:
      The factor for the next window.

    Raises:
      TypeError: an argument is no number.
      ValueError: `factor` or `latest` is negative, or `before` not positive.

    Examples:
      >>> from jaxopt_lab import regularizers
      >>> regularizers.adaptive_factor(0.5, latest=0.1, before=0.2)
      0.25

    References:
      Song et al., `BlockFFN <https://arxiv.org/abs/2507.08771>`_, COLM 2025.
    """
    _checks.check_non_negative(factor=factor, latest=latest)
    _checks.check_positive(before=before)
    ratio = float(latest) / float(before)
    return float(factor) * (ratio if ratio <= 1 else max(1.025, ratio))


def _tokens(name: str, value: Any) -> jax.Array:
    """Returns floating (..., tokens, experts), as wide as sums are."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an array")
    value = jnp.asarray(value)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} is {value.dtype}; expected a floating dtype")
    if value.ndim < 2:
        raise ValueError(f"{name} has shape {value.shape}; expected (..., tokens, experts)")
    return value.astype(_tree.compute_dtype(value.dtype))


def _check_shape(name: str, value: jax.Array, shape: tuple[int, ...]) -> None:
    if jnp.shape(value) != shape:
        raise ValueError(f"{name} has shape {jnp.shape(value)}; expected {shape}, one a token")


def _chunks(x: jax.Array, chunk: int) -> jax.Array:
    """Returns (..., chunks, tokens of a chunk, experts); zeros fill the last one up."""
    missing = -x.shape[-2] % chunk
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, missing), (0, 0)])
    return x.reshape(*x.shape[:-2], -1, chunk, x.shape[-1])
