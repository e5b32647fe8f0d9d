"""Attention over a sequence that is spread over devices, while keys and values travel in a ring.

Device i keeps its queries. In step t = 0 ... n - 1 it holds the keys and values of device i - t,
attends to them with any `Route`, and merges what comes out,

    lse' = log(exp(lse) + exp(lse_t));   o' = exp(lse - lse') o + exp(lse_t - lse') o_t

(`merge.py`), while the keys and values of the next step are already on their way. The backward pass
is a ring of its own. Since p = exp(z - lse) needs nothing but the lse of the whole row, the
gradients that a route returns for one pair of slices are exact summands; those of keys and values
travel along with their keys and values, one step behind, and arrive at home in the end. Between
the passes nothing is kept but query, key, value, output and lse of the own slice.

References:
  Liu et al., `Ring Attention <https://arxiv.org/abs/2310.01889>`_.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._compat import vary, varying_axes
from pallas_kernels._dtypes import wide
from pallas_kernels.attention import layouts, parts
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.merge import merge_parts
from pallas_kernels.attention.parts import Pair
from pallas_kernels.attention.problem import Gradients, Operands, Route, Settings


def ring(route: Route, axis: Axis, layout: str) -> Route:
    """Returns the route that does with a ring of devices what `route` does on one.

    Its operands are the device's slices. Its mask holds a window between positions in the whole
    sequence, lengths of whole sequences, the slices' segment ids, and a dense mask of its rows and
    the keys of all devices in turn. Diagonals are those of the whole sequence.
    """

    def forward(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
        return _forward(Job.of(route, axis, layout, settings, operands))

    def backward(
        settings: Settings, operands: Operands, lse: Any, cotangent: Any, delta: Any, asked: bool
    ) -> Gradients:
        job = Job.of(route, axis, layout, settings, operands)
        return _backward(job, Rows(lse, cotangent, delta, asked))

    def tangent(settings: Settings, operands: Operands, lse: Any, moved: Any) -> Any:
        return _tangent(Job.of(route, axis, layout, settings, operands), lse, moved)

    return Route(
        f"ring of {route.name}",
        forward,
        backward,
        route.refusal,
        tangent=None if route.tangent is None else tangent,
        axis_name=axis.name,
    )


class Axis(NamedTuple):
    """The mapped axis."""

    name: Hashable
    size: int  # as found outside of a derivative, inside of which `vmap` does not tell


class Held(NamedTuple):
    """The slice of another device, which travels."""

    key: jax.Array
    value: jax.Array
    segment_ids: jax.Array | None


class Partial(NamedTuple):
    """Attention over the keys seen so far."""

    output: jax.Array  # (B, T, N, dv), float32 or wider
    lse: jax.Array  # (B, T, N), in the same dtype


class Rows(NamedTuple):
    """What a backward pass knows of each query row, as `Route.backward` takes it."""

    lse: jax.Array
    cotangent: jax.Array
    delta: jax.Array
    bias_gradient: bool


class Own(NamedTuple):
    """Gradients that stay with a device, float32 or wider."""

    query: jax.Array
    diagonals: jax.Array | None  # if asked for, of all distances


class Job(NamedTuple):
    """What a device has to do, and where it stands on the axis."""

    route: Route
    settings: Settings
    operands: Operands
    axis: Axis
    layout: str
    device: jax.Array  # int32, the index of this device
    axes: frozenset[Any]  # mesh axes over which everything varies, see `_compat.vary`

    @classmethod
    def of(
        cls,
        route: Route,
        axis: Axis,
        layout: str,
        settings: Settings,
        operands: Operands,
    ) -> Job:
        """Returns the job of the device on which this is traced."""
        device = lax.axis_index(axis.name)
        axes = varying_axes(device, *jax.tree.leaves(operands))
        return cls(route, settings, operands, axis, layout, device, axes)

    @property
    def held(self) -> Held:
        """The slice that belongs to this device."""
        mask = self.operands.mask
        return Held(self.operands.key, self.operands.value, mask.key_value_segment_ids)

    def constant(self, shape: tuple[int, ...], dtype: Any, fill: float = 0) -> jax.Array:
        """Returns an array of one value whose type is that of the devices' own arrays."""
        return vary(jnp.full(shape, fill, dtype), self.axes)

    def pass_on(self, tree: Any, distance: int = 1) -> Any:
        """Sends arrays to the device that is `distance` further; returns those that arrive."""
        to = [(i, (i + distance) % self.axis.size) for i in range(self.axis.size)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axis.name, to), tree)


def _forward(job: Job) -> tuple[jax.Array, jax.Array]:
    return finish(job, _around(job, job.held, no_attention(job), add_attention))


