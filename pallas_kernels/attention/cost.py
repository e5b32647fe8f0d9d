"""What attention costs: operations, exponentials, bytes, and which of them a chip waits for.

A score that is seen costs d + dv multiplications and one exponential. A kernel that keeps a block
of block_q queries in fast memory streams every key and value that the block needs past it, so
halving block_q doubles those bytes. Saha and Ye (arXiv:2402.07443) show that with M elements of
fast memory no exact algorithm moves fewer than order pairs * d^2 / M elements (pairs * d / sqrt(M)
where M < d^2), so a kernel whose blocks fill the fast memory is at the bound up to a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels import _options
from pallas_kernels.attention import hiding
from pallas_kernels.attention.integers import narrowed


class Peak(NamedTuple):
    """What a chip does at most, by its maker's public figures; dense, not sparse, matrix rates."""

    flops: MappingProxyType[int, float]  # matrix operations a second, by bits of the operands
    exponentials: float | None  # a second; None: not published
    bandwidth: float  # of the chip's main memory, bytes a second
    fast_memory: int  # bytes beside a core: shared memory of a GPU's block, VMEM of a TPU core


def _gpu(
    tf32: float, half: float, byte: float | None, cores: int, clock: float, bandwidth: float,
    shared: int,
) -> Peak:  # fmt: skip
    """Describes a GPU: teraflops, cores, GHz, GB/s.

    The special function units of all these generations do 16 exponentials a core and clock (CUDA C
    programming guide, arithmetic instructions), at the clock that belongs to the matrix rate.
    """
    rates = {32: 1e12 * tf32, 16: 1e12 * half} | ({} if byte is None else {8: 1e12 * byte})
    return Peak(MappingProxyType(rates), 16e9 * cores * clock, 1e9 * bandwidth, shared)


def _tpu(half: float, bandwidth: float, vmem: int, byte: float | None = None) -> Peak:
    """Describes a TPU chip: teraflops of bfloat16, GB/s, MiB.

    JAX multiplies float32 in one pass of bfloat16 unless asked for more, hence the same rate.
    """
    rates = {32: 1e12 * half, 16: 1e12 * half} | ({} if byte is None else {8: 1e12 * byte})
    return Peak(MappingProxyType(rates), None, 1e9 * bandwidth, vmem * 2**20)


PEAKS: MappingProxyType[str, Peak] = MappingProxyType(
    {
        # TF32, bfloat16 and float8 rates (the A100 has no float8) and bandwidth, from NVIDIA's data
        # sheets "A100 Tensor Core GPU" and "H100 Tensor Core GPU" (SXM parts with 80 GB), "H200
        # Tensor Core GPU" (SXM), "L4 Tensor Core GPU" and "Blackwell" (a GPU of the HGX B200).
        # Where a sheet has rates with sparsity only, half of them.
        "a100": _gpu(156, 312, None, 108, 1.41, 2039, 166_912),
        "l4": _gpu(60, 121, 242, 58, 2.04, 300, 101_376),
        "h100": _gpu(494.7, 989.4, 1979, 132, 1.83, 3350, 232_448),
        "h200": _gpu(494.7, 989.4, 1979, 132, 1.83, 4800, 232_448),
        "b200": _gpu(1100, 2250, 4500, 148, 1.85, 7700, 232_448),
        # Google Cloud's documentation, pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x
        # (Ironwood)", peak compute and HBM bandwidth of a chip; VMEM of a core as jax's own table
        # has it. v6e and 7x: float8 as that table has it.
        "v4": _tpu(275, 1228, 16),
        "v5e": _tpu(197, 819, 128),
        "v5p": _tpu(459, 2765, 64),
        "v6e": _tpu(918, 1638, 128, byte=918),
        "7x": _tpu(2307, 7380, 64, byte=4614),
    }
)


class Ceilings(NamedTuple):
    """Seconds that each resource of a chip needs at its peak, if it were all there is."""

    matrix: float
    exponential: float | None  # None: the chip's rate is not published
    memory: float

    @property
    def seconds(self) -> float:
        """The time that the chip cannot beat."""
        return max(x for x in self if x is not None)

    @property
    def binding(self) -> str:
        """Which resource that is: ``"matrix"``, ``"exponential"`` or ``"memory"``."""
        times = {name: x for name, x in self._asdict().items() if x is not None}
        return max(times, key=times.__getitem__)


