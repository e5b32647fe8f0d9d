"""Tracing for chips that are not there, without their compilers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from pallas_kernels.targets import CHIPS, Gpu

KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "7x": "TPU7x"}


@contextlib.contextmanager
def on(chip: str) -> Iterator[None]:
    """What is traced inside is for `chip`, a name in `CHIPS`."""
    spec = CHIPS[chip]
    device = jax.sharding.AbstractDevice(
        device_kind=spec.description if isinstance(spec, Gpu) else KINDS[chip],
        num_cores=1,
        platform=spec.platform,
    )
    mesh = jax.sharding.AbstractMesh(
        (1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device
    )
    with jax.sharding.use_abstract_mesh(mesh):
        yield
