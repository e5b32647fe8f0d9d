"""Attention through Pallas' Triton lowering: NVIDIA GPUs of compute capability 8.0 and up.

Forward, a program for each block of query rows, over the key blocks that it sees:

    z = scale q k^T + bias;   z = cap tanh(z / cap);   z = -inf where masked
    m' = max(m, rowmax z);  a = exp(m - m');  e = exp(z - m')
    l = a l + rowsum e;     acc = a acc + (keep e) v
    output = acc / (l (1 - rate));   lse = m + log l

Backward, from lse and delta, with p = exp(z - lse) and drop = keep / (1 - rate):

    ds = p (drop (cotangent v^T) - delta) (1 - tanh^2)
    dv = (drop p)^T cotangent;   dk = scale ds^T q;   dq = scale ds k;   dbias = ds

in two kernels without atomics, so that results repeat bit by bit: one writes dK and dV, a program
for each block of keys that loops over the query heads of its group and over query blocks; the other
writes dQ. Sums of ds along an axis, for a bias that is broadcast over it, fall out of these two. A
bias that keeps T and S and is broadcast over batch or heads has a kernel of its own that sums over
them tile by tile. Sums along diagonals, for a bias by rule, are left to plain JAX.
Every kernel addresses whole arrays; tile indices come from `mask`.

Exponentials are to base 2. Without bias and cap, z stays the bare product and its scale is part of
the exponent, one multiply-add an entry.

jax deprecates this lowering from 0.11. Everything that depends on it is in this file.

References:
  T. Dao, `FlashAttention-2 <https://arxiv.org/abs/2307.08691>`_.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from pallas_kernels._compat import device, out_struct, silence_triton
from pallas_kernels.attention import chunked, dropout, tuning
from pallas_kernels.attention.mask import (
    PARTIAL,
    SKIP,
    WHOLE,
    Limits,
    Mask,
    Span,
    first_and_last,
    in_interval,
    keys_of_rows,
    rows_of_keys,
    tile_kinds,
    unbroken,
)
from pallas_kernels.attention.problem import Device, Gradients, Operands, Route, Settings, Sizes
from pallas_kernels.targets.chips import CHIPS, Gpu

LOG2E = math.log2(math.e)
SMALLEST = 16  # of a dimension of a tensor core product


class Blocks(NamedTuple):
    """How one kernel is cut: both blocks are powers of two, at least 16."""

    block_q: int
    block_kv: int
    num_warps: int
    num_stages: int

    @property
    def is_possible(self) -> bool:
        """Whether the kernels can be built with these blocks, if shared memory allows it."""
        sizes = (self.block_q, self.block_kv)
        return (
            all(x >= SMALLEST and not x & (x - 1) for x in sizes)
            and self.num_warps in (1, 2, 4, 8, 16)
            and self.num_stages > 0
        )


class Config(NamedTuple):
    """What `config=` of this route may be; a kernel that is None gets its entry of the file."""

    forward: Blocks | None = None
    dkv: Blocks | None = None
    dq: Blocks | None = None
    dbias: Blocks | None = None


def choices(operands: Operands) -> tuple[tuning.Choice, ...]:
    """Returns the blocks to try for each kernel: those that fit registers and shared memory."""
    lookup, found = tuning.lookup_of(operands, device()), []
    sizes = [tuning.largest((16, 32, 64, 128), n) for n in operands.sizes[1:3]]
    for kernel in Config._fields[: 4 if operands.bias is not None else 3]:
        tried = (Blocks(*x) for x in itertools.product(*sizes, (4, 8), (1, 2, 3, 4)))
        configs = tuple(Config(**{kernel: x}) for x in tried if _fits(kernel, x, operands))
        timed = "forward" if kernel == "forward" else "gradient"
        default = tuning.find("triton", Config, kernel, lookup)
        found.append(tuning.Choice(kernel, timed, default, configs))
    return tuple(found)


def _fits(kernel: str, blocks: Blocks, operands: Operands) -> bool:
    """Whether registers hold the float32 sums and shared memory the tiles, about."""
    size, itemsize = operands.sizes, operands.query.dtype.itemsize
    width = _padded(size.head_dim) + _padded(size.value_dim)
    own, walked = blocks.block_q, blocks.block_kv
    if kernel == "dkv":
        own, walked = walked, own
    sums = {"forward": _padded(size.value_dim), "dkv": width, "dq": _padded(size.head_dim)}
    registers = own * sums.get(kernel, walked) + 2 * own * walked
    extras = own * walked * (0 if operands.bias is None else operands.bias.dtype.itemsize)
    kept = own * width * itemsize
    memory = kept + blocks.num_stages * (walked * width * itemsize + extras)
    return registers <= blocks.num_warps * 32 * 200 and memory <= _shared_memory()


def refusal(settings: Settings, operands: Operands, place: Device) -> str | None:
    """Says why the call cannot be served here, or returns None."""
    size, dtype = operands.sizes, operands.query.dtype
    dense = operands.mask.dense
    if settings.interpret not in (False, None, True):
        return f"interpret={settings.interpret!r}: this route has the plain interpreter only"
    if not settings.interpret:
        if place.platform != "gpu" or place.compute_capability is None:
            return f"needs an NVIDIA GPU, not {place.platform} ({place.kind})"
        if place.compute_capability < (8, 0):
            return f"needs compute capability 8.0, {place.kind} has {place.compute_capability}"
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"needs bfloat16, float16 or float32, not {dtype}"
    if max(size.head_dim, size.value_dim) > 256:
        return f"head dims {size.head_dim} and {size.value_dim}: at most 256"
    if 0 in size:
        return f"an axis has length zero: {size}"
    if dense is not None and dense.size > 2**31:
        return f"a mask with {dense.size} entries needs offsets of more than 32 bits"
    for blocks in settings.config if isinstance(settings.config, Config) else ():
        if blocks is not None and not blocks.is_possible:
            return f"takes blocks that are powers of two, at least {SMALLEST}, not {blocks}"
    return None


# Tiles and what is read for them


class _Axis(NamedTuple):
    """A block of consecutive places of an axis; those from `length` on do not exist."""

    start: Any
    size: int
    length: int | None = None  # None: all exist

    @property
    def places(self) -> jax.Array:
        return self.start + lax.iota(jnp.int32, self.size)


class _Tile(NamedTuple):
    """The scores of a block of rows against a block of keys."""

    b: Any  # batch entry
    n: Any  # query head
    rows: _Axis
    keys: _Axis
    limits: Limits | None  # None: the whole tile is visible


class _Inputs(NamedTuple):
    """What kernels read: whole arrays, outside a kernel, and references to them inside."""

    query: Any  # (B, T, N, d)
    key: Any  # (B, S, K, d)
    value: Any  # (B, S, K, dv)
    bias: Any = None  # (B or 1, N or 1, T or 1, S or 1)
    sinks: Any = None  # float32 (N,)
    seeds: Any = None  # int32 (B, N)
    diagonals: Any = None  # float32 (B or 1, N, block_q + T + S - 1 + block_kv)
    limits: Any = None  # int32 (B, 3 or 5), unless all is known at trace time
    query_ids: Any = None  # int32 (B, T)
    key_ids: Any = None  # int32 (B, S)
    spans: Any = None  # int32 (B, nq or nk, 4), where segment ids decide: see `_spans`
    dense: Any = None  # bool (B or 1, N or 1, T or 1, S or 1)
    kinds: Any = None  # int32 (B or 1, N or 1, nq, nk), where there is a dense mask
    cotangent: Any = None  # (B, T, N, dv)
    lse: Any = None  # float32 (B, N, T)
    delta: Any = None  # float32 (B, N, T)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """One kernel's problem, and the parts that the kernels have in common."""

    settings: Settings
    size: Sizes
    blocks: Blocks
    window: Mask  # without arrays
    static_limits: Limits | None
    natural: bool  # whether scores are in natural units, or bare products
    keys_first: bool  # whether tiles are (keys, rows), so that products with keys need no transpose
    inputs: _Inputs

    @property
    def query_blocks(self) -> int:
        return pl.cdiv(self.size.queries, self.blocks.block_q)

    @property
    def key_blocks(self) -> int:
        return pl.cdiv(self.size.keys, self.blocks.block_kv)

    @property
    def head_dims(self) -> _Axis:
        return _dims(self.size.head_dim)

    @property
    def value_dims(self) -> _Axis:
        return _dims(self.size.value_dim)

    @property
    def score_unit(self) -> float:
        """What scores are multiplied by to be in the unit of maxima and of `shift`."""
        return 1.0 if self.natural else self.settings.scale * LOG2E

    @property
    def natural_unit(self) -> float:
        """What a natural logarithm is multiplied by to be in that unit."""
        return 1.0 if self.natural else LOG2E

    @property
    def keep_scale(self) -> float:
        return 1 / (1 - self.settings.dropout_rate)

    @property
    def asks_tiles(self) -> bool:
        """Whether each tile has a kind of its own."""
        return self.inputs.kinds is not None

    @property
    def is_static(self) -> bool:
        """Whether the blocks to visit are known at trace time."""
        return self.static_limits is not None and self.inputs.spans is None

    def rows(self, i: Any, *, exist: bool = False) -> _Axis:
        """Returns query block `i`; with `exist`, all its rows are known to be there."""
        return _block(i, self.blocks.block_q, self.size.queries, exist)

    def keys(self, j: Any, *, exist: bool = False) -> _Axis:
        """Returns key block `j`."""
        return _block(j, self.blocks.block_kv, self.size.keys, exist)

    def limits(self, b: Any) -> Limits:
        if self.static_limits is not None:
            return self.static_limits
        columns = self.inputs.limits.shape[1]
        return Limits(*(self.inputs.limits[b, column] for column in range(columns)))

    def key_blocks_of(self, limits: Limits, b: Any, i: Any) -> Span:
        """Returns the key blocks that query block `i` sees.

        Rows past T do not count: they are not stored.
        """
        if self.inputs.spans is not None:
            return Span(*(self.inputs.spans[b, i, column] for column in range(4)))
        first = i * self.blocks.block_q
        last = jnp.minimum(first + self.blocks.block_q, self.size.queries) - 1
        return _in_blocks(keys_of_rows(self.window, limits, first, last), self.blocks.block_kv)

    def query_blocks_of(self, limits: Limits, b: Any, j: Any) -> Span:
        """Returns the query blocks that see key block `j`, of which keys past S do not count."""
        if self.inputs.spans is not None:
            return Span(*(self.inputs.spans[b, j, column] for column in range(4)))
        first = j * self.blocks.block_kv
        last = jnp.minimum(first + self.blocks.block_kv, self.size.keys) - 1
        return _in_blocks(rows_of_keys(self.window, limits, first, last), self.blocks.block_q)

    def kind(self, limits: Limits, b: Any, n: Any, i: Any, j: Any) -> jax.Array:
        """Returns what `tile_kinds` says of tile (i, j), a scalar."""
        inputs = self.inputs
        if inputs.kinds is not None:
            return inputs.kinds[*_at(inputs.kinds, b, n), i, j]
        span = self.key_blocks_of(limits, b, i)
        needed = (j >= span.start) & (j < span.stop)
        whole = (j >= span.whole_start) & (j < span.whole_stop)
        # Typed constants: a select of two Python numbers lowers to booleans in jax 0.10.
        skip, whole_tile, partial_tile = (np.int32(x) for x in (SKIP, WHOLE, PARTIAL))
        return jnp.where(needed, jnp.where(whole, whole_tile, partial_tile), skip)

    def of_rows(self, x: jax.Array) -> jax.Array:
        """Lays a vector over the rows out to be broadcast over a tile."""
        return x[None, :] if self.keys_first else x[:, None]

    def of_keys(self, x: jax.Array) -> jax.Array:
        """Lays a vector over the keys out to be broadcast over a tile."""
        return x[:, None] if self.keys_first else x[None, :]

    def load_tile(self, ref: Any, tile: _Tile) -> jax.Array:
        """Reads a tile of an array over (B, N, T, S) that is broadcast where a size is 1."""
        rows = tile.rows if ref.shape[2] > 1 else _Axis(0, 1)
        keys = tile.keys if ref.shape[3] > 1 else _Axis(0, 1)
        values = _load(ref, *_at(ref, tile.b, tile.n), rows, keys)
        return values.T if self.keys_first else values

    def load_diagonals(self, tile: _Tile) -> jax.Array:
        """Reads a tile of a bias that depends on the distance alone."""
        ref = self.inputs.diagonals
        keys, rows = self.of_keys(tile.keys.places), self.of_rows(tile.rows.places)
        first = self.size.queries - 1 + self.blocks.block_q
        return pltriton.load(ref.at[*_at(ref, tile.b, tile.n), keys + first - rows])

    def load_keys(self, b: Any, n: Any, keys: _Axis) -> tuple[jax.Array, jax.Array]:
        """Reads keys and values for query head `n`."""
        head = _divide(n, self.size.group)
        k = _load(self.inputs.key, b, keys, head, self.head_dims)
        return k, _load(self.inputs.value, b, keys, head, self.value_dims)

    def dot(self, a: jax.Array, b: jax.Array, **transposed: bool) -> jax.Array:
        precision = self.settings.precision if a.dtype == jnp.float32 else None
        return pltriton.dot(a, b, precision=precision, **transposed)

    def product(self, of_rows: jax.Array, of_keys: jax.Array) -> jax.Array:
        """Returns the tile of inner products of rows and keys."""
        pair = (of_keys, of_rows) if self.keys_first else (of_rows, of_keys)
        return self.dot(*pair, trans_b=True)

    def scores(self, tile: _Tile, q: Any, k: Any) -> tuple[jax.Array, jax.Array | None]:
        """Returns the scores of a tile before the mask, and the derivative of the soft cap."""
        z = self.product(q, k)
        if not self.natural:
            return z, None
        z *= self.settings.scale
        if self.inputs.bias is not None:
            z += self.load_tile(self.inputs.bias, tile).astype(jnp.float32)
        if self.inputs.diagonals is not None:
            z += self.load_diagonals(tile)
        if (cap := self.settings.soft_cap) is None:
            return z, None
        tanh = jnp.tanh(z * (1 / cap))
        hides = self.inputs.bias is not None or self.inputs.diagonals is not None
        capped = jnp.where(z == -jnp.inf, -jnp.inf, cap * tanh) if hides else cap * tanh
        return capped, 1 - tanh * tanh

    def exponential(self, z: jax.Array, shift: jax.Array) -> jax.Array:
        """Returns exp(z - shift) for scores `z` and a finite `shift` of each row."""
        if self.natural:
            return jnp.exp2((z - self.of_rows(shift)) * LOG2E)
        return jnp.exp2(z * self.score_unit - self.of_rows(shift))

    def hide(self, tile: _Tile, values: jax.Array, hidden: float) -> jax.Array:
        """Returns `values` where the mask lets a row see a key, `hidden` elsewhere."""
        if tile.limits is None:
            return values
        if self.inputs.query_ids is not None:  # by itself: fewer registers than with the interval
            query_ids = self.of_rows(_load(self.inputs.query_ids, tile.b, tile.rows))
            same = query_ids == self.of_keys(_load(self.inputs.key_ids, tile.b, tile.keys))
            values = jnp.where(same, values, hidden)
        rows, keys = self.of_rows(tile.rows.places), self.of_keys(tile.keys.places)
        seen = in_interval(self.window, tile.limits, rows, keys)
        if self.inputs.dense is not None:
            seen &= self.load_tile(self.inputs.dense, tile)
        return jnp.where(seen, values, hidden)

    def drop(self, tile: _Tile, values: jax.Array, scale: float) -> jax.Array:
        """Returns `scale` times what dropout keeps of `values`, 0 elsewhere."""
        if self.inputs.seeds is None:
            return values
        rows, keys = self.of_rows(tile.rows.places), self.of_keys(tile.keys.places)
        seed, rate = self.inputs.seeds[tile.b, tile.n], self.settings.dropout_rate
        return jnp.where(dropout.keep(seed, rows, keys, rate), values * scale, 0.0)


