"""`decode_attention` for NVIDIA GPUs of capability 8.0 and up, through Pallas' Triton backend.

One program for each sequence, key/value head and part of the keys. It keeps the R query rows of the
head (padded to 16, the least that a tensor core takes) and walks over the keys of its part; loads
are masked, so that neither the memory past a sequence nor its contents are touched. Pages are
gathered row by row through the page table. The parts are merged by the caller.

jax is leaving this backend (deprecated since 0.11): everything that depends on it is in this file.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels._compat import Device, device, out_struct, silence_triton
from pallas_kernels.attention import tuning
from pallas_kernels.attention.decode_problem import (
    Operands,
    Settings,
    blocks_of_split,
    keys_needed,
    lookup_of,
    sees,
)

_MAX_ROWS = 128
_MAX_HEAD_DIM = 512


class Config(NamedTuple):
    """How the keys of a part are cut."""

    block_kv: int  # tokens of a block, a power of two, at most
    tile_bytes: int  # of the keys and values of one block
    num_warps: int
    num_stages: int


def refusal(settings: Settings, operands: Operands, place: Device) -> str | None:
    """Returns why the call cannot be served, or None."""
    rows = operands.query.shape[2]
    if rows > _MAX_ROWS:
        return f"T * N / K is {rows}; expected at most {_MAX_ROWS} query rows of a key/value head"
    widest = max(operands.key.shape[3], operands.value.shape[3])
    if widest > _MAX_HEAD_DIM:
        return f"a head dimension is {widest}; expected at most {_MAX_HEAD_DIM}"
    if 0 in operands.query.shape:
        return "the query is empty"
    if operands.rule is not None:
        return "it has no bias by rule"
    for name, cache in (("key_cache", operands.key), ("value_cache", operands.value)):
        # Offsets count elements and get 64 bits where the array has more than 2**32 bytes.
        if cache.size > 2**31 and cache.size * cache.dtype.itemsize <= 2**32:
            return f"{name} has {cache.size} elements; Pallas addresses them with 32 signed bits"
    if settings.interpret not in (False, True):
        return (
            f"interpret={settings.interpret!r}; expected a bool, there is a plain interpreter only"
        )
    if settings.interpret:
        return None
    if place.platform != "gpu":
        return f"it needs an NVIDIA GPU, and this is {place.platform!r}"
    if place.compute_capability is None:
        return None
    if place.compute_capability < (8, 0):
        return f"it needs compute capability 8.0, and {place.kind} has less"
    e4m3 = jnp.dtype(jnp.float8_e4m3fn)
    if e4m3 in (operands.key.dtype, operands.value.dtype) and place.compute_capability < (8, 9):
        return f"float8_e4m3fn needs compute capability 8.9, and {place.kind} has less"
    return None


def default_splits(operands: Operands, cores: int, block: int) -> int:
    """Returns how many parts give each core about two programs of two or more blocks each."""
    b, kv_heads = operands.query.shape[:2]
    most = max(1, operands.capacity // (2 * block))
    return max(1, min(2 * cores // (b * kv_heads), most))


def decode(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Returns the outputs (P, B, K, R, dv) and lses (P, B, K, R) of P parts, float32."""
    (b, kv_heads, rows, d), dv = operands.query.shape, operands.value.shape[3]
    padded_rows = max(16, pl.next_power_of_2(rows))
    d_tile, dv_tile = (max(16, pl.next_power_of_2(x)) for x in (d, dv))
    width = d_tile * operands.key.dtype.itemsize + dv_tile * operands.value.dtype.itemsize
    config = _config(operands)
    block = pl.next_power_of_2(max(16, min(config.block_kv, config.tile_bytes // width)))
    splits = settings.num_splits or default_splits(operands, _cores(), block)

    def cache_spec(*columns: int) -> pl.BlockSpec:
        if operands.page_table is None:
            # Whole blocks, so that no slice leaves the array; loads beyond its end are masked.
            length = pl.cdiv(operands.capacity, block) * block
            shape, index = (None, length, None, *columns), lambda i, h, _: (i, 0, h)
        else:
            shape, index = (*operands.key.shape[:2], None, *columns), lambda i, h, _: (0, 0, h)
        zeros = (0,) * len(columns)
        return pl.BlockSpec(shape, lambda *ids: (*index(*ids), *zeros))

    def row_spec(parts: int, *columns: int) -> pl.BlockSpec:
        zeros = (0,) * (1 + len(columns))
        shape = (None,) * (2 + parts) + (padded_rows, *columns)
        return pl.BlockSpec(shape, lambda i, h, p: ((p,) * parts) + (i, h, *zeros))

    table_spec = None
    if operands.page_table is not None:
        table_spec = pl.BlockSpec((None, operands.page_table.shape[1]), lambda i, h, p: (i, 0))
    scale_specs = [
        None if x is None else cache_spec() for x in (operands.key_scale, operands.value_scale)
    ]
    of_sequence = pl.BlockSpec((None,), lambda i, h, p: (i,))
    of_head = pl.BlockSpec((None,), lambda i, h, p: (h,))
    operands = operands._replace(value_head_scale=None)  # the caller's
    optional = (
        (operands.starts, of_sequence), (operands.prefixes, of_sequence),
        (operands.head_scale, of_head),
    )  # fmt: skip
    inputs = jax.tree.leaves(operands)
    out_shape = [
        out_struct((splits, b, kv_heads, rows, dv), jnp.float32, *inputs),
        out_struct((splits, b, kv_heads, rows), jnp.float32, *inputs),
    ]
    silence_triton()
    kernel = functools.partial(_kernel, settings=settings, operands=operands, block=block)
    return pl.pallas_call(
        kernel,
        grid=(b, kv_heads, splits),
        in_specs=[
            row_spec(0, d_tile),
            cache_spec(d_tile),
            cache_spec(dv_tile),
            of_sequence,
            table_spec,
            *scale_specs,
            *(None if x is None else spec for x, spec in optional),
            None,
            None,
        ],
        out_specs=[row_spec(1, dv_tile), row_spec(1)],
        out_shape=out_shape,
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=bool(settings.interpret),
        name="decode_attention",
    )(*operands)


def _config(operands: Operands) -> Config:
    return tuning.default("decode_triton", Config, lookup_of(operands, device()))


def _cores() -> int:
    """Returns the number of multiprocessors of the chip that is compiled for."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None:
        return device.num_cores or 132
    return getattr(jax.devices()[0], "core_count", None) or 132


def _kernel(
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    length_ref: Any,
    table_ref: Any,
    k_scale_ref: Any,
    v_scale_ref: Any,
    start_ref: Any,
    prefix_ref: Any,
    head_scale_ref: Any,
    _value_head_scale_ref: None,
    _rule_ref: None,
    o_ref: Any,
    lse_ref: Any,
    *,
    settings: Settings,
    operands: Operands,
    block: int,
) -> None:
    """Attends from the rows of one head to one part of the keys of one sequence."""
    (rows, d), dv = operands.query.shape[2:], operands.value.shape[3]
    dtype = operands.query.dtype
    page = operands.key.shape[1]
    padded_rows, d_tile = q_ref.shape
    dv_tile = o_ref.shape[-1]
    row = lax.broadcasted_iota(jnp.int32, (padded_rows, 1), 0)
    in_d = lax.broadcasted_iota(jnp.int32, (1, d_tile), 1) < d
    in_dv = lax.broadcasted_iota(jnp.int32, (1, dv_tile), 1) < dv
    token = row // (rows // settings.queries)
    # 16-bit products take the query's type. Probabilities times the scales of a float16 call's
    # cache may leave the range of float16, so they stay float32.
    scaled_half = dtype == jnp.float16 and v_scale_ref is not None
    product_dtype = jnp.float32 if scaled_half else dtype
    exact = dtype == jnp.float32

    length = length_ref[()]
    first = None if start_ref is None else start_ref[()]
    prefix = None if prefix_ref is None else prefix_ref[()]
    score_scale = settings.scale
    if head_scale_ref is not None:
        score_scale *= head_scale_ref[()]
    start, stop = keys_needed(settings, length, first)
    lower, upper = blocks_of_split(start, stop, block, pl.program_id(2), pl.num_programs(2))
    q = plgpu.load(q_ref.at[:, :], mask=(row < rows) & in_d, other=0)

    def load(ref: Any, i: jax.Array, pages: Any, mask: jax.Array) -> jax.Array:
        """Loads the keys of block i, (block,) or (block, width), and 0 where masked."""
        rest = (slice(None),) * (mask.ndim - 1)
        if pages is None:
            where = (pl.ds(i * block, block), *rest)
        else:
            offsets = (i * block + jnp.arange(block, dtype=jnp.int32)) % page
            where = (pages, offsets)
            if rest:
                # One shape for all: the plain interpreter gathers by arrays or slices, not both.
                where = tuple(jnp.broadcast_to(x[:, None], mask.shape) for x in where)
                where = (*where, lax.broadcasted_iota(jnp.int32, mask.shape, 1))
        return plgpu.load(ref.at[where], mask=mask, other=jnp.zeros((), ref.dtype))

    def body(i: jax.Array, carry: Any) -> Any:
        peak, total, acc = carry
        keys = i * block + jnp.arange(block, dtype=jnp.int32)
        needed = (keys >= start) & (keys < stop)
        pages = None
        if table_ref is not None:
            pages = plgpu.load(table_ref.at[keys // page], mask=needed, other=0)
        k = load(k_ref, i, pages, needed[:, None] & in_d)
        z = plgpu.dot(q, k.astype(dtype), trans_b=True, allow_tf32=not exact) * score_scale
        if k_scale_ref is not None:
            z *= load(k_scale_ref, i, pages, needed)[None, :]
        if settings.soft_cap is not None:
            z = settings.soft_cap * jnp.tanh(z / settings.soft_cap)
        seen = sees(settings, length, token, keys[None, :], prefix) & needed[None, :]
        z = jnp.where(seen, z, -jnp.inf)
        new_peak = jnp.maximum(peak, z.max(axis=1))
        shift = jnp.where(new_peak == -jnp.inf, 0, new_peak)
        decay = jnp.exp(peak - shift)
        p = jnp.exp(z - shift[:, None])
        total = decay * total + p.sum(axis=1)
        if v_scale_ref is not None:
            p *= load(v_scale_ref, i, pages, needed)[None, :]
        v = load(v_ref, i, pages, needed[:, None] & in_dv)
        update = plgpu.dot(p.astype(product_dtype), v.astype(product_dtype), allow_tf32=not exact)
        return new_peak, total, decay[:, None] * acc + update

    peak, total, acc = lax.fori_loop(
        lower,
        upper,
        body,
        (
            jnp.full((padded_rows,), -jnp.inf, jnp.float32),
            jnp.zeros((padded_rows,), jnp.float32),
            jnp.zeros((padded_rows, dv_tile), jnp.float32),
        ),
    )
    empty = total == 0
    total = jnp.where(empty, 1, total)
    lse = jnp.where(empty, -jnp.inf, peak + jnp.log(total))
    plgpu.store(o_ref.at[:, :], acc / total[:, None], mask=(row < rows) & in_dv)
    plgpu.store(lse_ref.at[:], lse, mask=jnp.arange(padded_rows) < rows)
