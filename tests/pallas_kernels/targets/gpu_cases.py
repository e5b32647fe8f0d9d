"""Programs with Mosaic GPU kernels, as `compile_in_child` expects them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu


def double():
    x = jax.ShapeDtypeStruct((64, 128), jnp.float32)

    def body(x_ref, out_ref, buffer, barrier):
        plgpu.copy_gmem_to_smem(x_ref, buffer, barrier)
        plgpu.barrier_wait(barrier)
        buffer[...] = 2 * buffer[...]
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(buffer, out_ref)
        plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=x,
        scratch_types=(plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier()),
        kernel_name="double",
    )
    return kernel, (x,), ()