def _dims(size: int) -> _Axis:
    padded = _padded(size)
    return _Axis(0, padded, None if padded == size else size)


def _block(i: Any, size: int, length: int, exist: bool) -> _Axis:
    return _Axis(i * size, size, None if exist or length % size == 0 else length)


def _at(ref: Any, b: Any, n: Any) -> tuple[Any, Any]:
    """Returns the indices of batch entry and head in an array that may be broadcast over them."""
    zero = np.int32(0)
    return zero if ref.shape[0] == 1 else b, zero if ref.shape[1] == 1 else n


def _slices(index: tuple[Any, ...]) -> tuple[tuple[Any, ...], jax.Array | None]:
    """Returns the index of a reference, and which entries exist, None for all."""
    axes = [x for x in index if isinstance(x, _Axis)]
    exist = None
    for position, axis in enumerate(axes):
        if axis.length is not None:
            others = [i for i in range(len(axes)) if i != position]
            inside = lax.expand_dims(axis.places < axis.length, others)
            exist = inside if exist is None else exist & inside
    return tuple(pl.ds(x.start, x.size) if isinstance(x, _Axis) else x for x in index), exist


def _load(ref: Any, *index: Any) -> jax.Array:
    """Reads a block, 0 where nothing exists."""
    slices, exist = _slices(index)
    other = None if exist is None else jnp.zeros((), ref.dtype)
    return pltriton.load(ref.at[slices], mask=exist, other=other)


