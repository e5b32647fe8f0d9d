"""The derivatives of the chunked form, by two plans.

* `row_sums` keeps operands and lse; the backward pass makes the logits again, block by block. It
  has a cotangent for each token.
* `summed` makes the gradients of the sum of all losses in the forward pass, some tokens at a time,
  while their logits are there: one product of four less, and memory for a gradient of the weight
  in float32. What follows may only scale that sum, and them with it.

The first derivative is taken by hand. Further ones go through the loops as they are written, so
there are Hessian-vector products; forward mode of the loss itself is refused by JAX.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels._compat import vary, varying_axes
from pallas_kernels._dtypes import wide
from pallas_kernels.loss import chunked, tokens
from pallas_kernels.loss.problem import Operands, Rows, Settings, Tokens, product_dtype


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def row_sums(settings: Settings, operands: Operands, counted: jax.Array | None) -> Rows:
    """Returns the sums over this shard's classes, whose gradients make the logits again."""
    return chunked.row_sums(settings, tokens.without_ignored(operands, counted))


def _row_sums_forward(settings: Settings, operands: Operands, counted: jax.Array | None) -> Any:
    rows = chunked.row_sums(settings, tokens.without_ignored(operands, counted))
    rows = rows._replace(lse=checkpoint_name(rows.lse, "cross_entropy_lse"))
    return rows, (operands, counted, rows.lse)


def _row_sums_backward(settings: Settings, kept: Any, cotangents: Rows) -> Any:
    operands, counted, lse = kept
    read = tokens.without_ignored(operands, counted)
    return _cotangent(operands, chunked.gradients(settings, read, lse, cotangents)), None


row_sums.defvjp(_row_sums_forward, _row_sums_backward)


def summed(settings: Settings, operands: Operands, given: Tokens) -> jax.Array:
    """Returns the sum of all losses, whose gradients are made with it."""
    total: Any = _summed(settings, operands, given)
    if settings.axis_name is None:
        return total
    # Every shard has the same sum; what comes back is that of the first.
    first = lax.axis_index(settings.axis_name) == 0
    return lax.psum(jnp.where(first, total, 0), settings.axis_name)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(settings: Settings, operands: Operands, given: Tokens) -> jax.Array:
    read = tokens.without_ignored(operands, given.counted)
    rows = tokens.across_shards(settings, chunked.row_sums(settings, read))
    return _of_each_shard(settings, tokens.losses(settings, rows, given).sum())


def _of_each_shard(settings: Settings, total: jax.Array) -> jax.Array:
    """Returns the sum as one that each shard has its own of, and so its own cotangent."""
    if settings.axis_name is None:
        return total
    return jnp.where(lax.axis_index(settings.axis_name) >= 0, total, 0)


def _summed_forward(settings: Settings, operands: Operands, given: Tokens) -> Any:
    total, gradients = _with_gradients(settings, operands, given)
    return _of_each_shard(settings, total), (operands, gradients)


def _summed_backward(settings: Settings, kept: Any, cotangent: jax.Array) -> Any:
    operands, gradients = kept
    if settings.axis_name is not None:
        cotangent = lax.psum(cotangent, settings.axis_name)
    return _cotangent(operands, jax.tree.map(lambda x: cotangent * x, gradients)), None


_summed.defvjp(_summed_forward, _summed_backward)


