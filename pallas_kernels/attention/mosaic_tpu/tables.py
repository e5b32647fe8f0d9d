"""Block sizes of the TPU kernels, as data.

A tile of `q` x `kv` scores is one step of a kernel's grid. Inside a step the tile is worked off in
pieces of `q_compute` x `kv_compute`, unrolled: large enough that the matrix unit never waits for
its weights, small enough that a piece's scores do not leave the vector registers more than once.
With `ahead` the product of the next piece is issued before the softmax of the current one. That
pays where the scheduler does not find the overlap by itself: v6e takes 2,623 bundles for a tile of
1024 x 1024, and 2,747 in its best order without; v5e takes 4,961 and 4,144.

The sizes come from the compilers' own schedules (scheduled bundles of a tile, see
`pallas_kernels.targets.schedule`) within the range that tokamax's published timings favour.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.attention.problem import Operands, Settings, Sizes

LANES = 128
MIB = 2**20


class Blocks(NamedTuple):
    """The tile of one kernel; all sizes are multiples of 128 and each piece divides its tile."""

    q: int
    kv: int
    q_compute: int
    kv_compute: int
    ahead: bool = False


class Config(NamedTuple):
    """What `Settings.config` holds for this route."""

    forward: Blocks
    backward: Blocks
    resident: int = 8 * MIB  # bytes of float32 dQ that the backward kernel may keep in VMEM


# By chip: MiB of VMEM of a core, blocks forward and backward for heads up to 128 wide in 16 bits.
# Wider heads and float32 halve the tile (see `default_config`).
TABLE: dict[str, tuple[int, Config]] = {
    "v4": (
        16,
        Config(Blocks(512, 512, 256, 512), Blocks(512, 512, 512, 256), 2 * MIB),
    ),
    "v5e": (
        128,
        Config(Blocks(1024, 1024, 256, 1024), Blocks(1024, 1024, 1024, 512), 16 * MIB),
    ),
    "v5p": (
        64,
        Config(Blocks(1024, 1024, 256, 1024), Blocks(1024, 1024, 1024, 512), 8 * MIB),
    ),
    "v6e": (
        128,
        Config(Blocks(1024, 1024, 512, 512, True), Blocks(1024, 1024, 1024, 512), 16 * MIB),
    ),
    "7x": (
        64,
        Config(Blocks(1024, 1024, 512, 512, True), Blocks(1024, 1024, 1024, 512), 8 * MIB),
    ),
}
_GENERATIONS = {(4, 16): "v4", (5, 128): "v5e", (5, 64): "v5p", (6, 128): "v6e", (7, 64): "7x"}


def chip() -> str:
    """Returns the key of `TABLE` for the TPU that is compiled for; v5e where there is none."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:  # interpreted on another platform
        return "v5e"
    key = (info.generation, info.vmem_capacity_bytes // MIB)
    # A chip that the table does not know gets the smallest blocks.
    return _GENERATIONS.get(key, "v4")


def vmem_bytes() -> int:
    """Returns the size of VMEM of the TPU that is compiled for."""
    return TABLE[chip()][0] * MIB


def default_config(head_dim: int, value_dim: int, dtype: Any) -> Config:
    """Returns the blocks for this chip, width of the heads and dtype."""
    config = TABLE[chip()][1]
    width = round_up(max(head_dim, value_dim), LANES)
    weight = jnp.dtype(dtype).itemsize * width // (2 * LANES)
    if weight > 1:
        config = config._replace(
            forward=_smaller(config.forward, weight), backward=_smaller(config.backward, weight)
        )
    return config


def _smaller(blocks: Blocks, weight: int) -> Blocks:
    """Halves the key block for a weight of 2, both blocks for more."""
    q = blocks.q // 2 if weight > 2 else blocks.q
    kv = blocks.kv // 2
    return Blocks(q, kv, min(q, blocks.q_compute), min(kv, blocks.kv_compute), blocks.ahead)


def fit(blocks: Blocks, query_length: int, key_value_length: int) -> Blocks:
    """Shrinks `blocks` to lengths that are shorter, or that would leave much of a tile empty."""
    q, q_compute = _fit(blocks.q, blocks.q_compute, query_length)
    kv, kv_compute = _fit(blocks.kv, blocks.kv_compute, key_value_length)
    return Blocks(q, kv, q_compute, kv_compute, blocks.ahead)


def backward_blocks(config: Config, size: Sizes) -> Blocks:
    """Returns the blocks of the backward kernel: one query block of a group fits `resident`."""
    blocks = fit(config.backward, size.queries, size.keys)
    row_bytes = 4 * size.group * round_up(size.head_dim, LANES)
    most = max(LANES, config.resident // row_bytes // LANES * LANES)
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


def config_of(settings: Settings, operands: Operands) -> Config:
    """Returns the caller's blocks, or those of the table."""
    if settings.config is not None:
        assert isinstance(settings.config, Config)
        return settings.config
    size = operands.sizes
    return default_config(size.head_dim, size.value_dim, operands.query.dtype)


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
