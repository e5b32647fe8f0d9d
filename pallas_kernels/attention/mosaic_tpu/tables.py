"""Blocks of the TPU kernels: what there may be, and what fits.

A tile of `q` x `kv` scores is one step of a kernel's grid. Inside a step the tile is worked off in
pieces of `q_compute` x `kv_compute`, unrolled: large enough that the matrix unit never waits for
its weights, small enough that a piece's scores do not leave the vector registers more than once.
With `ahead` the product of the next piece is issued before the softmax of the current one. That
pays where the scheduler does not find the overlap by itself: v6e takes 2,623 bundles for a tile of
1024 x 1024, and 2,747 in its best order without; v5e takes 4,961 and 4,144.

What the file of block sizes (`tuning`) holds comes from the compilers' own schedules (scheduled
bundles of a tile, see `pallas_kernels.targets.schedule`) within the range that tokamax's published
timings favour, for heads up to 128 wide in 16 bits. Wider heads and float32 halve the tile.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from jax.experimental.pallas import tpu as pltpu

from pallas_kernels._compat import device
from pallas_kernels.attention import tuning
from pallas_kernels.attention.problem import Operands, Settings

LANES = 128
MIB = 2**20


class Blocks(NamedTuple):
    """The tile of one kernel; all sizes are multiples of 128 and each piece divides its tile."""

    q: int
    kv: int
    q_compute: int
    kv_compute: int
    ahead: bool = False
    resident: int = 8 * MIB  # bytes of float32 dQ that the backward kernel may keep in VMEM

    @property
    def is_possible(self) -> bool:
        """Whether the kernels can be built with these blocks, if memory allows it."""
        pairs = ((self.q, self.q_compute), (self.kv, self.kv_compute))
        return self.resident > 0 and all(
            piece > 0 and size > 0 and piece % LANES == size % piece == 0 for size, piece in pairs
        )


class Config(NamedTuple):
    """What `config=` of this route may be; a kernel that is None gets its entry of the file."""

    forward: Blocks | None = None
    backward: Blocks | None = None


# MiB of VMEM of a core.
VMEM = {"v4": 16, "v5e": 128, "v5p": 64, "v6e": 128, "7x": 64}
_GENERATIONS = {(4, 16): "v4", (5, 128): "v5e", (5, 64): "v5p", (6, 128): "v6e", (7, 64): "7x"}


def chip() -> str:
    """Returns the key of `VMEM` for the TPU that is compiled for; v5e where there is none."""
    supposed = device().chip
    if supposed is not None:
        return supposed if supposed in VMEM else "v4"
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # interpreted on another platform
        return "v5e"
    key = (info.generation, info.vmem_capacity_bytes // MIB)
    # A chip that is not known gets the smallest blocks.
    return _GENERATIONS.get(key, "v4")


def vmem_bytes() -> int:
    """Returns the size of VMEM of the TPU that is compiled for."""
    return VMEM[chip()] * MIB


def fit(blocks: Blocks, query_length: int, key_value_length: int) -> Blocks:
    """Shrinks `blocks` to lengths that are shorter, or that would leave much of a tile empty."""
    q, q_compute = _fit(blocks.q, blocks.q_compute, query_length)
    kv, kv_compute = _fit(blocks.kv, blocks.kv_compute, key_value_length)
    return blocks._replace(q=q, kv=kv, q_compute=q_compute, kv_compute=kv_compute)


def forward_blocks(settings: Settings, operands: Operands) -> Blocks:
    """Returns the blocks of the forward kernel, the caller's or the file's."""
    size = operands.sizes
    return fit(_blocks("forward", settings, operands), size.queries, size.keys)


def backward_blocks(settings: Settings, operands: Operands) -> Blocks:
    """Returns the blocks of the backward kernel: one query block of a group fits `resident`."""
    size = operands.sizes
    blocks = fit(_blocks("backward", settings, operands), size.queries, size.keys)
    row_bytes = 4 * size.group * round_up(size.head_dim, LANES)
    most = max(LANES, blocks.resident // row_bytes // LANES * LANES)
    if blocks.q <= most:
        return blocks
    piece = blocks.q_compute if most % blocks.q_compute == 0 else LANES
    return blocks._replace(q=most, q_compute=piece)


def _fit(block: int, piece: int, length: int) -> tuple[int, int]:
    count = max(1, -(-length // block))
    share = -(-max(length, 1) // count)
    piece = min(piece, round_up(share, LANES))
    return round_up(share, piece), piece


def round_up(size: int, multiple: int) -> int:
    """Returns the smallest multiple of `multiple` that is at least `size`."""
    return -(-size // multiple) * multiple


def _blocks(kernel: str, settings: Settings, operands: Operands) -> Blocks:
    lookup = tuning.lookup_of(operands, device(), chip())
    return tuning.blocks_of("mosaic_tpu", Config, kernel, settings.config, lookup)


def choices(operands: Operands) -> tuple[tuning.Choice, ...]:
    """Returns the blocks to try for each kernel: those whose tiles fit the vector memory."""
    size = operands.sizes
    found = []
    for kernel in Config._fields:
        default = _blocks(kernel, Settings(scale=1.0), operands)
        sizes = itertools.product(
            tuning.largest((256, 512, 1024, 2048), size.queries),
            tuning.largest((256, 512, 1024, 2048), size.keys),
            (256, 512, 1024),
            (256, 512, 1024),
            (False, True) if kernel == "forward" else (False,),
        )
        tried = (Blocks(*sizes_, resident=default.resident) for sizes_ in sizes)
        configs = tuple(Config(**{kernel: x}) for x in tried if _fits(x, operands))
        timed = "forward" if kernel == "forward" else "gradient"
        found.append(tuning.Choice(kernel, timed, default, configs))
    return tuple(found)


def _fits(blocks: Blocks, operands: Operands) -> bool:
    size = operands.sizes
    width = round_up(size.head_dim, LANES) + round_up(size.value_dim, LANES)
    # Operands and results of both sides, each twice, and two float32 sums of the larger.
    operand_bytes = 4 * operands.query.dtype.itemsize * width * (blocks.q + blocks.kv)
    sums = 4 * width * max(blocks.q, blocks.kv)
    scores = 6 * 4 * blocks.q * blocks.kv
    return (
        blocks.is_possible
        and max(blocks.q, blocks.kv) <= 4 * min(blocks.q, blocks.kv)
        and blocks.q * blocks.kv <= 16 * blocks.q_compute * blocks.kv_compute
        and operand_bytes + sums + scores + 2 * MIB <= vmem_bytes()
    )


def vmem_limit(windows: int, scratch: int, blocks: Blocks) -> int:
    """Returns the bytes of VMEM to allow a kernel.

    Args:
      windows: Bytes of its blocks, each of which is held twice.
      scratch: Bytes of its scratch.
      blocks: Its tile. The compiler keeps what does not fit the registers: at most a few float32
        copies of the scores.
    """
    wanted = 2 * windows + scratch + 6 * 4 * blocks.q * blocks.kv + 2 * MIB
    return min(wanted, vmem_bytes() - MIB // 2)
