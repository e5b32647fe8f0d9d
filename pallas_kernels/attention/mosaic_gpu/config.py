"""Block sizes by head dimension and bias, as plain data.

The starting point is what won on an H100 among the configurations that tokamax tried for kernels of
the same shape; what shared memory and registers allow here decides the rest. Nothing of this table
has been timed.
"""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    """The blocks of one kernel.

    Attributes:
      block_q: Rows of a tile; a multiple of 64.
      block_kv: Keys of a tile; a multiple of 64.
      slots: Copied operands that fit shared memory at a time: two make a tile, K and V or q and dO.
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
    """What `config=` of this route may be; a kernel that is None gets its entry of the table."""

    forward: Blocks | None = None
    backward_dkv: Blocks | None = None
    backward_dq: Blocks | None = None


# The largest head dimension that an entry serves, then what the bias of a tile is: nothing (or a
# vector), 16 bits or 32 bits an entry.
TABLE: dict[str, dict[int, tuple[Blocks, Blocks, Blocks]]] = {
    "forward": {
        64: (Blocks(64, 128, 6), Blocks(64, 128, 6), Blocks(64, 64, 6)),
        128: (Blocks(64, 128, 4), Blocks(64, 64, 6), Blocks(64, 64, 6)),
        256: (Blocks(64, 64, 4), Blocks(64, 64, 3), Blocks(64, 64, 3, 1)),
    },
    "backward_dkv": {
        64: (Blocks(64, 128, 4), Blocks(64, 128, 4), Blocks(64, 64, 4)),
        128: (Blocks(64, 64, 4), Blocks(64, 64, 4), Blocks(64, 64, 4)),
        256: (Blocks(64, 64, 4), Blocks(64, 64, 3), Blocks(64, 64, 3)),
    },
    "backward_dq": {
        64: (Blocks(64, 128, 4), Blocks(64, 64, 4), Blocks(64, 64, 4)),
        128: (Blocks(64, 64, 4), Blocks(64, 64, 4), Blocks(64, 64, 4)),
        256: (Blocks(64, 64, 3), Blocks(64, 64, 2, 1), Blocks(64, 64, 2, 1)),
    },
}


def blocks_of(kernel: str, config: Config | None, head_dim: int, bias_bytes: int) -> Blocks:
    """Returns the blocks of a kernel.

    Args:
      kernel: A field of `Config`.
      config: `Settings.config`.
      head_dim: The larger of d and dv.
      bias_bytes: Bytes of a bias entry where the bias varies along both axes of a tile, else 0.
    """
    chosen = None if config is None else getattr(config, kernel)
    if chosen is not None:
        return chosen
    entries = TABLE[kernel]
    return entries[min(d for d in entries if d >= head_dim)][(0, 2, 4).index(bias_bytes)]
