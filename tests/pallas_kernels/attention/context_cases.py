"""What the tests of `ring_attention` share: pretend devices, and problems spread over them."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.attention import dropout, reference
from pallas_kernels.attention.context import ring_attention, shard_sequence_order
from pallas_kernels.attention.mask import visible
from pallas_kernels.attention.problem import Gradients, Operands, Route, Settings
from tests.pallas_kernels.attention.cases import Case, Problem, build, check, quick_jit
from tests.pallas_kernels.attention.oracle import Result

N = 4  # devices
SPREAD = P(None, "x")


def _plain_backward(
    settings: Settings, operands: Operands, lse: Any, cotangent: Any, delta: Any, asked: bool
) -> Gradients:
    """With lse and delta as constants, d/dz of this sum is p (dp - delta)."""
    size = operands.sizes
    split = (size.batch, size.queries, size.kv_heads, size.group, -1)
    seen = visible(operands.mask, size.batch, size.queries, size.keys)
    seen &= (lse > -jnp.inf)[..., None]

    rows, keys = np.arange(size.queries)[:, None], np.arange(size.keys)
    drop: Any = 1
    if operands.seeds is not None:
        places = [jnp.asarray(x, jnp.int32)[None, None] for x in (rows, keys[None])]
        seeds = operands.seeds[..., None, None]
        kept = dropout.keep(seeds, places[0], places[1], settings.dropout_rate)
        drop = kept / (1 - settings.dropout_rate)

    def total(query: Any, key: Any, value: Any, diagonals: Any) -> Any:
        z = jnp.einsum("btkgd,bskd->bkgts", settings.scale * query.reshape(split), key)
        z = z.reshape(size.batch, size.heads, size.queries, size.keys)
        if diagonals is not None:
            z += diagonals[:, :, keys - rows + size.queries - 1]
        if settings.soft_cap is not None:
            z = settings.soft_cap * jnp.tanh(z / settings.soft_cap)
        p = jnp.where(seen, jnp.exp(jnp.where(seen, z - lse[..., None], 0)), 0)
        grouped = (p * drop).reshape(size.batch, size.kv_heads, size.group, size.queries, size.keys)
        output = jnp.einsum("bkgts,bskd->btkgd", grouped, value)
        return (output * cotangent.reshape(output.shape)).sum() - (delta * p.sum(axis=3)).sum()

    x = operands.query, operands.key, operands.value
    wide = *(a.astype(lse.dtype) for a in x), operands.diagonals
    *gradients, diagonals = jax.grad(total, (0, 1, 2, 3))(*wide)
    gradients = (g.astype(a.dtype) for g, a in zip(gradients, x))
    return Gradients(*gradients, diagonals=diagonals if asked else None)


PLAIN = Route("plain", reference.attend, _plain_backward, reference.refusal)
"""A route that is quick to compile, so that many combinations can be."""


def mesh(size: int = N) -> Mesh:
    return Mesh(jax.devices()[:size], ("x",))


def local(case: Case, layout: str, method: str, implementation: Any = PLAIN, **changes: Any) -> Any:
    """Returns the function of slices that a device runs."""
    causal = case.right == 0
    window = None
    if case.left is not None:
        window = (case.left, case.left if case.right is None else case.right)

    def fn(query: Any, key: Any, value: Any, sinks: Any, q_ids: Any, k_ids: Any) -> Any:
        return ring_attention(
            query,
            key,
            value,
            axis_name="x",
            layout=layout,
            method=method,
            scale=case.scale,
            is_causal=causal,
            local_window_size=window,
            logits_soft_cap=case.soft_cap,
            sinks=sinks,
            query_segment_ids=q_ids,
            key_value_segment_ids=k_ids,
            return_residual=True,
            implementation=implementation,
            **changes,
        )

    return fn


def mapped(fn: Any, how: str) -> Any:
    """Maps `fn` over slices: all arguments are whole sequences, but the sinks."""
    if how in ("checked", "unchecked"):
        specs = (SPREAD, SPREAD, SPREAD, P(), SPREAD, SPREAD)
        return jax.shard_map(
            fn, mesh=mesh(), in_specs=specs, out_specs=SPREAD, check_vma=how == "checked"
        )
    transform = {"vmap": jax.vmap, "pmap": jax.pmap}[how]

    def split(x: Any) -> Any:
        return None if x is None else x.reshape(x.shape[0], N, -1, *x.shape[2:])

    def over_slices(query: Any, key: Any, value: Any, sinks: Any, *ids: Any) -> Any:
        args = split(query), split(key), split(value), sinks, *map(split, ids)
        axes = tuple(None if x is None or i == 3 else 1 for i, x in enumerate(args))
        results = transform(fn, in_axes=axes, out_axes=1, axis_name="x")(*args)
        return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), results)

    return over_slices


def spread(fn: Any, layout: str, operands: Operands) -> Any:
    """Lays the sequence out, runs `fn`, and brings the results back into order."""
    mask = operands.mask
    order, inverse = zip(
        *(shard_sequence_order(x.shape[1], N, layout) for x in (operands.query, operands.key))
    )

    def laid_out(x: Any, side: int) -> Any:
        return None if x is None else x[:, order[side]]

    output, lse = fn(
        laid_out(operands.query, 0),
        laid_out(operands.key, 1),
        laid_out(operands.value, 1),
        operands.sinks,
        laid_out(mask.query_segment_ids, 0),
        laid_out(mask.key_value_segment_ids, 1),
    )
    return output[:, inverse[0]], lse[:, inverse[0]].transpose(0, 2, 1)


def results(attend: Any, problem: Problem, *, jit: bool = True) -> Result:
    """As `cases.run`, for what has no bias; by `pmap` there is nothing to compile as a whole."""
    operands, (d_output, d_lse) = problem.operands, problem.cotangents

    def fn(primals: Any) -> Any:
        query, key, value, sinks = primals
        return attend(operands._replace(query=query, key=key, value=value, sinks=sinks))

    def everything(primals: Any) -> Any:
        (output, lse), vjp = jax.vjp(fn, primals)
        return output, lse, *vjp((d_output, jnp.where(lse == -jnp.inf, 0, d_lse)))[0]

    if jit:
        everything = quick_jit(everything)
    primals = operands.query, operands.key, operands.value, operands.sinks
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), everything(primals))
    output, lse, query, key, value, sinks = found
    return Result(output, lse, query, key, value, None, sinks)


def check_spread(
    case: Case,
    layout: str = "zigzag",
    method: str = "ring",
    how: str = "checked",
    implementation: Any = PLAIN,
    **changes: Any,
) -> Result:
    fn = mapped(local(case, layout, method, implementation, **changes), how)
    attend = functools.partial(spread, fn, layout)
    got = results(attend, build(case), jit=how != "pmap")
    check(case, got)
    return got


base = Case("base", queries=32, keys=32, heads=4, kv_heads=4, head_dim=8, seed=1)
causal = base.replace(name="causal, grouped heads", right=0, heads=8, seed=2)
full = base.replace(name="full, more queries than keys", queries=48, value_dim=12, soft_cap=2.0)
features = base.replace(
    name="window, shuffled segments, sinks, soft cap, grouped heads", queries=64, keys=64,
    batch=2, left=5, right=3, segments="shuffled", sinks=True, soft_cap=2.0, heads=8,
)  # fmt: skip
window = base.replace(name="causal window", left=5, right=0, queries=48, keys=48, sinks=True)
uneven = base.replace(name="more keys than queries, causal", right=0, keys=64)