def _with_gradients(
    settings: Settings, operands: Operands, given: Tokens
) -> tuple[jax.Array, chunked.Gradients]:
    dtype, axes = wide(operands.hidden.dtype), varying_axes(*jax.tree.leaves(operands))
    split = _Split.of(operands.labels.size, settings.block_tokens)
    width, vocabulary = operands.hidden.shape[-1], operands.weight.shape[settings.vocabulary_axis]
    hidden = split.apart(operands.hidden.reshape(-1, width), 0)
    labels = split.apart(operands.labels.reshape(-1), -1)
    counted = jnp.ones_like(given.known) if given.counted is None else given.counted
    counted = split.apart(counted.reshape(-1), False)  # what fills the last part up
    known = split.apart(given.known.reshape(-1), True)
    weights = given.weights
    if weights is not None:
        weights = split.apart(weights.reshape(-1), 0)

    def step(i: jax.Array, carry: Any) -> Any:
        total, found = carry
        here = operands._replace(hidden=split.take(hidden, i), labels=split.take(labels, i))
        here = tokens.without_ignored(here, split.take(counted, i))
        own = given._replace(counted=split.take(counted, i), known=split.take(known, i))
        if weights is not None:
            own = own._replace(weights=split.take(weights, i))
        narrow = here.hidden.astype(product_dtype(here.hidden))

        def make(start: Any, size: int, carry: Any) -> Any:
            kept, running = carry
            s = chunked.logits(settings, here, narrow, start, size)
            kept = chunked.add_at(kept, s, start, 1, overwrite=True)
            return kept, chunked.add_block(settings, here, running, s, start)

        kept = vary(jnp.zeros((split.rows, vocabulary), dtype), axes)
        first = kept, chunked.empty(settings, here)
        kept, running = chunked.over_blocks(settings, operands, make, first)
        rows = tokens.across_shards(settings, chunked.finished(running))

        def loss(rows: Rows) -> jax.Array:
            return tokens.losses(settings, rows, own).sum()

        part, pull = jax.vjp(loss, rows)
        (cotangents,) = pull(vary(jnp.ones((), dtype), varying_axes(part)))

        def use(start: Any, size: int, found: chunked.Gradients) -> chunked.Gradients:
            s = lax.dynamic_slice_in_dim(kept, jnp.asarray(start, jnp.int32), size, 1)
            dx = chunked.of_logits(settings, here, s, rows.lse, cotangents, start)
            return chunked.add_products(settings, here, found, dx, start, overwrite=False)

        of_rows = found._replace(hidden=vary(jnp.zeros(here.hidden.shape, dtype), axes))
        of_rows = chunked.over_blocks(settings, operands, use, of_rows)
        d_hidden = split.put(found.hidden, of_rows.hidden, i)
        return total + vary(part, axes), of_rows._replace(hidden=d_hidden)

    nothing = chunked.zeros(operands._replace(hidden=hidden), dtype, dtype)
    zero = vary(jnp.zeros((), dtype), axes)
    total, found = lax.fori_loop(0, split.parts, step, (zero, nothing))
    d_hidden = found.hidden.reshape(-1, width)[: operands.labels.size]
    return total, found._replace(hidden=d_hidden.reshape(operands.hidden.shape))


class _Split(NamedTuple):
    """Tokens in parts, each of which has some of all devices' where the tokens are sharded."""

    rows: int
    parts: int

    @classmethod
    def of(cls, count: int, most: int) -> _Split:
        parts = max(1, -(-count // most))
        return cls(-(-count // parts), parts)

    def apart(self, x: jax.Array, filling: Any) -> jax.Array:
        """Turns (N, ...) into (rows, parts, ...)."""
        missing = self.rows * self.parts - x.shape[0]
        if missing:
            widths = [(0, missing)] + [(0, 0)] * (x.ndim - 1)
            x = jnp.pad(x, widths, constant_values=filling)
        return x.reshape(self.rows, self.parts, *x.shape[1:])

    def take(self, x: jax.Array, i: jax.Array) -> jax.Array:
        """Returns part `i`, (rows, ...)."""
        return lax.dynamic_index_in_dim(x, i, 1, keepdims=False)

    def put(self, x: jax.Array, part: jax.Array, i: jax.Array) -> jax.Array:
        """Returns `x` with its part `i` replaced."""
        return lax.dynamic_update_index_in_dim(x, part, i, 1)


def _cotangent(operands: Operands, found: chunked.Gradients) -> Operands:
    bias = operands.bias
    return Operands(
        hidden=found.hidden.astype(operands.hidden.dtype),
        weight=found.weight.astype(operands.weight.dtype),
        labels=None,  # type: ignore[arg-type]
        bias=None if bias is None or found.bias is None else found.bias.astype(bias.dtype),
        class_weights=None,
    )
