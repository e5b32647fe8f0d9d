"""Route "mosaic_gpu": Pallas kernels for NVIDIA Hopper, with TMA, wgmma and specialised warpgroups.

`forward.py`, `backward_dkv.py`, `backward_dq.py` and `backward_bias.py` hold a kernel each,
`_common.py`, `_tiles.py` and `_extras.py` what they share, `config.py` their blocks. The same
source runs on the device and, from jax 0.11 on, in Pallas' GPU interpreter.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention.mosaic_gpu._common import lookup_of
from pallas_kernels.attention.mosaic_gpu.backward import backward
from pallas_kernels.attention.mosaic_gpu.config import (
    SHARED_MEMORY,
    Blocks,
    Config,
    choices,
    shared_memory,
)
from pallas_kernels.attention.mosaic_gpu.forward import forward
from pallas_kernels.attention.problem import Device, Operands, Route, Settings
from pallas_kernels.attention.tuning import Choice

__all__ = ["ROUTE", "Blocks", "Config"]

_DTYPES = (jnp.bfloat16, jnp.float16)


def refusal(settings: Settings, operands: Operands, device: Device) -> str | None:
    """Returns why the call cannot be served, or None."""
    size, dtype = operands.sizes, operands.query.dtype
    if settings.interpret:
        if not hasattr(plgpu, "InterpretGPUParams"):
            return "the GPU interpreter of this jax lacks what the kernels use; jax 0.11 has it"
    elif device.compute_capability != (9, 0):
        return f"needs a Hopper GPU (compute capability 9.0), and this is {device.kind}"
    if dtype not in _DTYPES:
        return f"takes bfloat16 and float16, query is {dtype}"
    if max(size.head_dim, size.value_dim) > 256:
        return f"takes heads up to 256 wide, these are {size.head_dim} and {size.value_dim}"
    if 0 in (size.batch, size.queries, size.keys, size.heads, size.head_dim, size.value_dim):
        return f"takes no empty arrays, query is {operands.query.shape}, key {operands.key.shape}"
    if operands.diagonals is not None:
        return "has no bias by rule"
    bias = operands.bias
    if bias is not None and bias.dtype not in (*_DTYPES, jnp.float32):
        return f"takes a bias of bfloat16, float16 or float32, this is {bias.dtype}"
    if (
        max(size.head_dim, size.value_dim) > 128
        and operands.mask.has_segments
        and bias is not None
        and bias.dtype == jnp.float32
        and bias.shape[2] != 1
        and bias.shape[3] != 1
    ):
        return (
            "has no shared memory for segment ids beside a float32 bias of rows and keys and heads "
            "wider than 128; a bias in query's dtype fits"
        )
    given = settings.config._asdict() if isinstance(settings.config, Config) else {}
    for kernel, blocks in given.items():
        reason = None if blocks is None else _refusal_of_blocks(kernel, blocks, operands)
        if reason is not None:
            return reason
    return None


def _refusal_of_blocks(kernel: str, blocks: Blocks, operands: Operands) -> str | None:
    if not blocks.is_possible:
        return f"takes blocks that are multiples of 64 up to 256 and 2 slots or more: {blocks}"
    lookup = lookup_of(operands)
    segments = operands.mask.has_segments
    needed = shared_memory(kernel, blocks, lookup.head_dim, lookup.bias, segments=segments)
    if needed > SHARED_MEMORY:
        return f"{kernel} with {blocks} needs {needed} bytes of shared memory of {SHARED_MEMORY}"
    return None


def _choices(operands: Operands) -> tuple[Choice, ...]:
    return choices(lookup_of(operands))


ROUTE = Route("mosaic_gpu", forward, backward, refusal, Config, _choices)
