"""Blocks of the Hopper kernels: what there may be, and what fits.

The file that holds them (`tuning`) starts from what won on an H100 among the configurations that
tokamax tried for kernels of the same shape; what shared memory and registers allow here decided the
rest. None of them has been timed.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from pallas_kernels.attention.tuning import Choice, Lookup, find, largest


class Blocks(NamedTuple):
    """The blocks of one kernel.

    Attributes:
      block_q: Rows of a tile; a multiple of 64.
      block_kv: Keys of a tile; a multiple of 64.
      slots: Copied operands that fit shared memory at a time: two make a tile, K and V or q and dO,
        or q with K and dO with V.
      extra_slots: Bias tiles and vectors of segment ids that fit at a time.
    """

    block_q: int
    block_kv: int
    slots: int
    extra_slots: int = 2

    @property
    def is_possible(self) -> bool:
        """Whether the kernels can be built with these blocks, if shared memory allows it."""
        sizes = (self.block_q, self.block_kv)
        return (
            all(0 < size <= 256 and size % 64 == 0 for size in sizes)
            and self.slots >= 2
            and self.extra_slots >= 1
        )


class Config(NamedTuple):
    """What `config=` of this route may be; a kernel that is None gets its entry of the file."""

    forward: Blocks | None = None
    backward_dkv: Blocks | None = None
    backward_dq: Blocks | None = None
    backward_bias: Blocks | None = None


SHARED_MEMORY = 232_448  # bytes that a block may have
_WORKERS = 2  # compute warpgroups
# The pass that a kernel is timed in; the shapes to tune for have no bias.
_TIMED = {"forward": "forward", "backward_dkv": "gradient", "backward_dq": "gradient"}
_ACCUMULATORS = 200  # registers of a thread for float32 tiles, of 240 in all


def shared_memory(
    kernel: str, blocks: Blocks, head_dim: int, bias: int, *, segments: bool = True
) -> int:
    """Returns how many bytes of shared memory a kernel needs, at most.

    Args:
      kernel: A field of `Config`.
      blocks: Its blocks.
      head_dim: The larger of d and dv.
      bias: Bits of a bias that differs from one entry of a tile to the next, else 0.
      segments: Whether segment ids are compared.
    """
    row = 2 * _padded(head_dim)  # bytes of a query, key or value
    own, other, workers = blocks.block_q, blocks.block_kv, _WORKERS
    if kernel == "backward_dkv":
        own, other, workers = other, own, 1
    numbers = 4 * _WORKERS * own  # float32, one for each row or key that a worker owns
    # What a program keeps: q, the lse and what sums over a row; K, V, p and the row data of each
    # slot; q, dO and the row data; those of each pair of slots, and the ids of their rows.
    kept = {
        "forward": (_WORKERS * own * row, numbers, 2048),
        "backward_dkv": (own * row, own * row, 4 * own * other, 4 * blocks.slots * other),
        "backward_dq": (_WORKERS * own * row, _WORKERS * own * row, 2 * numbers),
        "backward_bias": (blocks.slots * _WORKERS * own * row, blocks.slots * numbers),
    }[kernel]
    arrays = [*kept, blocks.slots * other * row, 4 * _WORKERS * other]
    arrays.append(blocks.extra_slots * workers * own * other * bias // 8)
    if segments:
        arrays += [numbers, 4 * blocks.extra_slots * other]
    barriers = 8 * (8 + 2 * blocks.slots + 2 * blocks.extra_slots)
    return barriers + sum(-(-size // 1024) * 1024 for size in arrays)


def fitting(kernel: str, blocks: Blocks, call: Lookup, *, segments: bool) -> Blocks:
    """Returns blocks of the file with fewer slots where segment ids leave no room for all."""

    def too_large(blocks: Blocks) -> bool:
        needed = shared_memory(kernel, blocks, call.head_dim, call.bias, segments=segments)
        return needed > SHARED_MEMORY

    while blocks.slots > 2 and too_large(blocks):
        blocks = blocks._replace(slots=blocks.slots - 1)
    return blocks


def choices(call: Lookup) -> tuple[Choice, ...]:
    """Returns the blocks to try for each kernel: those that fit shared memory and registers."""
    found = []
    for kernel, timed in _TIMED.items():
        sizes = itertools.product(
            largest((64, 128), call.length),
            largest((64, 128, 256), call.length),
            (2, 3, 4, 6, 8),
            (1, 2) if call.bias else (2,),
        )
        tried = (Blocks(*size) for size in sizes)
        configs = tuple(Config(**{kernel: x}) for x in tried if _fits(kernel, x, call))
        default = find("mosaic_gpu", Config, kernel, call)
        found.append(Choice(kernel, timed, default, configs))
    return tuple(found)


def _fits(kernel: str, blocks: Blocks, call: Lookup) -> bool:
    d, tile = _padded(call.head_dim), blocks.block_q * blocks.block_kv
    # The sum that a worker keeps, and the products beside it: scores and, for dQ, dp.
    own = blocks.block_kv if kernel == "backward_dkv" else blocks.block_q
    registers = (own * d + tile * (2 if kernel == "backward_dq" else 1)) // 128
    needed = shared_memory(kernel, blocks, call.head_dim, call.bias)
    return registers <= _ACCUMULATORS and needed <= SHARED_MEMORY


def _padded(head_dim: int) -> int:
    return -(-head_dim // 64) * 64
