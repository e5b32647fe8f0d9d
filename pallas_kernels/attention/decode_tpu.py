"""`decode_attention` for TPUs.

One program for each sequence and part of its keys, all heads at once. A page (page_size, K, d) is
taken as it lies in memory, as page_size * K rows of d: row c is head c % K of token c // K. One
product of all N T query rows with all rows of a block gives the scores of each query head with
every key/value head; those of other heads are masked like tokens that must not be seen. That is K
times the exponentials, in a step that waits for memory, and no transposed or strided load.

Pages come by DMA through the prefetched page table into one of two buffers, while the other one is
computed on. Pages that nobody sees are not copied. A contiguous cache is cut into pages, which
moves nothing. The parts are merged by the caller.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._compat import Device, device, out_struct
from pallas_kernels.attention import tuning
from pallas_kernels.attention.decode_problem import (
    Operands,
    Settings,
    blocks_of_split,
    keys_needed,
    lookup_of,
)

_LANES = 128
_VMEM_BYTES = 64 * 2**20


class Config(NamedTuple):
    """How the keys of a part are cut."""

    block_rows: int  # rows, token by head, of a block: what one step of the loop computes on


class _Plan(NamedTuple):
    page: int  # tokens of a page
    pages: int  # pages of a sequence
    pages_per_block: int
    kv_heads: int
    rows: int  # query rows of a key/value head
    padded_rows: int  # query rows of a program

    @property
    def page_rows(self) -> int:
        return self.page * self.kv_heads

    @property
    def block_rows(self) -> int:
        return self.pages_per_block * self.page_rows


def refusal(settings: Settings, operands: Operands, place: Device) -> str | None:
    """Returns why the call cannot be served, or None."""
    if 0 in operands.query.shape:
        return "the query is empty"
    if operands.rule is not None:
        return "it has no bias by rule"
    if operands.query.dtype == jnp.float16:
        return "float16 is no type of a TPU; expected bfloat16 or float32"
    for name, width in (("d", operands.key.shape[3]), ("dv", operands.value.shape[3])):
        if width % _LANES:
            return f"{name}={width}; expected a multiple of {_LANES}"
    page = _page_size(operands)
    if page is None:
        length, kv_heads = operands.key.shape[1:3]
        what = "S" if operands.page_table is None else "page_size"
        return (
            f"{what}={length} with K={kv_heads}; expected pages whose page_size * K is a multiple "
            f"of {_row_alignment(operands)}"
        )
    plan = _plan(operands)
    width = operands.key.shape[3] + operands.value.shape[3]
    buffers = 2 * plan.block_rows * width * operands.key.dtype.itemsize
    scores = plan.block_rows * plan.padded_rows * 4
    if buffers + 4 * scores > _VMEM_BYTES // 2:
        return (
            f"page_size={operands.key.shape[1]} with K={plan.kv_heads} and N * T = "
            f"{plan.rows * plan.kv_heads}; expected smaller pages or fewer rows"
        )
    if not settings.interpret and place.platform != "tpu":
        return f"it needs a TPU, and this is {place.platform!r}"
    return None


def decode(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs (P, B, K, R, dv) and lses (P, B, K, R) of P parts, float32."""
    (b, kv_heads, rows, d), dv = operands.query.shape, operands.value.shape[3]
    plan = _plan(operands)
    splits = settings.num_splits or max(1, _cores() // b)
    table = operands.page_table
    if table is None:
        table = jnp.arange(b * plan.pages, dtype=jnp.int32)
    # Reshapes that leave every byte of a cache where it is.
    caches = [x.reshape(-1, plan.page_rows, x.shape[3]) for x in (operands.key, operands.value)]
    scales = [
        x.reshape(-1, 1, plan.page_rows)
        for x in (operands.key_scale, operands.value_scale)
        if x is not None
    ]
    query = operands.query.reshape(b, kv_heads * rows, d)
    query = jnp.pad(query, ((0, 0), (0, plan.padded_rows - kv_heads * rows), (0, 0)))
    # What is not given costs nothing: no number to read ahead, no column.
    given = [x for x in (operands.starts, operands.prefixes) if x is not None]
    ahead = [jnp.concatenate([operands.lengths, *given]), table.reshape(-1)]
    columns = []
    if operands.head_scale is not None:
        column = jnp.repeat(operands.head_scale, rows)
        columns.append(jnp.pad(column, (0, plan.padded_rows - kv_heads * rows))[:, None])
    buffers = [
        *(pltpu.VMEM((2, plan.block_rows, x.shape[2]), x.dtype) for x in caches),
        *(pltpu.VMEM((2, 1, plan.block_rows), x.dtype) for x in scales),
    ]
    per_sequence = pl.BlockSpec((None, plan.padded_rows, d), lambda i, p, *_: (i, 0, 0))

    def per_part(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, plan.padded_rows, width), lambda i, p, *_: (p, i, 0, 0))

    inputs = jax.tree.leaves(operands)
    interpret = pltpu.InterpretParams() if settings.interpret is True else settings.interpret
    outputs, lses = pl.pallas_call(
        functools.partial(
            _kernel,
            settings=settings,
            plan=plan,
            has_scales=(operands.key_scale is not None, operands.value_scale is not None),
            has_start=operands.starts is not None,
            has_prefix=operands.prefixes is not None,
            has_column=bool(columns),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(b, splits),
            in_specs=[
                per_sequence,
                *(pl.BlockSpec(x.shape, lambda *_: (0, 0)) for x in columns),
                *(pl.BlockSpec(memory_space=pl.ANY) for _ in (*caches, *scales)),
            ],
            out_specs=[per_part(dv), per_part(1)],
            scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((2,))],
        ),
        out_shape=[
            out_struct((splits, b, plan.padded_rows, dv), jnp.float32, *inputs),
            out_struct((splits, b, plan.padded_rows, 1), jnp.float32, *inputs),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name="decode_attention",
    )(*ahead, query, *columns, *caches, *scales)
    shape = (splits, b, kv_heads, rows)
    outputs = outputs[:, :, : kv_heads * rows].reshape(*shape, dv)
    return outputs, lses[:, :, : kv_heads * rows, 0].reshape(shape)


