"""Compile a JAX function for a chip that this machine does not have."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import jax
from jax.experimental import topologies

from pallas_kernels.targets.chips import Gpu, Tpu, find_chip, target_config

ENVIRONMENT = MappingProxyType(
    {
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
)
"""Environment variables to set before the process imports jax.

Without the first two, the CUDA plugin looks for the CUDA libraries when jax starts, does not find
them and leaves its compiler unregistered; the third keeps libtpu from asking a cloud for its host,
the last from refusing a second process, which is right for a chip and not for a compiler.
"""

Device = Any  # a `jax.Device`, which type checkers take for a variable
_WHEELS = {"cuda": ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12"), "tpu": ("libtpu",)}


def missing_compiler(chip: str) -> str | None:
    """Says why `chip` cannot be compiled for here, or returns None if its compiler is installed.

    Args:
      chip: A name in `CHIPS`.

    Raises:
      ValueError: `chip` is not a name in `CHIPS`.
    """
    platform = find_chip(chip).platform
    if any(_installed(module) for module in _WHEELS[platform]):
        return None
    return (
        f'the {platform} compiler for chip={chip!r} is not installed: pip install -e ".[aot]" in '
        "the checkout"
    )


def abstract_devices(chip: str, topology: str | None = None) -> Sequence[Device]:
    """Returns the devices of a machine that is not there, to build a `jax.sharding.Mesh` of.

    Args:
      chip: A name in `CHIPS`.
      topology: The size of the machine. For a GPU ``"AxBxC"``: B hosts of C devices, for instance
        ``"1x1x8"``; by default one device. For a TPU the name of a slice, for instance
        ``"v5e:16x16"``; by default one host.

    Returns:
      Devices that programs can be compiled for and that hold no arrays.

    Raises:
      ValueError: `chip` is not known, or its compiler does not accept `topology`.
      RuntimeError: The compiler is not installed or does not start, or jax started without it.
    """
    reason = missing_compiler(chip)
    if reason is not None:
        raise RuntimeError(reason)
    spec = find_chip(chip)
    return _devices(chip, spec.topology if topology is None else topology)


def compile_for(
    fn: Callable[..., Any],
    *args: Any,
    chip: str,
    topology: str | None = None,
    donate_argnums: int | Sequence[int] = (),
    static_argnums: int | Sequence[int] = (),
) -> jax.stages.Compiled:
    """Compiles ``fn(*args)`` for `chip`, which need not be present.

    Pallas kernels inside `fn` are compiled too, down to machine code. The environment must hold
    `ENVIRONMENT` when jax is imported. Use one chip per process where the result decides a test
    (see `compile_in_child`): compilers abort on some errors, and two chips in one process share
    jax's caches.

    Args:
      fn: A function of arrays, or the result of `jax.jit`, which then keeps its own options.
      *args: Pytrees of arrays or `jax.ShapeDtypeStruct`. A struct that has a sharding keeps it (a
        mesh of `abstract_devices`); everything else is placed on the first device.
      chip: A name in `CHIPS`.
      topology: The size of the machine, such as ``"1x1x8"`` (GPUs: hosts, devices of each) or
        ``"v5e:16x16"`` (a slice of TPUs); by default one device or one host.
      donate_argnums: Positions of the arguments whose memory the outputs may take over.
      static_argnums: Positions of the arguments that are Python values.

    Returns:
      The compiled program: `as_text`, `memory_analysis`, and `memory_traffic` of this package. It
      cannot be called.

    Raises:
      ValueError: `chip` or `topology` is not known, `args` has no array, or `donate_argnums` is
        given for a function that is already jitted.
      RuntimeError: The compiler is not installed, or jax started without it.

    Example:
      >>> x = jax.ShapeDtypeStruct((1024, 1024), "float32")
      >>> compiled = compile_for(lambda x: 2 * x, x, chip="h200")  # doctest: +SKIP
      >>> compiled.memory_analysis().output_size_in_bytes  # doctest: +SKIP
      4194304
    """
    device = abstract_devices(chip, topology)[0]
    donated, static = _positions(donate_argnums), _positions(static_argnums)
    static = tuple(i % len(args) for i in static)
    placed = [a if i in static else _place(a, device) for i, a in enumerate(args)]
    leaves = jax.tree.leaves([a for i, a in enumerate(placed) if i not in static])
    if not leaves:
        raise ValueError("args has no array; expected at least one, since arrays name the chip")
    if not isinstance(fn, jax.stages.Wrapped):
        jitted = jax.jit(fn, donate_argnums=donated, static_argnums=static)
    elif donated:
        raise ValueError(
            f"donate_argnums={donate_argnums!r} was given for a function that is already jitted; "
            "expected it at jax.jit"
        )
    else:
        jitted = fn
    with _ambient_mesh(chip, device, leaves):
        return jitted.lower(*placed).compile()


def _positions(argnums: int | Sequence[int]) -> tuple[int, ...]:
    return (argnums,) if isinstance(argnums, int) else tuple(argnums)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


@functools.cache
def _devices(chip: str, topology: str) -> Sequence[Device]:
    spec = find_chip(chip)
    try:
        if isinstance(spec, Gpu):
            return topologies.get_topology_desc(
                platform="cuda", topology=topology, target_config=target_config(spec)
            ).devices
        return topologies.get_topology_desc(topology, platform="tpu").devices
    except NotImplementedError as error:
        wanted = ", ".join(f"{name}={value}" for name, value in ENVIRONMENT.items())
        raise RuntimeError(
            f"jax started without the {spec.platform} compiler: set {wanted} before jax is "
            "imported, or use compile_in_child"
        ) from error
    except jax.errors.JaxRuntimeError as error:
        if str(error).startswith("ABORTED"):
            raise RuntimeError(f"the compiler for chip={chip!r} did not start: {error}") from error
        raise ValueError(f"topology={topology!r} is not one of chip={chip!r}: {error}") from error


def _place(tree: Any, device: Device) -> Any:
    here = jax.sharding.SingleDeviceSharding(device)

    def struct(leaf: Any) -> jax.ShapeDtypeStruct:
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf if leaf.sharding is not None else leaf.update(sharding=here)
        aval = jax.typeof(leaf)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype, sharding=here, weak_type=aval.weak_type)

    return jax.tree.map(struct, tree)


def _ambient_mesh(
    chip: str, device: Device, leaves: Sequence[jax.ShapeDtypeStruct]
) -> contextlib.AbstractContextManager[Any]:
    """Tells Pallas which chip it lowers for, since no device of that kind can be asked."""
    if any(not isinstance(x.sharding, jax.sharding.SingleDeviceSharding) for x in leaves):
        return contextlib.nullcontext()
    spec = find_chip(chip)
    abstract_device = jax.sharding.AbstractDevice(
        device_kind=device.device_kind,
        num_cores=device.num_cores if isinstance(spec, Tpu) else spec.core_count,
        platform=device.platform,
    )
    return jax.sharding.use_abstract_mesh(
        jax.sharding.AbstractMesh(
            (1,),
            ("device",),
            axis_types=(jax.sharding.AxisType.Auto,),
            abstract_device=abstract_device,
        )
    )