class AttentionCost(NamedTuple):
    """What `attention_cost` returns. Bytes and operations are of the whole call.

    Attributes:
      pairs: number of (query, key) that see each other, over batch and query heads.
      forward_flops: 2 pairs (d + dv).
      backward_flops: 2 pairs (3 d + 2 dv), scores recomputed; the five products of one pass.
      exponentials: those of the forward pass; the backward pass recomputes as many.
      minimum_bytes: forward: q, the k and v that are seen, output and lse, once each.
      backward_minimum_bytes: backward: as well output's cotangent, lse, delta, and dq, dk, dv.
      streamed_bytes: forward: k and v past every block of queries of every query head.
      blocked_bytes: forward: q, output and lse once, and streamed_bytes.
      bound_bytes: order of the least that any exact algorithm moves, with constant 1.
      intensity: forward_flops / minimum_bytes.
      forward: seconds of the forward pass at the peaks of `chip`; None without one.
      backward: seconds of the backward pass there; None without `chip`.
    """

    pairs: int
    forward_flops: int
    backward_flops: int
    exponentials: int
    minimum_bytes: int
    backward_minimum_bytes: int
    streamed_bytes: int
    blocked_bytes: int
    bound_bytes: float
    intensity: float
    forward: Ceilings | None
    backward: Ceilings | None


def attention_cost(
    query_shape: Sequence[int],
    key_shape: Sequence[int],
    value_dim: int | None = None,
    *,
    dtype: Any,
    is_causal: bool = False,
    local_window_size: int | tuple[int | None, int | None] | None = None,
    query_offset: int = 0,
    query_seq_lengths: Sequence[int] | None = None,
    key_value_seq_lengths: Sequence[int] | None = None,
    key_value_start: int | Sequence[int] | None = None,
    prefix_lengths: int | Sequence[int] | None = None,
    block_q: int = 128,
    block_kv: int = 128,
    chip: str | None = None,
) -> AttentionCost:
    """Counts what ``attention`` does for these shapes, and what a chip needs for it at the least.

    Operations are counted as is usual, two for a multiplication and addition of the matrix
    products, but over exactly the pairs of a query and a key that the mask allows::

        forward   2 pairs (d + dv)           4 B N T S d without a mask and with dv = d
        backward  2 pairs (3 d + 2 dv)       2.5 times the forward pass with dv = d

    No array is made and nothing runs on a device.

    Args:
      query_shape: (B, T, N, d).
      key_shape: (B, S, K, d).
      value_dim: dv, by default d.
      dtype: Of query, key and value.
      is_causal: Whether query t sees keys up to ``t + query_offset`` only.
      local_window_size: As for `jax.nn.dot_product_attention`: a number or a pair (left, right).
      query_offset: The position of the first query.
      query_seq_lengths: Numbers (B,), by default T.
      key_value_seq_lengths: Numbers (B,), by default S.
      key_value_start: A number or numbers (B,), the first key that is seen.
      prefix_lengths: A number or numbers (B,), the keys that `is_causal` does not hide.
      block_q: Queries that a kernel keeps while keys pass.
      block_kv: Keys that it takes at a time: a block that one query of block_q needs is streamed
        whole, as far as it has keys.
      chip: A name in `PEAKS`. Without one, fast memory is what a block of queries and one of keys
        occupy.

    Returns:
      An `AttentionCost`.

    Raises:
      ValueError: Shapes do not belong together, or `chip` is not known.

    Example:
      >>> cost = attention_cost((1, 16384, 16, 128), (1, 16384, 16, 128), dtype="bfloat16",
      ...                       is_causal=True, chip="h200")
      >>> cost.forward.binding, f"{cost.forward.seconds * 1e3:.2f} ms"
      ('matrix', '1.11 ms')
    """
    (b, t, n, d), (_, s, heads, _) = _check_shapes(query_shape, key_shape)
    dv = d if value_dim is None else _options.index("value_dim", value_dim)
    if dv < 0:
        raise ValueError(f"value_dim={dv}; expected at least 0")
    for name, block in (("block_q", block_q), ("block_kv", block_kv)):
        if _options.index(name, block) < 1:
            raise ValueError(f"{name}={block}; expected a positive number")
    if chip is not None and (not isinstance(chip, str) or chip not in PEAKS):
        raise ValueError(f"chip={chip!r} is not known; expected one of {', '.join(PEAKS)}")
    left, right = hiding.window(local_window_size, is_causal)
    query_offset = _options.index("query_offset", query_offset)
    left, right, query_offset = narrowed(left, right, query_offset, t, s)
    lengths = zip(
        _lengths("query_seq_lengths", query_seq_lengths, b, t),
        _lengths("key_value_seq_lengths", key_value_seq_lengths, b, s),
        _lengths("key_value_start", _each(key_value_start, b), b, s, default=0),
        _lengths("prefix_lengths", _each(prefix_lengths, b), b, s, default=0),
    )
    counts = [_count(t, left, right, query_offset, *x, block_q, block_kv) for x in lengths]
    seen, touched, streamed = (sum(column) for column in zip(*counts)) if counts else (0, 0, 0)
    pairs, itemsize = n * seen, _itemsize(dtype)
    forward_flops, backward_flops = 2 * pairs * (d + dv), 2 * pairs * (3 * d + 2 * dv)
    rows = b * t * n
    key_value = touched * heads * (d + dv) * itemsize
    minimum = rows * ((d + dv) * itemsize + 4) + key_value
    backward_minimum = rows * (2 * (d + dv) * itemsize + 8) + 2 * key_value
    streamed_bytes = n * streamed * (d + dv) * itemsize
    if chip is None:
        fast_memory = (block_q + block_kv) * (d + dv)
    else:
        fast_memory = PEAKS[chip].fast_memory / itemsize
    width = (d + dv) / 2
    bound = pairs * itemsize * min(width**2 / fast_memory, width / math.sqrt(fast_memory))
    bits = 8 * itemsize
    return AttentionCost(
        pairs=pairs,
        forward_flops=forward_flops,
        backward_flops=backward_flops,
        exponentials=pairs,
        minimum_bytes=minimum,
        backward_minimum_bytes=backward_minimum,
        streamed_bytes=streamed_bytes,
        blocked_bytes=rows * ((d + dv) * itemsize + 4) + streamed_bytes,
        bound_bytes=bound,
        intensity=forward_flops / minimum if minimum else 0.0,
        forward=_ceilings(chip, bits, forward_flops, pairs, minimum),
        backward=_ceilings(chip, bits, backward_flops, pairs, backward_minimum),
    )


