"""Attention and its output projection, whose sum over devices runs beside the next queries."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import _options
from pallas_kernels.attention import api, arguments, dropout
from pallas_kernels.attention.placement import size_of_axis
from pallas_kernels.attention.problem import Operands


def attention_projected(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    kernel: jax.Array,
    *,
    axis_name: Hashable,
    chunks: int | Sequence[int],
    scatter: bool = False,
    **attention_options: Any,
) -> jax.Array:
    r"""Attention, its output projection, and the sum over devices that hold the heads.

    .. math:: y_t = \sum_{\mathrm{devices}} \sum_{n, e} o_{tne} W_{new}, \qquad
       o = \mathrm{attention}(q, k, v)

    For use inside `jax.shard_map` or ``jax.vmap(axis_name=...)`` whose axis splits the heads. The
    queries are cut into chunks, one call and one sum each, so that a compiler with asynchronous
    collectives can send a chunk while the next one is computed. Keys and values stay whole, and
    each chunk sees what its queries see in one call. Values and gradients are those of ``psum`` of
    the whole product, up to rounding; the bytes sent are the same.

    With computing time C, sending time R and a latency l for each of n equal chunks, it takes
    ``C / n + (n - 1) max(C, R) / n + R / n + n l``: a few chunks are best. Under a causal mask
    later queries see more keys, and chunks of equal work become shorter.

    Args:
      query: (B, T, N, d), the heads of this device; any number of leading axes in place of B.
      key: (B, S, K, d) of the same dtype; K divides N.
      value: (B, S, K, dv) of the same dtype.
      kernel: (N, dv, width) of the same dtype, the rows that belong to the heads of this device.
      axis_name: Name of the mapped axis.
      chunks: How many chunks of equal length, as nearly as that divides; or the positions at which
        the queries are cut, as in `jnp.split`, ascending.
      scatter: Whether device i gets the i-th of equal parts of each chunk's queries, one behind the
        other, and not all (sequence parallelism). Each chunk must divide by the number of devices;
        a number of chunks is cut so where T does.
      **attention_options: Those of `attention`, but `return_residual`, for the whole call: masks
        and lengths cover all T queries; `bias`, `mask` and `sinks` have the heads of this device.
        Dropout counts heads from 0 on each device: fold `lax.axis_index` into `dropout_rng`.

    Returns:
      (B, T, width) in the dtype of `query`, equal on all devices; with `scatter` (B, T / devices,
      width), its own on each.

    Raises:
      ValueError: A shape or value does not fit, or the axis is not bound.
      TypeError: A dtype does not fit, or an option is not known.
      NotImplementedError: As `attention`.

    Example:
      >>> import jax, jax.numpy as jnp, pallas_kernels
      >>> def layer(x, kernel):
      ...     return pallas_kernels.attention_projected(
      ...         x, x, x, kernel, axis_name="heads", chunks=2, is_causal=True)
      >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("heads",))
      >>> layer = jax.shard_map(
      ...     layer, mesh=mesh, in_specs=(jax.P(None, None, "heads"), jax.P("heads")),
      ...     out_specs=jax.P())
      >>> layer(jnp.ones((1, 8, 2, 4)), jnp.ones((2, 4, 16))).shape
      (1, 8, 16)

    References:
      FastAttention's tiling-AllReduce (`arXiv 2410.16663 <https://arxiv.org/abs/2410.16663>`_).
    """
    devices = size_of_axis(axis_name)
    scatter = _options.flag("scatter", scatter)
    if "return_residual" in attention_options:
        raise TypeError("return_residual is no option here; expected those of attention without it")
    given = inspect.signature(api.attention).bind(query, key, value, **attention_options)
    given.apply_defaults()
    call: dict[str, Any] = dict(given.arguments)
    implementation, _ = call.pop("implementation"), call.pop("return_residual")
    whole = arguments.canonical(**call)
    kernel = _checked_kernel(kernel, whole.operands)
    length = whole.operands.query.shape[1]
    cuts = _cuts(chunks, length, devices if scatter else 1)
    products, sums = [], []
    for start, stop in itertools.pairwise(cuts):
        rows = _rows(whole.operands, start, stop)
        # Without an order a compiler makes one sum of all, or runs attention of all chunks first:
        # a sum has attention of the next chunk beside it, and is there before that one's product.
        if sums:
            rows = rows._replace(query=_after(products[-1], rows.query))
        output = api.run(whole._replace(operands=rows), implementation, return_residual=False)
        if sums:
            output = _after(sums[-1], output)
        products.append(
            jnp.einsum("...tne,new->...tw", output, kernel, precision=whole.settings.precision)
        )
        sums.append(_summed(products[-1], axis_name, scatter))
    return jnp.concatenate(sums, axis=-2)


def _summed(product: jax.Array, axis_name: Hashable, scatter: bool) -> jax.Array:
    if not scatter:
        return lax.psum(product, axis_name)
    rows = product.ndim - 2
    return lax.psum_scatter(product, axis_name, scatter_dimension=rows, tiled=True)


@jax.custom_jvp
def _after(done: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `x`, which a compiler does not use before it has `done`."""
    return lax.optimization_barrier((done, x))[1]


