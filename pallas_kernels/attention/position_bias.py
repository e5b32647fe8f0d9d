r"""Biases that a rule gives for each distance between a key and a query.

.. math:: \mathrm{bias}_{nts} = f_n(s - p), \qquad p = t + \mathrm{query\_offset}

A rule is a pytree of its parameters with one function of distances. `attention` evaluates it once
for each of the T + S - 1 distances that occur, N (T + S - 1) numbers (`diagonals_of`), and routes
read their tiles from these: no array over queries and keys exists, and the gradient is one sum for
each distance, which the rule's own derivative takes to its parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels._dtypes import wide


@functools.partial(jax.tree_util.register_dataclass, data_fields=["slopes"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Alibi:
    r"""Attention with linear biases: the farther a key, the lower its score.

    .. math:: \mathrm{bias}_{nts} = -\mathrm{slopes}_n \, |s - p|, \qquad
       p = t + \mathrm{query\_offset}

    which is ``-slope * (p - s)`` for every key that a causal mask leaves. Give it to `attention`,
    `decode_attention` or `ring_attention` as `bias`; it is a pytree, and differentiable.

    Args:
      slopes: (N,), floating, a slope for each head; `alibi_slopes` has the standard ones.

    Example:
      >>> import jax.numpy as jnp, pallas_kernels
      >>> x = jnp.ones((1, 6, 2, 8))
      >>> bias = pallas_kernels.Alibi(pallas_kernels.alibi_slopes(2))
      >>> pallas_kernels.attention(x, x, x, bias, is_causal=True).shape
      (1, 6, 2, 8)

    References:
      Press et al., `Train Short, Test Long <https://arxiv.org/abs/2108.12409>`_, 2021.
    """

    slopes: Any

    def at(self, distances: jax.Array) -> jax.Array:
        """Returns the bias of each head at int32 `distances`, key minus query: (N, ...)."""
        slopes = _wide(self.slopes)
        slopes = slopes.reshape(-1, *(1,) * distances.ndim)
        return -slopes * jnp.abs(distances).astype(slopes.dtype)[None]

    def check(self, heads: int) -> None:
        """Raises ValueError or TypeError where the slopes do not fit `heads`."""
        _check("slopes", self.slopes, (heads,), "one for each query head")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["table"],
    meta_fields=["bidirectional", "max_distance"],
)
@dataclasses.dataclass(frozen=True)
class RelativePositionBias:
    r"""A learned bias for each head and bucket of distances, as in T5.

    .. math:: \mathrm{bias}_{nts} = \mathrm{table}_{\mathrm{bucket}(s - p),\, n}, \qquad
       p = t + \mathrm{query\_offset}

    With h buckets for a direction (half of them if `bidirectional`, whose keys after the query have
    the upper half; else all, and keys after the query are in bucket 0) and e = h // 2, a distance m
    is in bucket m below e, and from there on in

    .. math:: \min\left(h - 1,\; e + \left\lfloor (h - e)
       \frac{\log (m / e)}{\log (\mathrm{max\_distance} / e)} \right\rfloor\right)

    evaluated without rounding. Give it to `attention`, `decode_attention` or `ring_attention` as
    `bias`; it is a pytree, and differentiable.

    Args:
      table: (num_buckets, N), floating.
      bidirectional: Whether keys after the query have buckets of their own; T5 has True in its
        encoder and False in its decoder.
      max_distance: From about this distance on all keys are in the last bucket.

    Example:
      >>> import jax.numpy as jnp, pallas_kernels
      >>> bias = pallas_kernels.RelativePositionBias(jnp.zeros((32, 2)), bidirectional=True)
      >>> bias.buckets(jnp.array([-200, -9, -1, 0, 1, 9, 200])).tolist()
      [15, 8, 1, 0, 17, 24, 31]

    References:
      Raffel et al., `Exploring the Limits of Transfer Learning <https://arxiv.org/abs/1910.10683>`_,
      2020.
    """

    table: Any
    bidirectional: bool = dataclasses.field(kw_only=True)
    max_distance: int = dataclasses.field(default=128, kw_only=True)

    def buckets(self, distances: jax.Array) -> jax.Array:
        """Returns the bucket of each of the int32 `distances`, key minus query."""
        side = self._side(self.table.shape[0])
        limits = np.minimum(_first_of_buckets(side, int(self.max_distance)), 2**31 - 1)
        limits = jnp.asarray(limits.astype(np.int32))
        ahead = distances > 0
        size = jnp.abs(distances) if self.bidirectional else jnp.maximum(-distances, 0)
        limits = limits.reshape(*(1,) * size.ndim, -1)
        found = (size[..., None] >= limits).sum(axis=-1, dtype=jnp.int32)
        return jnp.where(ahead, found + side, found) if self.bidirectional else found

    def at(self, distances: jax.Array) -> jax.Array:
        """Returns the bias of each head at int32 `distances`, key minus query: (N, ...)."""
        return jnp.moveaxis(_wide(self.table)[self.buckets(distances)], -1, 0)

    def check(self, heads: int) -> None:
        """Raises ValueError or TypeError where the fields do not fit each other or `heads`."""
        if not isinstance(self.bidirectional, (bool, np.bool_)):
            raise TypeError(f"bidirectional={self.bidirectional!r}; expected True or False")
        shape = _shape("table", self.table)
        expected = (shape[0] if shape else "num_buckets", heads)
        _check("table", self.table, expected, "a row for each bucket, a column for each query head")
        if self.bidirectional and shape[0] % 2:
            raise ValueError(
                f"table has {shape[0]} buckets; expected an even number, for two sides"
            )
        side = self._side(shape[0])
        if side < 2:
            raise ValueError(f"table has {side} buckets for a direction; expected at least 2")
        if not isinstance(self.max_distance, (int, np.integer)) or self.max_distance <= side // 2:
            raise ValueError(
                f"max_distance={self.max_distance!r}; expected an integer above {side // 2}, the "
                "distances that have a bucket each"
            )

    def _side(self, buckets: int) -> int:
        return buckets // 2 if self.bidirectional else buckets


Rule = Alibi | RelativePositionBias
RULES = (Alibi, RelativePositionBias)


def check_rule(bias: Any, because: str = "") -> None:
    """Raises TypeError where a bias is neither a rule nor None."""
    if bias is not None and not isinstance(bias, RULES):
        kinds = " or ".join(kind.__name__ for kind in RULES)
        raise TypeError(f"bias is of type {type(bias).__name__}; expected {kinds}{because}")


def alibi_slopes(heads: int) -> jax.Array:
    """Returns the slopes that `Alibi` had in its paper, float32 (heads,).

    ``2 ** (-8 i / heads)`` for i from 1 to `heads` where that is a power of two; else those of the
    next lower power p, followed by every second of those of 2 p.

    Args:
      heads: The number of query heads, at least 1.

    Returns:
      The slopes.

    Raises:
      TypeError: `heads` is no integer.
      ValueError: `heads` is below 1.

    Example:
      >>> alibi_slopes(4).tolist()
      [0.25, 0.0625, 0.015625, 0.00390625]
      >>> alibi_slopes(3).tolist()
      [0.0625, 0.00390625, 0.25]
    """
    if isinstance(heads, bool) or not isinstance(heads, (int, np.integer)):
        raise TypeError(f"heads={heads!r}; expected an integer")
    if heads < 1:
        raise ValueError(f"heads={heads}; expected at least 1")
    power = 1 << (int(heads).bit_length() - 1)
    exponents = [8 * i / power for i in range(1, power + 1)]
    exponents += [4 * i / power for i in range(1, 2 * (heads - power), 2)]
    return jnp.asarray(2.0 ** -np.asarray(exponents), jnp.float32)


def diagonals_of(
    rule: Rule, queries: int, keys: int, offset: int, offsets: jax.Array | None, dtype: Any
) -> jax.Array:
    """Returns the bias of every distance that occurs, (B or 1, N, T + S - 1).

    Entry i is that of key s and query t with ``s - t = i - (T - 1)``.
    """
    distances = jnp.arange(1 - queries, keys, dtype=jnp.int32)[None] - offset
    distances = distances if offsets is None else distances - offsets[:, None]
    return rule.at(distances).swapaxes(0, 1).astype(dtype)


@functools.cache
def _first_of_buckets(side: int, max_distance: int) -> tuple[int, ...]:
    """Returns the smallest distance of each bucket of a side but the first."""
    exact = side // 2
    rest = side - exact
    limits = list(range(1, exact + 1))
    for k in range(1, rest):
        # The smallest m with (m / exact) ** rest >= (max_distance / exact) ** k, in integers.
        least = max_distance**k * exact ** (rest - k)
        m = max(1, int(exact * (max_distance / exact) ** (k / rest)) - 2)
        while m**rest < least:
            m += 1
        limits.append(m)
    return tuple(limits)


def _wide(x: Any) -> jax.Array:
    """Returns parameters in at least float32: 16 bits hold no distance and no sum of gradients."""
    x = jnp.asarray(x)
    return x.astype(wide(x.dtype))


def _shape(name: str, x: Any) -> tuple[int, ...]:
    if not hasattr(x, "shape"):
        raise TypeError(f"bias has {name} of type {type(x).__name__}; expected an array")
    return x.shape


def _check(name: str, x: Any, shape: tuple[Any, ...], meaning: str) -> None:
    if _shape(name, x) != shape:
        raise ValueError(f"bias has {name} {x.shape}; expected {shape}, {meaning}")
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise TypeError(f"bias has {name} of dtype {jnp.result_type(x)}; expected a floating dtype")