def _store(ref: Any, value: jax.Array, *index: Any) -> None:
    """Writes what exists of a block."""
    # The interpreter refuses starts of different types, as Python's 0 is where jax is set to 64.
    zero = jnp.zeros((), jnp.int32)
    index = tuple(x._replace(start=x.start + zero) if isinstance(x, _Axis) else x for x in index)
    slices, exist = _slices(index)
    pltriton.store(ref.at[slices], value.astype(ref.dtype), mask=exist)


_Step = Callable[[bool, Any, Any], Any]


def _in_blocks(span: Span, block: int) -> Span:
    """Returns the blocks that a span of positions touches, and those that are wholly in it."""
    start, stop = _divide(span.start, block), _divide(span.stop + block - 1, block)
    if not isinstance(span.start, int):  # an empty span within a block
        stop = jnp.where(span.start < span.stop, stop, start)
    whole_start = start
    if not isinstance(span.whole_start, int):
        whole_start = jnp.clip(_divide(span.whole_start + block - 1, block), start, stop)
    whole_stop = jnp.clip(_divide(span.whole_stop, block), whole_start, stop)
    return Span(start, stop, whole_start, whole_stop)


def _for_each_block(
    span: Span, kind: Callable[[Any], Any] | None, all_whole: bool, step: _Step, carry: Any
) -> Any:
    """Returns `carry` after ``carry = step(whole, i, carry)`` for each block of `span`, any order.

    Args:
      span: The blocks to visit and, among them, those where the mask need not be evaluated.
      kind: What is known of a block beyond `span`, None if nothing.
      all_whole: Whether everything from `span.whole_start` on is known to be whole.
      step: What to do; `whole` says that the mask need not be evaluated.
      carry: A tuple of arrays.
    """
    if kind is not None:
        any_step = lambda i, c: _switch(kind(i), lambda whole, c: step(whole, i, c), c)  # noqa: E731
        return _loop(span.start, span.stop, any_step, carry)
    partial_step, whole_step = functools.partial(step, False), functools.partial(step, True)
    start, stop, whole_start, whole_stop = span
    none_before = isinstance(whole_start, int)
    if all_whole:
        if not none_before:
            carry = _loop(start, whole_start, partial_step, carry)
        return _loop(whole_start, stop, whole_step, carry)
    carry = _loop(whole_start, whole_stop, whole_step, carry)
    if none_before:
        return _loop(whole_stop, stop, partial_step, carry)
    before = whole_start - start

    def either_side(n: Any, carry: Any) -> Any:
        return partial_step(n + jnp.where(n < before, start, whole_stop - before), carry)

    # A second loop, with pointers of its own, would take registers from all three.
    return _loop(0, before + stop - whole_stop, either_side, carry)


