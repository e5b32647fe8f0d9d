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

from pallas_kernels.attention import layouts, parts, ring
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.problem import Gradients, Operands, Route, Settings
from pallas_kernels.attention.ring import Axis, Held, Job, Own, Rows


def gather(route: Route, axis: Axis, layout: str) -> Route:
    """Returns the route that attends with `route` to the gathered keys; operands as `ring.ring`."""

    def forward(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
        job = Job.of(route, axis, layout, settings, operands)
        return _forward_by_source(job) if _has_gaps(job) else _forward(job)

    def backward(
        settings: Settings, operands: Operands, lse: Any, cotangent: Any, delta: Any, asked: bool
    ) -> Gradients:
        job = Job.of(route, axis, layout, settings, operands)
        rows = Rows(lse, cotangent, delta, asked)
        find = _backward_by_source if _has_gaps(job) else _backward
        own, *d_held = find(job, rows)
        return ring.cast(job, own, *(_scatter(job, x) for x in d_held))

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


def _backward(job: Job, rows: Rows) -> tuple[Own, jax.Array, jax.Array]:
    held, dtype = _gather(job), rows.lse.dtype
    d_diagonals = ring.no_gradients(job, rows).diagonals
    d_queries, d_keys, d_values = [], [], []
    for run in _runs(job):
        part = job.route.backward(
            job.settings,
            _operands(job, held, run),
            rows.lse[:, :, run.rows],
            rows.cotangent[:, run.rows],
            rows.delta[:, :, run.rows],
            rows.bias_gradient,
        )
        if d_diagonals is not None:
            d_diagonals = _band(job, run).add(d_diagonals, part.diagonals)
        d_queries.append(part.query)
        d_keys.append(part.key.astype(dtype))
        d_values.append(part.value.astype(dtype))
    d_key, d_value = sum(d_keys[1:], d_keys[0]), sum(d_values[1:], d_values[0])
    if _has_window(job):
        d_key, d_value = (
            layouts.from_positions(x, job.axis.size, job.layout) for x in (d_key, d_value)
        )
    d_query = jnp.concatenate(d_queries, axis=1).astype(dtype)
    return Own(d_query, d_diagonals), d_key, d_value


def _band(job: Job, run: _Run) -> parts.Band:
    """Returns the distances between a run and all keys in the order of positions."""
    queries, keys = (job.axis.size * x.shape[1] for x in job.operands[:2])
    rows = run.rows.stop - run.rows.start
    assert run.offset is not None
    return parts.Band(queries - rows - run.offset, rows + keys - 1, 1)


def _operands(job: Job, held: Held, run: _Run, sinks: jax.Array | None = None) -> Operands:
    query, mask = job.operands.query[:, run.rows], job.operands.mask
    query_ids = mask.query_segment_ids
    mask = Mask(
        left=mask.left,
        right=mask.right,
        offsets=None if run.offset is None else jnp.full(query.shape[:1], run.offset),
        query_segment_ids=None if query_ids is None else query_ids[:, run.rows],
        key_value_segment_ids=held.segment_ids,
        key_value_lengths=mask.key_value_lengths,
        dense=_dense(job, run),
    )
    diagonals = job.operands.diagonals
    if diagonals is not None:
        diagonals = _band(job, run).read(diagonals)
    seeds = parts.seeds(job.operands.seeds, run.rows.start, 0, job.device)
    return Operands(query, held.key, held.value, None, sinks, mask, seeds, diagonals)


def _dense(job: Job, run: _Run) -> jax.Array | None:
    """Returns the dense mask of a run and all keys, in the order of the keys."""
    dense = job.operands.mask.dense
    if dense is not None and dense.shape[2] != 1:
        dense = dense[:, :, run.rows]
    if dense is not None and dense.shape[3] != 1 and _has_window(job):
        by_key = layouts.to_positions(dense.swapaxes(1, 3), job.axis.size, job.layout)
        dense = by_key.swapaxes(1, 3)
    return dense


def _runs(job: Job) -> list[_Run]:
    length = job.operands.query.shape[1]
    if not _has_window(job):
        return [_Run(slice(0, length), None)]
    starts = layouts.starts(job.layout, job.axis.size, length).astype(np.int32)
    first = jnp.asarray(starts)[job.device]
    step = length // len(first)
    return [_Run(slice(a * step, (a + 1) * step), first[a]) for a in range(len(first))]


def _has_window(job: Job) -> bool:
    """Whether it matters at which positions keys are."""
    mask = job.operands.mask
    given = (mask.left, mask.right, mask.key_value_lengths, job.operands.diagonals)
    return any(x is not None for x in given)


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


def _backward_by_source(job: Job, rows: Rows) -> tuple[Own, jax.Array, jax.Array]:
    held, plan, dtype = _gather(job), _plan(job), rows.lse.dtype

    def step(t: Any, total: Any) -> Any:
        own, *d_held = total
        part = _slice_of(job, held, t)
        own, shares = ring.add_gradients(job, rows, plan, t, part, own)
        start = _start(job, t)
        return own, *(
            lax.dynamic_update_slice_in_dim(x, y, start, axis=1) for x, y in zip(d_held, shares)
        )

    zeros = (job.constant(x.shape, dtype) for x in (held.key, held.value))
    return lax.fori_loop(0, job.axis.size, step, (ring.no_gradients(job, rows), *zeros))


def _plan(job: Job) -> layouts.Plan:
    size, mask = job.operands.sizes, job.operands.mask
    everyone = np.ones((job.axis.size, job.axis.size), bool)
    return layouts.plan(
        job.layout, job.axis.size, size.queries, size.keys, mask.left, mask.right, everyone,
        by_runs=job.operands.diagonals is not None,
    )  # fmt: skip


def _start(job: Job, step: Any) -> jax.Array:
    return (job.device - step) % job.axis.size * job.operands.key.shape[1]


def _slice_of(job: Job, held: Held, step: Any) -> Held:
    """Returns the slice of device ``job.device - step``."""
    length = job.operands.key.shape[1]
    return jax.tree.map(
        lambda x: lax.dynamic_slice_in_dim(x, _start(job, step), length, axis=1), held
    )