def _around(job: Job, held: Any, total: Any, add: Callable[..., Any]) -> Any:
    """Returns `total` after ``add(job, plan, step, held, total)`` of every device's `held`."""
    work = _schedule(job)
    following = job.pass_on(held) if work.last > 0 else held
    total = add(job, work.local, 0, held, total)

    def step(t: Any, carry: Any) -> Any:
        total, held = carry
        following = job.pass_on(held)  # issued before the work, which does not wait for it
        return add(job, work.remote, t, held, total), following

    if work.last > 1:
        total, following = lax.fori_loop(1, work.last, step, (total, following))
    if work.last > 0:
        total = add(job, work.remote, work.last, following, total)
    return total


def _backward(job: Job, rows: Rows) -> Gradients:
    work = _schedule(job)
    following = job.pass_on(job.held) if work.last > 0 else job.held
    own, d_held = add_gradients(job, rows, work.local, 0, job.held, no_gradients(job, rows))

    def step(t: Any, carry: Any, is_last: bool = False) -> Any:
        own, d_held, held = carry
        following = held if is_last else job.pass_on(held)
        arriving = job.pass_on(d_held)  # added after the work, which does not wait for it either
        own, found = add_gradients(job, rows, work.remote, t, held, own)
        return own, jax.tree.map(jnp.add, arriving, found), following

    carry = own, d_held, following
    if work.last > 1:
        carry = lax.fori_loop(1, work.last, step, carry)
    if work.last > 0:
        own, d_held, _ = step(work.last, carry, is_last=True)
        d_held = job.pass_on(d_held, distance=job.axis.size - work.last)
    return cast(job, own, *d_held)


def _tangent(job: Job, lse: jax.Array, moved: dict[str, jax.Array]) -> tuple[Any, Any]:
    """Returns the sums of a route's tangent over all keys; the keys' tangents travel with them."""
    size, tangent = job.operands.sizes, job.route.tangent
    assert tangent is not None
    weighted = job.constant((size.batch, size.queries, size.heads, size.value_dim), lse.dtype)
    mass = job.constant(lse.shape, lse.dtype)

    def add(job: Job, plan: layouts.Plan, step: Any, carried: Any, total: Any) -> Any:
        held, d_held = carried

        def branch(calls: tuple[layouts.Call, ...], pair: Pair) -> Callable[..., Any]:
            def fn(weighted: jax.Array, mass: jax.Array) -> Any:
                for call in calls:
                    moves = {k: x[:, call.keys] for k, x in d_held.items()}
                    if "query" in moved:
                        moves["query"] = moved["query"][:, call.rows]
                    if "diagonals" in moved:
                        moves["diagonals"] = _band(job, call, pair).read(moved["diagonals"])
                    found = tangent(
                        job.settings,
                        _slice(job, held, call, pair),
                        lse[:, :, call.rows],
                        moves,
                    )
                    weighted = weighted.at[:, call.rows].add(found[0])
                    mass = mass.at[:, :, call.rows].add(found[1])
                return weighted, mass

            return fn

        return _take_branch(job, plan, step, branch, *total)

    d_held = {name: moved[name] for name in ("key", "value") if name in moved}
    return _around(job, (job.held, d_held), (weighted, mass), add)


def _schedule(job: Job) -> layouts.Schedule:
    size, mask = job.operands.sizes, job.operands.mask
    return layouts.schedule(
        job.layout, job.axis.size, size.queries, size.keys, mask.left, mask.right,
        by_runs=job.operands.diagonals is not None,
    )  # fmt: skip


def no_attention(job: Job) -> Partial:
    """Returns attention over no keys."""
    size = job.operands.sizes
    dtype = wide(job.operands.query.dtype)
    rows = (size.batch, size.queries, size.heads)
    output = job.constant((*rows, size.value_dim), dtype)
    return Partial(output, job.constant(rows, dtype, fill=-jnp.inf))


def finish(job: Job, total: Partial) -> tuple[jax.Array, jax.Array]:
    """Returns what a route returns, from attention over all keys. Only here do sinks count."""
    output, lse = total
    if job.operands.sinks is not None:
        with_sink = jnp.logaddexp(lse, job.operands.sinks.astype(lse.dtype)[None, None, :])
        # Where both are -inf there is nothing to share.
        share = jnp.exp(lse - jnp.where(with_sink == -jnp.inf, 0, with_sink))
        output *= share[..., None]
        lse = with_sink
    return _rounded(output, job.operands.query.dtype), lse.transpose(0, 2, 1)


def no_gradients(job: Job, rows: Rows) -> Own:
    """Returns gradients of 0."""
    query, diagonals = job.operands.query, job.operands.diagonals
    asked = diagonals if rows.bias_gradient else None
    return Own(
        job.constant(query.shape, rows.lse.dtype),
        None if asked is None else job.constant(asked.shape, rows.lse.dtype),
    )