def _switch(kind: Any, step: Callable[[bool, Any], Any], carry: Any) -> Any:
    """Returns ``step(whole, carry)``, or `carry` for a tile to skip."""

    def needed(carry: Any) -> Any:
        return lax.cond(kind == WHOLE, lambda c: step(True, c), lambda c: step(False, c), carry)

    return lax.cond(kind == SKIP, lambda c: c, needed, carry)


def _loop(start: Any, stop: Any, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """Loops with a counter of 32 bits, also where jax is set to 64."""
    start, stop = (np.int32(x) if isinstance(x, int) else x for x in (start, stop))
    return lax.fori_loop(start, stop, step, carry)


def _divide(x: Any, block: int) -> Any:
    """Divides a number that is not negative, rounding down."""
    return x // block if isinstance(x, int) else lax.div(x, np.int32(block))


# The forward kernel


def _program(plan: _Plan) -> tuple[Any, Any, Any]:
    """Returns query block, head and batch entry; where the mask is causal, long rows come first."""
    i = pl.program_id(0)
    if plan.window.right is not None:
        i = plan.query_blocks - 1 - i
    return i, pl.program_id(1), pl.program_id(2)


def _for_each_key_block(plan: _Plan, b: Any, n: Any, i: Any, step: Any, carry: Any) -> Any:
    """Runs ``carry = step(tile, k, v, carry)`` over the key blocks that query block `i` sees."""
    limits, rows = plan.limits(b), plan.rows(i)

    def block(whole: bool, j: Any, carry: Any) -> Any:
        keys = plan.keys(j, exist=whole)
        tile = _Tile(b, n, rows, keys, None if whole else limits)
        return step(tile, *plan.load_keys(b, n, keys), carry)

    kind = functools.partial(plan.kind, limits, b, n, i) if plan.asks_tiles else None
    exact = plan.is_static and plan.size.keys % plan.blocks.block_kv == 0
    all_whole = exact and plan.window.right is None
    return _for_each_block(plan.key_blocks_of(limits, b, i), kind, all_whole, block, carry)


def _forward_kernel(plan: _Plan, outputs: dict[str, Any]) -> None:
    i, n, b = _program(plan)
    inputs, rows = plan.inputs, plan.rows(i)
    q = _load(inputs.query, b, rows, n, plan.head_dims)

    def step(tile: _Tile, k: Any, v: Any, carry: Any) -> Any:
        peak, total, acc = carry
        z = plan.hide(tile, plan.scores(tile, q, k)[0], -jnp.inf)
        next_peak = jnp.maximum(peak, jnp.max(z, axis=1) * plan.score_unit)
        shift = jnp.where(next_peak == -jnp.inf, 0.0, next_peak)
        rescale = jnp.exp2((peak - shift) * (LOG2E / plan.natural_unit))
        e = plan.exponential(z, shift)
        total = total * rescale + jnp.sum(e, axis=1)
        acc = acc * rescale[:, None] + plan.dot(plan.drop(tile, e, 1.0).astype(v.dtype), v)
        return next_peak, total, acc

    peak = jnp.full((rows.size,), -jnp.inf, jnp.float32)
    total = jnp.zeros((rows.size,), jnp.float32)
    if inputs.sinks is not None:  # a key with this score and value 0
        sink = inputs.sinks[n]
        peak = jnp.full((rows.size,), sink * plan.natural_unit)
        total += jnp.where(sink == -jnp.inf, np.float32(0), np.float32(1))
    acc = jnp.zeros((rows.size, plan.value_dims.size), jnp.float32)
    peak, total, acc = _for_each_key_block(plan, b, n, i, step, (peak, total, acc))
    empty = total == 0
    total = jnp.where(empty, 1.0, total)
    output = acc * (plan.keep_scale / total)[:, None]
    lse = jnp.where(empty, -jnp.inf, peak / plan.natural_unit + jnp.log(total))
    _store(outputs["output"], output, b, rows, n, plan.value_dims)
    _store(outputs["lse"], lse, b, n, rows)


# The backward kernels


class _QuerySide(NamedTuple):
    """What the backward kernels read for a block of rows."""

    query: jax.Array
    cotangent: jax.Array
    shift: jax.Array  # lse in the unit of `_Plan.exponential`, 0 for empty rows
    delta: jax.Array


def _load_query_side(plan: _Plan, b: Any, n: Any, rows: _Axis) -> _QuerySide:
    """Reads a block of rows. Those past T read as 0, which makes their ds 0."""
    inputs = plan.inputs
    lse = _load(inputs.lse, b, n, rows)
    return _QuerySide(
        query=_load(inputs.query, b, rows, n, plan.head_dims),
        cotangent=_load(inputs.cotangent, b, rows, n, plan.value_dims),
        shift=jnp.where(lse == -jnp.inf, 0.0, lse * plan.natural_unit),
        delta=_load(inputs.delta, b, n, rows),
    )


def _gradient_of_scores(
    plan: _Plan, tile: _Tile, side: _QuerySide, k: jax.Array, v: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns p and ds of a tile, float32; p before dropout and before the mask."""
    z, slope = plan.scores(tile, side.query, k)
    p = plan.exponential(z, side.shift)
    dp = plan.drop(tile, plan.product(side.cotangent, v), plan.keep_scale)
    ds = p * (dp - plan.of_rows(side.delta))
    if slope is not None:
        ds *= slope
    return p, plan.hide(tile, ds, 0.0)


def _dkv_kernel(plan: _Plan, outputs: dict[str, Any]) -> None:
    j, head, b = (pl.program_id(axis) for axis in range(3))
    limits, keys = plan.limits(b), plan.keys(j)
    k, v = plan.load_keys(b, head * plan.size.group, keys)
    span = plan.query_blocks_of(limits, b, j)
    exact = plan.is_static and plan.size.queries % plan.blocks.block_q == 0
    all_whole = exact and plan.window.left is None

    def add_head(g: Any, carry: Any) -> Any:
        n = head * plan.size.group + g

        def step(whole: bool, i: Any, carry: Any) -> Any:
            dk, dv, *sums = carry
            rows = plan.rows(i, exist=whole)
            tile = _Tile(b, n, rows, keys, None if whole else limits)
            side = _load_query_side(plan, b, n, rows)
            p, ds = _gradient_of_scores(plan, tile, side, k, v)
            p = plan.drop(tile, plan.hide(tile, p, 0.0), plan.keep_scale)
            dv += plan.dot(p.astype(v.dtype), side.cotangent)
            dk += plan.dot(ds.astype(k.dtype), side.query)
            return dk, dv, *(x + jnp.sum(ds, axis=1) for x in sums)

        kind = (lambda i: plan.kind(limits, b, n, i, j)) if plan.asks_tiles else None
        if "sums" in outputs:
            carry += (jnp.zeros((keys.size,), jnp.float32),)
        dk, dv, *sums = _for_each_block(span, kind, all_whole, step, carry)
        for x in sums:
            _store(outputs["sums"], x, b, n, keys)
        return dk, dv

    dk = jnp.zeros((keys.size, plan.head_dims.size), jnp.float32)
    dv = jnp.zeros((keys.size, plan.value_dims.size), jnp.float32)
    if plan.size.group == 1:
        dk, dv = add_head(0, (dk, dv))
    else:
        dk, dv = _loop(0, plan.size.group, add_head, (dk, dv))
    _store(outputs["key"], dk * plan.settings.scale, b, keys, head, plan.head_dims)
    _store(outputs["value"], dv, b, keys, head, plan.value_dims)


def _dq_kernel(plan: _Plan, outputs: dict[str, Any]) -> None:
    i, n, b = _program(plan)
    rows = plan.rows(i)
    side = _load_query_side(plan, b, n, rows)

    def step(tile: _Tile, k: Any, v: Any, carry: Any) -> Any:
        dq, *sums = carry
        _, ds = _gradient_of_scores(plan, tile, side, k, v)
        if "bias" in outputs:
            _store(outputs["bias"], ds, b, n, rows, tile.keys)
        dq += plan.dot(ds.astype(k.dtype), k)
        return dq, *(x + jnp.sum(ds, axis=1) for x in sums)

    carry = (jnp.zeros((rows.size, plan.head_dims.size), jnp.float32),)
    if "sums" in outputs:
        carry += (jnp.zeros((rows.size,), jnp.float32),)
    dq, *sums = _for_each_key_block(plan, b, n, i, step, carry)
    _store(outputs["query"], dq * plan.settings.scale, b, rows, n, plan.head_dims)
    for x in sums:
        _store(outputs["sums"], x, b, n, rows)


def _dbias_kernel(plan: _Plan, outputs: dict[str, Any]) -> None:
    ref = outputs["bias"]
    index, kept_n, kept_b = (pl.program_id(axis) for axis in range(3))
    i, j = _divide(index, plan.key_blocks), lax.rem(index, np.int32(plan.key_blocks))
    rows = plan.rows(i)

    def add(b: Any, n: Any, total: jax.Array) -> jax.Array:
        limits = plan.limits(b)

        def add_tile(whole: bool, total: jax.Array) -> jax.Array:
            tile = _Tile(b, n, rows, plan.keys(j, exist=whole), None if whole else limits)
            k, v = plan.load_keys(b, n, tile.keys)
            side = _load_query_side(plan, b, n, rows)
            return total + _gradient_of_scores(plan, tile, side, k, v)[1]

        return _switch(plan.kind(limits, b, n, i, j), add_tile, total)

    def add_heads(b: Any, total: jax.Array) -> jax.Array:
        if ref.shape[1] == plan.size.heads:
            return add(b, kept_n, total)
        return _loop(0, plan.size.heads, lambda n, total: add(b, n, total), total)

    total = jnp.zeros((plan.blocks.block_q, plan.blocks.block_kv), jnp.float32)
    if ref.shape[0] == plan.size.batch:
        total = add_heads(kept_b, total)
    else:
        total = _loop(0, plan.size.batch, add_heads, total)
    _store(ref, total, kept_b, kept_n, rows, plan.keys(j))


# From operands to kernels and back


def forward(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Returns the output (B, T, N, dv), in the query's dtype, and lse (B, N, T), float32."""
    b, t, _, n, *_, dv = operands.sizes
    plan = _plan("forward", settings, operands)
    outputs = {
        "output": ((b, t, n, dv), operands.query.dtype),
        "lse": ((b, n, t), jnp.float32),
    }
    results = _call(_forward_kernel, plan, (plan.query_blocks, n, b), outputs)
    return results["output"], results["lse"]


def backward(
    settings: Settings,
    operands: Operands,
    lse: jax.Array,
    cotangent: jax.Array,
    delta: jax.Array,
    bias_gradient: bool,
) -> Gradients:
    """Returns the gradients of query, key, value and, only with `bias_gradient`, of the bias."""
    b, t, s, n, kv_heads, *_ = operands.sizes
    residuals = {"cotangent": cotangent, "lse": lse, "delta": delta}
    bias = operands.bias if bias_gradient else None
    dkv = {"key": _like(operands.key), "value": _like(operands.value)}
    dq = {"query": _like(operands.query)}
    if bias is not None and bias.shape[3] == 1:
        dq["sums"] = (b, n, t), jnp.float32
    elif bias is not None and bias.shape[2] == 1:
        dkv["sums"] = (b, n, s), jnp.float32
    elif bias is not None and bias.shape[:2] == (b, n):
        dq["bias"] = _like(bias)

    plan = _plan("dkv", settings, operands, **residuals)
    dkv = _call(_dkv_kernel, plan, (plan.key_blocks, kv_heads, b), dkv)
    plan = _plan("dq", settings, operands, **residuals)
    dq = _call(_dq_kernel, plan, (plan.query_blocks, n, b), dq)

    d_bias = dq.get("bias")
    if bias is not None and "sums" in dq:
        d_bias = _sum_to(dq["sums"][:, :, :, None], bias)
    elif bias is not None and "sums" in dkv:
        d_bias = _sum_to(dkv["sums"][:, :, None, :], bias)
    elif bias is not None and d_bias is None:
        plan = _plan("dbias", settings, operands, **residuals)
        grid = (plan.query_blocks * plan.key_blocks, bias.shape[1], bias.shape[0])
        d_bias = _call(_dbias_kernel, plan, grid, {"bias": _like(bias)})["bias"]
    d_diagonals = None
    if bias_gradient and operands.diagonals is not None:
        # Diagonals cross the tiles of many programs: without atomics, a sum for plain JAX.
        plain = settings._replace(config=None, interpret=False)
        found = chunked.backward(plain, operands, lse, cotangent, delta, True)
        d_diagonals = found.diagonals
    return Gradients(dq["query"], dkv["key"], dkv["value"], d_bias, d_diagonals)


def _like(x: jax.Array) -> tuple[tuple[int, ...], Any]:
    return x.shape, x.dtype


def _sum_to(x: jax.Array, bias: jax.Array) -> jax.Array:
    axes = tuple(i for i in range(4) if bias.shape[i] < x.shape[i])
    return x.sum(axis=axes, keepdims=True).astype(bias.dtype)


def _plan(kernel: str, settings: Settings, operands: Operands, **residuals: jax.Array) -> _Plan:
    size, mask = operands.sizes, operands.mask
    lookup = tuning.lookup_of(operands, device())
    blocks = tuning.blocks_of("triton", Config, kernel, settings.config, lookup)
    block_q = min(blocks.block_q, _padded(size.queries))
    block_kv = min(blocks.block_kv, _padded(size.keys))
    adds = (operands.bias, operands.diagonals, settings.soft_cap)
    limits = spans = kinds = diagonals = None
    if operands.diagonals is not None:
        if settings.config is None and kernel == "dkv":
            block_q = max(SMALLEST, block_q // 2)  # its gathers take the registers of the rest
        # So that rows and keys that do not exist have a place too.
        diagonals = jnp.pad(operands.diagonals, ((0, 0), (0, 0), (block_q, block_kv)))
    # A first key that is known would make spans whose start is a number other than 0.
    is_static = mask.is_static and not mask.has_start
    if not is_static:
        limits = mask.limits(size.batch, size.queries, size.keys)
    if mask.dense is not None or mask.has_segments:
        kinds = tile_kinds(mask, size.batch, size.queries, size.keys, block_q, block_kv)
        if mask.dense is None:
            kinds, spans = None, _spans(kinds[:, 0].mT if kernel == "dkv" else kinds[:, 0])
    return _Plan(
        settings=settings,
        size=size,
        blocks=blocks._replace(block_q=block_q, block_kv=block_kv),
        window=Mask(mask.left, mask.right),
        static_limits=mask.static_limits(size.queries, size.keys) if is_static else None,
        natural=any(x is not None for x in adds) or settings.scale <= 0,
        keys_first=kernel == "dkv",
        inputs=_Inputs(
            *operands[:5],
            seeds=operands.seeds,
            diagonals=diagonals,
            limits=limits,
            query_ids=mask.query_segment_ids,
            key_ids=mask.key_value_segment_ids,
            spans=spans,
            dense=mask.dense,
            kinds=kinds,
            **residuals,
        ),
    )


def _spans(kinds: jax.Array) -> jax.Array:
    """Returns the `Span` of the others that each block visits, from kinds (B, blocks, others).

    It runs from the first to the last that is not `SKIP`. Asking for the kind of each would put a
    branch into the loop, and Triton fetches ahead of a loop without branches only.
    """
    start, stop = first_and_last(kinds != SKIP)
    # Whole tiles with others between them are all masked.
    whole = (jnp.maximum(x, start) for x in unbroken(kinds == WHOLE))
    return jnp.stack([start, stop, *whole], axis=2)


def _shared_memory() -> int:
    """Returns the bytes that a block of the chip that is compiled for may have."""
    gpus = (chip for chip in CHIPS.values() if isinstance(chip, Gpu))
    sizes = {x.compute_capability: x.shared_memory_per_block for x in gpus}
    return sizes.get(device().compute_capability or (0, 0), min(sizes.values()))


# The arrays whose last axis is read in blocks that may be larger than it.
_PADDED = ("query", "key", "value", "output", "cotangent")


def _call(
    kernel: Callable[[_Plan, dict[str, Any]], None],
    plan: _Plan,
    grid: tuple[int, int, int],
    outputs: dict[str, tuple[tuple[int, ...], Any]],
) -> dict[str, jax.Array]:
    """Runs `kernel` over `grid`, on whole arrays. Of ``"bias"`` it may leave tiles at 0."""
    arrays, tree = jax.tree.flatten(plan.inputs)
    paths = jax.tree_util.tree_flatten_with_path(plan.inputs)[0]
    in_specs = [_whole(path[0].name, x.shape) for path, x in paths]
    out_specs = [_whole(name, shape) for name, (shape, _) in outputs.items()]
    zeros = [jnp.zeros(*outputs["bias"])] if "bias" in outputs else []
    aliases = {len(arrays): list(outputs).index("bias")} if zeros else {}

    def body(*refs: Any) -> None:
        inputs = jax.tree.unflatten(tree, refs[: len(arrays)])
        written = dict(zip(outputs, refs[len(arrays) + len(zeros) :]))
        kernel(dataclasses.replace(plan, inputs=inputs), written)

    # Names the kernel in profiles and dumps.
    body.__name__ = f"attention{kernel.__name__.removesuffix('_kernel')}"
    silence_triton()
    results = pl.pallas_call(
        body,
        grid=grid,
        in_specs=in_specs + [_whole("bias", x.shape) for x in zeros],
        out_specs=out_specs,
        out_shape=[out_struct(shape, dtype, *arrays) for shape, dtype in outputs.values()],
        input_output_aliases=aliases,
        compiler_params=pltriton.CompilerParams(
            num_warps=plan.blocks.num_warps, num_stages=plan.blocks.num_stages
        ),
        interpret=bool(plan.settings.interpret),
        name=body.__name__,
    )(*arrays, *zeros)
    return dict(zip(outputs, results))


def _whole(name: str, shape: tuple[int, ...]) -> pl.BlockSpec:
    if name in _PADDED:
        shape = (*shape[:-1], _padded(shape[-1]))
    return pl.BlockSpec(shape, lambda *_: (0,) * len(shape))


def _padded(size: int) -> int:
    return max(SMALLEST, pl.next_power_of_2(size))


ROUTE = Route("triton", forward, backward, refusal, Config, choices)