def _row_alignment(operands: Operands) -> int:
    """Returns what the rows of a page must be a multiple of: a tile of the narrowest operand."""
    if operands.key_scale is not None or operands.value_scale is not None:
        return _LANES
    return 32 // min(operands.key.dtype.itemsize, operands.value.dtype.itemsize)


def _config(operands: Operands) -> Config:
    return tuning.default("decode_mosaic_tpu", Config, lookup_of(operands, device()))


def _page_size(operands: Operands) -> int | None:
    length, kv_heads = operands.key.shape[1:3]
    alignment = _row_alignment(operands)
    if operands.page_table is not None:
        return None if length * kv_heads % alignment else length
    sizes = (x for x in range(min(length, max(1, _config(operands).block_rows // kv_heads)), 0, -1))
    return next((x for x in sizes if length % x == 0 and x * kv_heads % alignment == 0), None)


def _plan(operands: Operands) -> _Plan:
    kv_heads, rows = operands.query.shape[1:3]
    page = _page_size(operands)
    assert page is not None, "refused before"
    pages = operands.capacity // page
    return _Plan(
        page=page,
        pages=pages,
        pages_per_block=max(1, min(_config(operands).block_rows // (page * kv_heads), pages)),
        kv_heads=kv_heads,
        rows=rows,
        padded_rows=-(-kv_heads * rows // 16) * 16,
    )


def _cores() -> int:
    """Returns the number of cores that share the programs of one kernel."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.devices()[0]
    return getattr(device, "num_cores", None) or 1


def _kernel(
    lengths_ref: Any,
    table_ref: Any,
    q_ref: Any,
    *refs: Any,
    settings: Settings,
    plan: _Plan,
    has_scales: tuple[bool, bool],
    has_start: bool,
    has_prefix: bool,
    has_column: bool,
) -> None:
    """Attends from all rows of one sequence to one part of its keys."""
    column_ref, refs = (refs[0], refs[1:]) if has_column else (None, refs)
    count = 2 + sum(has_scales)
    sources, (o_ref, lse_ref), buffers = refs[:count], refs[count : count + 2], refs[count + 2 : -1]
    semaphores = refs[-1]
    sequence, split = pl.program_id(0), pl.program_id(1)
    length = lengths_ref[sequence]
    sequences = pl.num_programs(0)
    begin = lengths_ref[sequences + sequence] if has_start else None
    prefix = lengths_ref[sequences * (1 + has_start) + sequence] if has_prefix else None
    start, stop = keys_needed(settings, length, begin)
    block = plan.pages_per_block * plan.page
    lower, upper = blocks_of_split(start, stop, block, split, pl.num_programs(1))

    def for_pages(i: jax.Array, slot: jax.Array, action: str) -> None:
        """Starts the copies of block i, or waits for them."""
        for j in range(plan.pages_per_block):
            first = i * block + j * plan.page

            @pl.when((first < stop) & (first + plan.page > start))
            def _(j: int = j) -> None:
                page = table_ref[sequence * plan.pages + i * plan.pages_per_block + j]
                rows = pl.ds(j * plan.page_rows, plan.page_rows)
                for n, (source, buffer) in enumerate(zip(sources, buffers)):
                    target = buffer.at[slot, rows] if n < 2 else buffer.at[slot, :, rows]
                    copy = pltpu.make_async_copy(source.at[page], target, semaphores.at[slot])
                    getattr(copy, action)()

    @pl.when(lower < upper)
    def _() -> None:
        for_pages(lower, jnp.int32(0), "start")

    q = q_ref[...]
    row = lax.broadcasted_iota(jnp.int32, (plan.padded_rows, 1), 0)
    head = row // plan.rows
    token = row % plan.rows // (plan.rows // settings.queries)
    position = length - settings.queries + token
    column = lax.broadcasted_iota(jnp.int32, (1, plan.block_rows), 1)
    own_head = column % plan.kv_heads == head
    scale = settings.scale if column_ref is None else settings.scale * column_ref[...]
    exact = {"precision": lax.Precision.HIGHEST} if q.dtype == jnp.float32 else {}

    def product(x: jax.Array, y: jax.Array, y_axis: int) -> jax.Array:
        return lax.dot_general(
            x, y, (((1,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32, **exact
        )

    def body(i: jax.Array, carry: Any) -> Any:
        peak, total, acc = carry
        slot = (i - lower) % 2

        @pl.when(i + 1 < upper)
        def _() -> None:
            for_pages(i + 1, 1 - slot, "start")

        for_pages(i, slot, "wait")
        scales = [buffer[slot] for buffer in buffers[2:]]
        # Token s of the sequence has the columns from (s - base) K on.
        base = i * block
        z = product(q, buffers[0][slot].astype(q.dtype), 1) * scale
        if has_scales[0]:
            z *= scales[0]
        if settings.soft_cap is not None:
            z = settings.soft_cap * jnp.tanh(z / settings.soft_cap)
        end = stop
        if settings.right is not None:
            end = position + settings.right + 1
            end = jnp.minimum(stop, end if prefix is None else jnp.maximum(end, prefix))
        seen = own_head & (column < (end - base) * plan.kv_heads)
        if settings.left is not None:
            seen &= column >= (position - settings.left - base) * plan.kv_heads
        if begin is not None:
            seen &= column >= (begin - base) * plan.kv_heads
        z = jnp.where(seen, z, -jnp.inf)
        new_peak = jnp.maximum(peak, z.max(axis=1, keepdims=True))
        shift = jnp.where(new_peak == -jnp.inf, 0.0, new_peak)
        decay = jnp.exp(peak - shift)
        p = jnp.exp(z - shift)
        total = decay * total + p.sum(axis=1, keepdims=True)
        first, last = (start - base) * plan.kv_heads, (stop - base) * plan.kv_heads
        if has_scales[1]:
            p *= jnp.where((column >= first) & (column < last), scales[-1], 0.0)
        # What nobody sees may be NaN, which no probability of 0 would stop.
        v = buffers[1][slot].astype(q.dtype)
        value_row = lax.broadcasted_iota(jnp.int32, v.shape, 0)
        v = jnp.where((value_row >= first) & (value_row < last), v, jnp.zeros_like(v))
        return new_peak, total, decay * acc + product(p.astype(v.dtype), v, 0)

    column_shape = (plan.padded_rows, 1)
    peak, total, acc = lax.fori_loop(
        lower,
        upper,
        body,
        (
            jnp.full(column_shape, -jnp.inf, jnp.float32),
            jnp.zeros(column_shape, jnp.float32),
            jnp.zeros((plan.padded_rows, o_ref.shape[-1]), jnp.float32),
        ),
    )
    empty = total == 0.0
    total = jnp.where(empty, 1.0, total)
    o_ref[...] = acc / total
    lse_ref[...] = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