def cast(job: Job, own: Own, *of_held: jax.Array) -> Gradients:
    """Returns the gradients of query, key and value in the dtypes of those."""
    like = job.operands.query, job.operands.key, job.operands.value
    gradients = (_rounded(x, y.dtype) for x, y in zip((own.query, *of_held), like))
    return Gradients(*gradients, diagonals=own.diagonals)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns `x` in `dtype`.

    The TPU compiler likes to move the rounding of a result into the branches that it comes from,
    and then fails on those that hand on what they were given. It does not move an explicit
    rounding, after which the cast is exact.
    """
    if dtype == jnp.bfloat16:
        x = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def add_attention(job: Job, plan: layouts.Plan, step: Any, held: Held, total: Partial) -> Partial:
    """Merges attention over `held`, the slice of device ``job.device - step``, into `total`."""

    def branch(calls: tuple[layouts.Call, ...], pair: Pair) -> Callable[..., Any]:
        def fn(total: Partial) -> Partial:
            for call in calls:
                operands = _slice(job, held, call, pair)
                output, lse = job.route.forward(job.settings, operands)
                before = Partial(*(x[:, call.rows] for x in total))
                dtype = before.output.dtype
                after = merge_parts(
                    jnp.stack([before.output, output.astype(dtype)]),
                    jnp.stack([before.lse, lse.transpose(0, 2, 1).astype(dtype)]),
                )
                total = Partial(*(x.at[:, call.rows].set(y) for x, y in zip(total, after)))
            return total

        return fn

    return _take_branch(job, plan, step, branch, total)


def add_gradients(
    job: Job, rows: Rows, plan: layouts.Plan, step: Any, held: Held, own: Own
) -> tuple[Own, tuple[jax.Array, jax.Array]]:
    """Returns `own` with the share of `held` added, and the shares of its key and value."""
    dtype = own.query.dtype
    shares = tuple(job.constant(x.shape, dtype) for x in (held.key, held.value))

    def branch(calls: tuple[layouts.Call, ...], pair: Pair) -> Callable[..., Any]:
        def fn(own: Own, d_key: jax.Array, d_value: jax.Array) -> Any:
            d_query, d_diagonals = own
            for call in calls:
                found = job.route.backward(
                    job.settings,
                    _slice(job, held, call, pair),
                    rows.lse[:, :, call.rows],
                    rows.cotangent[:, call.rows],
                    rows.delta[:, :, call.rows],
                    rows.bias_gradient,
                )
                d_query = d_query.at[:, call.rows].add(found.query.astype(dtype))
                d_key = d_key.at[:, call.keys].add(found.key.astype(dtype))
                d_value = d_value.at[:, call.keys].add(found.value.astype(dtype))
                if d_diagonals is not None:
                    d_diagonals = _band(job, call, pair).add(d_diagonals, found.diagonals)
            return Own(d_query, d_diagonals), d_key, d_value

        return fn

    own, d_key, d_value = _take_branch(job, plan, step, branch, own, *shares)
    return own, (d_key, d_value)


def _band(job: Job, call: layouts.Call, pair: Pair) -> parts.Band:
    return parts.band(job.operands, job.layout, job.axis.size, call, pair)


def _slice(job: Job, held: Held, call: layouts.Call, pair: Pair) -> Operands:
    """Returns the operands of one call."""
    query = job.operands.query[:, call.rows]
    query_ids, key_ids = job.operands.mask.query_segment_ids, held.segment_ids
    mask = Mask(
        left=call.left,
        right=call.right,
        offset=call.offset or 0,
        offsets=None if call.is_static else jnp.full(query.shape[:1], pair.offsets[call.pair]),
        query_segment_ids=None if query_ids is None else query_ids[:, call.rows],
        key_value_segment_ids=None if key_ids is None else key_ids[:, call.keys],
        dense=parts.dense_mask(job.operands, job.layout, job.axis.size, call, pair),
    )
    number = pair.device * job.axis.size + pair.source
    seeds = parts.seeds(job.operands.seeds, call.rows.start, call.keys.start, number)
    diagonals = job.operands.diagonals
    if diagonals is not None:
        diagonals = _band(job, call, pair).read(diagonals)
    key, value = held.key[:, call.keys], held.value[:, call.keys]
    return Operands(query, key, value, mask=mask, seeds=seeds, diagonals=diagonals)


def _take_branch(
    job: Job, plan: layouts.Plan, step: Any, branch: Callable[..., Any], *state: Any
) -> Any:
    """Takes the branch of `plan` for this device and the one whose slice it holds."""
    source = (job.device - step) % job.axis.size
    pair = Pair(jnp.asarray(plan.offsets)[job.device, source], job.device, source)
    branches = [branch(calls, pair) for calls in plan.branches]
    if len(branches) == 1:
        return branches[0](*state)
    return lax.switch(jnp.asarray(plan.choice)[job.device, source], branches, *state)