@_after.defjvp
def _after_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # The barrier's own rule would keep zeros for `done` in the backward pass.
    return _after(*primals), tangents[1]


def _rows(operands: Operands, start: int, stop: int) -> Operands:
    """Returns the call of the queries from `start` to `stop`, at their positions."""
    mask, length = operands.mask, operands.query.shape[1]

    def cut(x: jax.Array | None, axis: int) -> Any:
        if x is None or x.shape[axis] == 1 != length:
            return x
        return lax.slice_in_dim(x, start, stop, axis=axis)

    lengths, seeds, diagonals = mask.query_lengths, operands.seeds, operands.diagonals
    if diagonals is not None:  # entry i is that of the distance i - (length - 1)
        last = diagonals.shape[2] - start
        diagonals = lax.slice_in_dim(diagonals, length - stop, last, axis=2)
    return operands._replace(
        query=cut(operands.query, 1),
        bias=cut(operands.bias, 2),
        diagonals=diagonals,
        # The hash of `dropout.keep` takes row * ROW + seed.
        seeds=None if seeds is None else seeds + jnp.int32(start) * dropout.ROW,
        mask=dataclasses.replace(
            mask,
            offset=mask.offset + start,
            query_lengths=None if lengths is None else jnp.clip(lengths - start, 0, stop - start),
            query_segment_ids=cut(mask.query_segment_ids, 1),
            dense=cut(mask.dense, 2),
        ),
    )


def _cuts(chunks: Any, length: int, multiple: int) -> tuple[int, ...]:
    """Returns where chunks begin, and the end of the last."""
    if isinstance(chunks, (tuple, list)) or np.ndim(chunks) == 1:
        cuts = (0, *_options.indices("chunks", chunks), length)
        if any(a >= b for a, b in itertools.pairwise(cuts)):
            raise ValueError(
                f"chunks={chunks!r}; expected ascending positions between 0 and {length}, the "
                "number of queries"
            )
    else:
        number, parts = _options.index("chunks", chunks), length // multiple
        if not 1 <= number <= max(1, parts):
            raise ValueError(
                f"chunks={number}; expected 1 to {max(1, parts)} for {length} queries"
                + (f" in parts for {multiple} devices" if multiple > 1 else "")
            )
        cuts = (*(i * parts // number * multiple for i in range(number)), length)
    if any(cut % multiple for cut in cuts):
        raise ValueError(
            f"chunks={chunks!r} cuts {length} queries at {cuts}; expected multiples of the "
            f"{multiple} devices with scatter=True"
        )
    return cuts


def _checked_kernel(kernel: Any, operands: Operands) -> jax.Array:
    kernel = _options.array("kernel", kernel)
    heads, size = operands.query.shape[2], operands.value.shape[3]
    if kernel.ndim != 3 or kernel.shape[:2] != (heads, size):
        raise ValueError(
            f"kernel has shape {kernel.shape}; expected (heads, head_dim, width) = "
            f"({heads}, {size}, width) for the heads of this device"
        )
    if kernel.dtype != operands.query.dtype:
        raise TypeError(
            f"kernel has dtype {kernel.dtype}; expected that of query, {operands.query.dtype}"
        )
    return kernel
