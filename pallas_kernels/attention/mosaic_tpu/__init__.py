"""Route "mosaic_tpu": Pallas kernels for TPU v4 and later, one forward and one fused backward.

`forward.py`, `backward.py` and `bias.py` hold a kernel each, `tiles.py` what they share, `steps.py`
the order of their tiles and `tables.py` their blocks.
"""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels.attention.mosaic_tpu import steps, tables
from pallas_kernels.attention.mosaic_tpu.backward import backward
from pallas_kernels.attention.mosaic_tpu.forward import forward
from pallas_kernels.attention.mosaic_tpu.tables import Blocks, Config
from pallas_kernels.attention.problem import Device, Operands, Route, Settings

__all__ = ["ROUTE", "Blocks", "Config"]


def refusal(settings: Settings, operands: Operands, device: Device) -> str | None:
    """Returns why the call cannot be served, or None."""
    size = operands.sizes
    dtype = operands.query.dtype
    if device.platform != "tpu" and not settings.interpret:
        return f"needs a TPU, and this call runs on {device.platform!r}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        hint = "; float16 is no type of a TPU" if dtype == jnp.float16 else ""
        return f"takes bfloat16 and float32, query is {dtype}{hint}"
    if max(size.head_dim, size.value_dim) > 256:
        return f"takes heads up to 256 wide, these are {size.head_dim} and {size.value_dim}"
    if 0 in (size.batch, size.queries, size.keys, size.heads):
        return f"takes no empty arrays, query is {operands.query.shape}, key {operands.key.shape}"
    if operands.diagonals is not None:
        return "has no bias by rule"
    for blocks in settings.config if isinstance(settings.config, Config) else ():
        if blocks is not None and not blocks.is_possible:
            return f"takes tiles in whole pieces, both multiples of 128: {blocks}"
    return steps.refusal(settings, operands)


ROUTE = Route("mosaic_tpu", forward, backward, refusal, Config, tables.choices)
