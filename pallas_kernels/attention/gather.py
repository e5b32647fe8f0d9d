"""Attention over a spread sequence where every device gathers all keys and values.

Each run of consecutive queries of a device is one call of a route against all keys, in the order
of their positions. The backward pass gathers again, so that nothing but the own slice is kept
between the passes, and sums the gradients of keys and values over the devices with a
reduce-scatter in float32.

In both passes a device holds B S K (d + dv) elements of keys and values, and in the backward pass
as many of their gradients in float32: n times what a ring needs, for two collectives instead of n.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels.attention import layouts, ring
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.problem import Gradients, Operands, Route, Settings
from pallas_kernels.attention.ring import Axis, Held, Job, Rows


def gather(route: Route, axis: Axis, layout: str) -> Route:
    """Returns the route that attends with `route` to the gathered keys; operands as `ring.ring`."""

    def forward(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
        job = Job.of(route, axis, layout, settings, operands)
        return _forward_by_source(job) if _has_gaps(job) else _forward(job)

    def backward(
        settings: Settings, operands: Operands, lse: Any, cotangent: Any, delta: Any, _: bool
    ) -> Gradients:
        job = Job.of(route, axis, layout, settings, operands)
        rows = Rows(lse, cotangent, delta)
        find = _backward_by_source if _has_gaps(job) else _backward
        d_query, d_key, d_value = find(job, rows)
        return ring.cast(job, d_query, *(_scatter(job, x) for x in (d_key, d_value)))

    return Route(f"gather to {route.name}", forward, backward, route.refusal)


class _Run(NamedTuple):
    """Consecutive queries of a device."""

    rows: slice
    offset: jax.Array | None  # position of the first, None where nothing depends on it


def _forward(job: Job) -> tuple[jax.Array, jax.Array]:
    held = _gather(job)
    results = [
        job.route.forward(job.settings, _operands(job, held, run, job.operands.sinks))
        for run in _runs(job)
    ]
    outputs, lses = zip(*results)
    return jnp.concatenate(outputs, axis=1), jnp.concatenate(lses, axis=2)


def _backward(job: Job, rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
    held, dtype = _gather(job), rows.lse.dtype
    d_queries, d_keys, d_values = [], [], []
    for run in _runs(job):
        part = job.route.backward(
            job.settings,
            _operands(job, held, run),
            rows.lse[:, :, run.rows],
            rows.cotangent[:, run.rows],
            rows.delta[:, :, run.rows],
            False,
        )
        d_queries.append(part.query)
        d_keys.append(part.key.astype(dtype))
        d_values.append(part.value.astype(dtype))
    d_key, d_value = sum(d_keys[1:], d_keys[0]), sum(d_values[1:], d_values[0])
    if _has_window(job):
        d_key, d_value = (
            layouts.from_positions(x, job.axis.size, job.layout) for x in (d_key, d_value)
        )
    return jnp.concatenate(d_queries, axis=1), d_key, d_value


def _operands(job: Job, held: Held, run: _Run, sinks: jax.Array | None = None) -> Operands:
    query, mask = job.operands.query[:, run.rows], job.operands.mask
    query_ids = mask.query_segment_ids
    mask = Mask(
        left=mask.left,
        right=mask.right,
        offsets=None if run.offset is None else jnp.full(query.shape[:1], run.offset),
        query_segment_ids=None if query_ids is None else query_ids[:, run.rows],
        key_value_segment_ids=held.segment_ids,
    )
    return Operands(query, held.key, held.value, sinks=sinks, mask=mask)


def _runs(job: Job) -> list[_Run]:
    length = job.operands.query.shape[1]
    if not _has_window(job):
        return [_Run(slice(0, length), None)]
    starts = layouts.starts(job.layout, job.axis.size, length).astype(np.int32)
    first = jnp.asarray(starts)[job.device]
    step = length // len(first)
    return [_Run(slice(a * step, (a + 1) * step), first[a]) for a in range(len(first))]


def _has_window(job: Job) -> bool:
    return job.operands.mask.left is not None or job.operands.mask.right is not None


def _has_gaps(job: Job) -> bool:
    """Whether a window meets queries of every n-th position, which no one mask describes."""
    return job.layout == "striped" and _has_window(job)


def _gather(job: Job) -> Held:
    """Returns keys, values and ids of all devices, in the order of positions if that matters."""

    def gathered(x: jax.Array) -> jax.Array:
        x = lax.all_gather(x, job.axis.name, axis=1, tiled=True)
        ordered = _has_window(job) and not _has_gaps(job)
        return layouts.to_positions(x, job.axis.size, job.layout) if ordered else x

    return jax.tree.map(gathered, job.held)


def _scatter(job: Job, gradient: jax.Array) -> jax.Array:
    """Returns this device's slice of the sum of `gradient` over the devices."""
    return lax.psum_scatter(gradient, job.axis.name, scatter_dimension=1, tiled=True)


def _forward_by_source(job: Job) -> tuple[jax.Array, jax.Array]:
    """Attends to one device's slice after the other, as a ring does."""
    held, plan = _gather(job), _plan(job)

    def step(t: Any, total: Any) -> Any:
        return ring.add_attention(job, plan, t, _slice_of(job, held, t), total)

    return ring.finish(job, lax.fori_loop(0, job.axis.size, step, ring.no_attention(job)))


def _backward_by_source(job: Job, rows: Rows) -> tuple[jax.Array, jax.Array, jax.Array]:
    held, plan, dtype = _gather(job), _plan(job), rows.lse.dtype

    def step(t: Any, total: Any) -> Any:
        d_query, *d_held = total
        part = _slice_of(job, held, t)
        d_query, shares = ring.add_gradients(job, rows, plan, t, part, d_query)
        start = _start(job, t)
        return d_query, *(
            lax.dynamic_update_slice_in_dim(x, y, start, axis=1) for x, y in zip(d_held, shares)
        )

    shapes = job.operands.query.shape, held.key.shape, held.value.shape
    zeros = tuple(job.constant(shape, dtype) for shape in shapes)
    return lax.fori_loop(0, job.axis.size, step, zeros)


def _plan(job: Job) -> layouts.Plan:
    size, mask = job.operands.sizes, job.operands.mask
    everyone = np.ones((job.axis.size, job.axis.size), bool)
    return layouts.plan(
        job.layout, job.axis.size, size.queries, size.keys, mask.left, mask.right, everyone
    )


def _start(job: Job, step: Any) -> jax.Array:
    return (job.device - step) % job.axis.size * job.operands.key.shape[1]


def _slice_of(job: Job, held: Held, step: Any) -> Held:
    """Returns the slice of device ``job.device - step``."""
    length = job.operands.key.shape[1]
    return jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, _start(job, step), length, axis=1), held
    )