def _count(
    t: int,
    left: int | None,
    right: int | None,
    offset: int,
    query_length: int,
    key_value_length: int,
    first_key: int,
    prefix: int,
    block_q: int,
    block_kv: int,
) -> tuple[int, int, int]:
    """Returns, for one batch entry and head: visible pairs, keys that are seen, keys streamed."""

    def keys(first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The keys that the rows first to last see: one interval, as the bounds only grow."""
        start = np.full_like(first, first_key)
        if left is not None:
            start = np.maximum(first + offset - left, start)
        stop = np.full_like(last, key_value_length)
        if right is not None:
            stop = np.minimum(stop, np.maximum(last + offset + right + 1, prefix))
        return start, np.maximum(start, stop)

    rows = np.arange(min(t, query_length), dtype=np.int64)
    if rows.size == 0:
        return 0, 0, 0
    start, stop = keys(rows, rows)
    touched_start, touched_stop = keys(rows[:1], rows[-1:])
    first = rows[::block_q]
    block_start, block_stop = keys(first, np.minimum(first + block_q - 1, rows[-1]))
    whole_stop = np.minimum(-(-block_stop // block_kv) * block_kv, key_value_length)
    streamed = np.where(
        block_stop > block_start, whole_stop - block_start // block_kv * block_kv, 0
    )
    return int((stop - start).sum()), int((touched_stop - touched_start)[0]), int(streamed.sum())


def _ceilings(
    chip: str | None, bits: int, flops: int, exponentials: int, memory: int
) -> Ceilings | None:
    if chip is None:
        return None
    peak = PEAKS[chip]
    # A type without a rate of its own is multiplied as the next wider one that has one.
    rate = next((peak.flops[x] for x in (8, 16, 32) if x >= bits and x in peak.flops), None)
    if rate is None:
        raise ValueError(f"dtype has {bits} bits; expected at most 32 with chip={chip!r}")
    return Ceilings(
        matrix=flops / rate,
        exponential=None if peak.exponentials is None else exponentials / peak.exponentials,
        memory=memory / peak.bandwidth,
    )


def _check_shapes(
    query_shape: Sequence[int], key_shape: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    query, key = map(_options.indices, ("query_shape", "key_shape"), (query_shape, key_shape))
    if len(query) != 4 or min(query) < 0:
        raise ValueError(f"query_shape={query}; expected (B, T, N, d)")
    if len(key) != 4 or (key[0], key[3]) != (query[0], query[3]) or min(key) < 0:
        raise ValueError(
            f"key_shape={key}; expected (B, S, K, d) with the query's B={query[0]} and d={query[3]}"
        )
    if key[2] == 0 or query[2] % key[2]:
        raise ValueError(
            f"key_shape={key} has K={key[2]} heads; expected a divisor of the query's N={query[2]}"
        )
    return query, key


def _each(given: int | Sequence[int] | None, batch: int) -> Sequence[int] | None:
    return [given] * batch if isinstance(given, int) else given


def _lengths(
    name: str, lengths: Sequence[int] | None, batch: int, full: int, default: int | None = None
) -> list[int]:
    if lengths is None:
        return [full if default is None else default] * batch
    found = list(_options.indices(name, lengths))
    if len(found) != batch or any(not 0 <= x <= full for x in found):
        raise ValueError(f"{name}={found}; expected {batch} numbers from 0 to {full}")
    return found


def _itemsize(dtype: Any) -> int:
    try:
        return jnp.dtype(dtype).itemsize
    except TypeError as error:
        raise TypeError(f"dtype={dtype!r}; expected a dtype such as 'bfloat16'") from error
