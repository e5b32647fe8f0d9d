"""What differs between the supported jax versions, and between the places where code is traced."""

from __future__ import annotations

import contextlib
import contextvars
import warnings
from collections.abc import Callable, Hashable, Iterator
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.extend.core import jaxpr_as_fun
from jax.sharding import ManualAxisType


def varying_axes(*arrays: Any) -> frozenset[Any]:
    """Returns the manual mesh axes over which any of `arrays` varies, as `shard_map` checks it."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in arrays))


def out_struct(shape: tuple[int, ...], dtype: Any, *like: Any) -> jax.ShapeDtypeStruct:
    """Describes the output of a kernel, which varies over the mesh axes that any of `like` does.

    Under `shard_map` with its default checking every output must say over which axes it varies.
    """
    kind = ManualAxisType(varying=varying_axes(*like))
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=kind)


class Device(NamedTuple):
    """Where a call will run."""

    platform: str  # "cpu", "gpu" or "tpu"
    kind: str  # jax's `device_kind`
    compute_capability: tuple[int, int] | None = None  # of an NVIDIA GPU
    chip: str | None = None  # its name in `targets.CHIPS`, where `as_if_on` said it


_SUPPOSED: contextvars.ContextVar[Device | None] = contextvars.ContextVar("device", default=None)


@contextlib.contextmanager
def as_if_on(chip: str | None) -> Iterator[None]:
    """Lets `device` say that code runs on a chip of `targets.CHIPS`; None changes nothing."""
    supposed = _SUPPOSED.get()
    if chip is not None:
        from pallas_kernels.targets.chips import Gpu, find_chip

        found = find_chip(chip)
        supposed = Device("tpu", f"TPU {chip}", None, chip)
        if isinstance(found, Gpu):
            supposed = Device("gpu", found.description, found.compute_capability, chip)
    token = _SUPPOSED.set(supposed)
    try:
        yield
    finally:
        _SUPPOSED.reset(token)


def device() -> Device:
    """Returns where code traced here will run.

    That is the device that the ambient abstract mesh names, when a program is compiled for a chip
    that is not there; else the default device.
    """
    supposed = _SUPPOSED.get()
    if supposed is not None:
        return supposed
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        platform = "gpu" if abstract.platform in ("cuda", "rocm", "gpu") else abstract.platform
        return Device(platform, abstract.device_kind, _capability(abstract.device_kind))
    default: Any = getattr(jax.config, "jax_default_device", None) or jax.devices()[0]
    if isinstance(default, str):
        default = jax.devices(default)[0]
    capability = getattr(default, "compute_capability", None)
    if capability is not None:
        major, _, minor = str(capability).partition(".")
        capability = (int(major), int(minor or 0))
    return Device(default.platform, default.device_kind, capability)


def _capability(kind: str) -> tuple[int, int] | None:
    """Returns the compute capability of an NVIDIA GPU that is known only by its name."""
    from pallas_kernels.targets.chips import CHIPS, Gpu

    known = {
        name.upper(): chip.compute_capability
        for name, chip in CHIPS.items()
        if isinstance(chip, Gpu)
    }
    return next((x for name, x in (known | _OTHERS).items() if name in kind), None)


# Beside `targets.CHIPS`, whose names come first: an A100 is no A10.
_OTHERS = {"A10": (8, 6), "A40": (8, 6), "RTX A": (8, 6), "RTX 30": (8, 6), "RTX 40": (8, 9)}


def silence_triton() -> None:
    """Ignores jax's warning, from 0.11, that Triton's lowering will go: nothing a user can act on.

    The warning is given when the caller's program is lowered, so the filter is set and stays.
    """
    warnings.filterwarnings(
        "ignore", "The Pallas Triton backend is deprecated", category=DeprecationWarning
    )


def vary(x: jax.Array, axes: frozenset[Any]) -> jax.Array:
    """Returns `x` as an array that varies over the manual mesh axes `axes` and over its own.

    Constants do not vary, and loops, branches and custom derivatives want equal types. Where
    `shard_map` does not check, and outside of it, `varying_axes` is empty and this returns `x`.
    """
    missing = axes - varying_axes(x)
    return lax.pcast(x, tuple(sorted(missing, key=str)), to="varying") if missing else x


def vary_like(x: jax.Array, *like: Any) -> jax.Array:
    """Marks `x`, equal on all devices, as varying over the manual axes over which `like` varies.

    The first value of a loop must have the type of the later ones, which depend on `like`.
    """
    axes = varying_axes(*like) - varying_axes(x)
    return lax.pcast(x, tuple(axes), to="varying") if axes else x


def unvarying(fn: Callable[..., Any], *args: Any) -> Any:
    """Returns ``fn(*args)``, inside of which nothing varies over manual mesh axes; results do.

    `shard_map` with its check types what varies, which Pallas' interpreters and bodies of Mosaic
    GPU kernels do not follow. `fn` must be what each device does by itself, whatever varies.
    """
    leaves = jax.tree.leaves(args)
    axes = varying_axes(*leaves)
    if not axes:
        return fn(*args)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    # The types inside of the `jit` stay as they were traced.
    traced, out = jax.make_jaxpr(jax.jit(fn), return_shape=True)(*structs)
    results = [vary(x, axes) for x in jaxpr_as_fun(traced)(*leaves)]
    return jax.tree.unflatten(jax.tree.structure(out), results)


def with_axis(name: Hashable, size: int, fn: Callable[..., Any], *args: Any) -> Any:
    """Returns ``fn(*args)``, in which the mapped axis `name` is bound.

    In the derivative of a ``vmap(axis_name=...)``, which JAX traces when the `vmap` is over, the
    axis is known to operations but not to the bodies of loops and branches.
    """
    try:
        lax.axis_size(name)
    except NameError:
        traced, out = jax.make_jaxpr(fn, axis_env=[(name, size)], return_shape=True)(*args)
        results = jaxpr_as_fun(traced)(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out), results)
    return fn(*args)
