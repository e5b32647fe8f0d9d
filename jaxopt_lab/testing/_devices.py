"""Several devices: shard_map, pmap, and weights and state that are sharded alike."""

from __future__ import annotations

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab.testing._registry import NotApplicableError, check
from jaxopt_lab.testing._subject import DEVICES, Subject, require_devices, training_step
from jaxopt_lab.testing._values import (
    expect,
    expect_close,
    normal,
    normal_like,
)

_LAYOUTS = {
    "rows": {"kernel": P("x", None), "bias": P()},
    "columns": {"kernel": P(None, "x"), "bias": P("x")},
    "replicated": {"kernel": P(), "bias": P()},
}


def _mesh(axis_type: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((DEVICES,), ("x",), (axis_type,), devices=require_devices())


def _params() -> dict[str, jax.Array]:
    return {"kernel": normal((8, 4)), "bias": normal((4,), seed=1)}


def _per_device() -> tuple[Any, Any, Any]:
    """Weights, one gradient per device stacked on a leading axis, and the mean gradient."""
    params = _params()
    stacked = jax.tree.map(lambda leaf: normal((DEVICES, *leaf.shape), seed=leaf.ndim), params)
    return params, stacked, jax.tree.map(lambda leaf: jnp.mean(leaf, 0), stacked)


def _shard_map(subject: Subject, check_vma: bool) -> None:
    mesh = _mesh()
    params, stacked, mean = _per_device()
    step = training_step(subject.transform)

    def local(params: Any, state: Any, gradient: Any) -> Any:
        gradient = jax.tree.map(lambda leaf: jax.lax.pmean(leaf[0], "x"), gradient)
        return step(params, state, gradient)[:2]

    mapped = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(P(), P(), P("x")), out_specs=P(), check_vma=check_vma
        )
    )
    weights, _ = mapped(params, subject.transform.init(params), stacked)
    expect_close(weights, subject.run(params, mean).params, "params")


@check("devices")
def shard_map(subject: Subject) -> None:
    """A step inside `shard_map`, gradients averaged, equals the step on the mean gradient."""
    _shard_map(subject, check_vma=True)


@check("devices")
def shard_map_unchecked(subject: Subject) -> None:
    """The same with `check_vma=False`."""
    _shard_map(subject, check_vma=False)


def _stacked(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.stack([leaf] * DEVICES), tree)


def _at(tree: Any, index: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _each_device_alone(subject: Subject, own_state: bool) -> None:
    params = _params()
    histories = [normal_like(_stacked(params), seed) for seed in (10, 20, 30)]
    step = training_step(subject.transform)

    def local(params: Any, state: Any, histories: Any) -> Any:
        if own_state:
            params, state = _at((params, state), 0)
        for gradient in histories:
            params, state, _ = step(params, state, _at(gradient, 0))
        return jax.tree.map(lambda leaf: leaf[None], params)

    start = params, subject.transform.init(params)
    place = P("x") if own_state else P()
    mapped = jax.shard_map(
        local, mesh=_mesh(), in_specs=(place, place, P("x")), out_specs=P("x"), check_vma=True
    )
    found = jax.jit(mapped)(*(_stacked(start) if own_state else start), histories)
    for index in range(DEVICES):
        alone = subject.run(params, *[_at(gradient, index) for gradient in histories]).params
        expect_close(_at(found, index), alone, f"params of device {index}")


@check("devices")
def shard_map_varying_gradients(subject: Subject) -> None:
    """In `shard_map` on each device's own gradients, weights and state from one: as if alone."""
    _each_device_alone(subject, own_state=False)


@check("devices")
def shard_map_varying_state(subject: Subject) -> None:
    """In `shard_map` on weights, state and gradients of each device, as replicas have: as alone."""
    _each_device_alone(subject, own_state=True)


@check("devices")
def pmap(subject: Subject) -> None:
    """A step inside `pmap`, gradients averaged, equals the step on the mean gradient."""
    devices = require_devices()
    if not hasattr(jax, "pmap"):
        raise NotApplicableError("this jax has no pmap")
    params, stacked, mean = _per_device()
    step = training_step(subject.transform)

    def local(params: Any, gradient: Any) -> Any:
        gradient = jax.lax.pmean(gradient, "x")
        return step(params, subject.transform.init(params), gradient)[0]

    with warnings.catch_warnings():
        # That jax recommends shard_map is no finding about the transformation.
        warnings.simplefilter("ignore", DeprecationWarning)
        mapped = jax.pmap(local, "x", in_axes=(None, 0), devices=devices)
        weights = mapped(params, stacked)
    expected = subject.run(params, mean).params
    for index in range(DEVICES):
        replica = jax.tree.map(lambda leaf: leaf[index], weights)  # noqa: B023
        expect_close(replica, expected, f"params of device {index}")


def _placed(layout: str, axis_type: AxisType) -> tuple[jax.sharding.Mesh, Any]:
    mesh = _mesh(axis_type)
    specs = _LAYOUTS[layout]
    return mesh, {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


def _expect_sharded_like(tree: Any, params: dict[str, jax.Array], what: str) -> None:
    """Leaves of `tree` shaped like a weight (all have different shapes) are sharded like it."""
    shardings = {leaf.shape: leaf.sharding for leaf in params.values()}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        wanted = shardings.get(np.shape(leaf))
        if wanted is None:
            continue
        same = leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
        name = f"{what}{jax.tree_util.keystr(path)}"
        expect(same, f"{name} is placed as {leaf.sharding}, its weight as {wanted}")


def _initialised(subject: Subject, init: Any) -> None:
    for layout in ("rows", "columns"):
        _, shardings = _placed(layout, AxisType.Auto)
        params = jax.device_put(_params(), shardings)
        _expect_sharded_like(init(params), params, f"{layout}: state")


@check("devices", traced=False)
def sharded_state_eager_init(subject: Subject) -> None:
    """After an eager init the state is sharded like the weights, by rows and by columns."""
    _initialised(subject, subject.transform.init)


@check("devices", level="library", traced=False)
def sharded_state_jitted_init(subject: Subject) -> None:
    """After a jitted init the state is sharded like the weights, by rows and by columns."""
    _initialised(subject, jax.jit(subject.transform.init))


def _sharded_steps(subject: Subject, layout: str, axis_type: AxisType) -> None:
    mesh, shardings = _placed(layout, axis_type)
    gradients = [normal_like(_params(), seed) for seed in (10, 20)]
    expected = subject.run(_params(), *gradients)
    with jax.set_mesh(mesh):
        params = jax.device_put(_params(), shardings)
        found = subject.run(params, *[jax.device_put(leaf, shardings) for leaf in gradients])
    expect_close(found.params, expected.params, "params")
    _expect_sharded_like(found.params, params, "params")
    _expect_sharded_like(found.state, params, "state")


def _add_layout(layout: str) -> None:
    split = layout if layout == "replicated" else f"split by {layout}"
    promise = f"Weights {split} on four devices: values of one device, shardings kept"

    @check("devices", name=f"sharded_{layout}", promise=promise)
    def _(subject: Subject) -> None:
        _sharded_steps(subject, layout, AxisType.Auto)


for _layout in _LAYOUTS:
    _add_layout(_layout)


@check("devices")
def explicit_axes(subject: Subject) -> None:
    """On a mesh with explicit axes: values of one device, shardings kept."""
    for layout in ("rows", "columns"):
        _sharded_steps(subject, layout, AxisType.Explicit)
