"""State that is born sharded, on four pretend devices."""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import jaxopt_lab
from jaxopt_lab import quantization, subspace
from jaxopt_lab.quantization import init_sharded, state_shardings

SHAPES = {"kernel": (16, 32), "square": (16, 16), "stack": (8, 8, 8), "bias": (16,)}
ROWS = {"kernel": P("x"), "square": P(None, "x"), "bias": P()}
COLUMNS = {"kernel": P(None, "x"), "square": P("x"), "stack": P(None, "x"), "bias": P("x")}

backend_compiles = []


def note_compilation(event: str, duration_secs: float, **kwargs: Any) -> None:
    del kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        backend_compiles.append(duration_secs)


jax.monitoring.register_event_duration_secs_listener(note_compilation)


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


def by_rank(params):
    return jax.tree.map(lambda p: "adam" if p.ndim == 2 else "sgd", params)


def quantized(codec):
    return quantization.quantize_state(optax.adamw(1e-3), codec, min_size=512)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=4),
    "sm3": lambda: optax.sm3(1e-3),
    "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-3),
    "lion": lambda: jaxopt_lab.lion(1e-3),
    "muon": lambda: jaxopt_lab.muon(1e-2),
    "optax_muon": lambda: optax.contrib.muon(1e-2),
    "injected": lambda: optax.chain(
        optax.clip_by_global_norm(1.0), optax.inject_hyperparams(optax.adamw)(1e-3)
    ),
    "bfloat16": lambda: quantized(quantization.bfloat16()),
    "multi_steps": lambda: optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation(),
    "masked": lambda: optax.masked(optax.adamw(1e-3), is_matrix),
    "partition": lambda: optax.partition(
        {"adam": optax.adamw(1e-3), "sgd": optax.sgd(1e-2, 0.9)}, by_rank
    ),
}


def mesh(axis_type=AxisType.Auto, shape=(4,), names=("x",)):
    return jax.make_mesh(shape, names, (axis_type,) * len(names))


def weights(specs, axis_type=AxisType.Auto):
    where = mesh(axis_type)
    return {
        name: jax.device_put(jnp.ones(SHAPES[name]), NamedSharding(where, spec))
        for name, spec in specs.items()
    }


def training_step(tx, **options):
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1), **options)


def compilations(step, params, state, steps=3):
    params = jax.block_until_ready(jax.tree.map(jnp.copy, params))
    before = len(backend_compiles)
    for _ in range(steps):
        params, state = step(params, state)
    return len(backend_compiles) - before


def leaves_of(*shapes):
    """A transformation with leaves of these shapes in the place of each parameter."""

    def init(params):
        return {"moments": jax.tree.map(lambda _: [jnp.zeros(s) for s in shapes], params)}

    return optax.GradientTransformation(init, optax.identity().update)


def test_adamw():
    params = weights(COLUMNS)
    moments = init_sharded(optax.adamw(1e-3), params)[0]
    for tree in (moments.mu, moments.nu):
        for name, param in params.items():
            assert tree[name].sharding == param.sharding
            assert {s.data.size for s in tree[name].addressable_shards} == {param.size // 4}
    assert moments.count.sharding == NamedSharding(params["bias"].sharding.mesh, P())


def test_without_it_moments_are_whole():
    params = weights(COLUMNS)
    init = optax.adamw(1e-3).init
    with jax.set_mesh(params["bias"].sharding.mesh):
        found = jax.jit(init)(params)[0].mu["kernel"]
    assert {shard.data.size for shard in found.addressable_shards} == {found.size}


def test_no_device_ever_holds_a_whole_moment():
    where = NamedSharding(mesh(), P("x"))
    params = {"w": jax.device_put(jnp.ones((256, 64)), where)}
    tx = optax.adamw(1e-3)
    init = jax.jit(tx.init, out_shardings=state_shardings(tx, params))
    found = init.lower(params).compile().memory_analysis()
    assert found is not None
    moments = 2 * 4 * 256 * 64 // 4
    # The counter, and the table of pointers to the outputs.
    assert moments <= found.output_size_in_bytes <= moments + 64
    assert found.temp_size_in_bytes < 64


@pytest.mark.parametrize("name", [*OPTIMIZERS, "adafactor_rows"])
def test_step_is_compiled_once(name):
    specs = ROWS if name.endswith("_rows") else COLUMNS
    params, tx = weights(specs), OPTIMIZERS[name.removesuffix("_rows")]()
    state = init_sharded(tx, params)
    assert compilations(training_step(tx), params, state) == 1


def test_step_is_compiled_twice_without_it():
    params, tx = weights(COLUMNS), optax.adamw(1e-3)
    with jax.set_mesh(params["bias"].sharding.mesh):
        assert compilations(training_step(tx), params, jax.jit(tx.init)(params)) == 2


def test_step_with_shardings_is_compiled_once():
    params, tx = weights(COLUMNS), quantized(quantization.int8(16))
    shardings = jax.tree.map(lambda p: p.sharding, params), state_shardings(tx, params)
    step = training_step(tx, out_shardings=shardings)
    assert compilations(step, params, init_sharded(tx, params)) == 1
    codes = shardings[1].inner_state[0].mu["kernel"]
    assert codes == params["kernel"].sharding


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_explicit_axes(name):
    params, tx = weights(COLUMNS, AxisType.Explicit), OPTIMIZERS[name]()
    with jax.set_mesh(params["bias"].sharding.mesh):
        state = init_sharded(tx, params)
        assert compilations(training_step(tx), params, state) == 1
    outside = init_sharded(tx, params)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, state, outside)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("specs", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_compact_states_with_explicit_axes(specs):
    """A step takes moments that are split where the parameter is not, and leaves them so."""
    params, tx = weights(specs, AxisType.Explicit), jaxopt_lab.frugal_adamw(1e-3)
    with jax.set_mesh(params["bias"].sharding.mesh):
        state = init_sharded(tx, params)
        _, after = jax.jit(tx.update)(params, state, params)
    for name in ("kernel", "square"):
        moment = state[0].selected[0].mu[name]
        assert not moment.sharding.is_fully_replicated
        assert after[0].selected[0].mu[name].sharding.is_equivalent_to(moment.sharding, 2)


@pytest.mark.parametrize("name", ["schedule_free", "injected", "multi_steps", "partition"])
def test_values_and_structure_are_those_of_init(name):
    params, tx = weights(COLUMNS), OPTIMIZERS[name]()
    found, expected = init_sharded(tx, params), jax.jit(tx.init)(params)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, jax.device_get(expected))
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert (leaf.dtype, leaf.weak_type) == (wanted.dtype, wanted.weak_type)


@pytest.mark.parametrize(
    ("param", "leaf", "expected"),
    [
        ((8, 16), (8,), P("x")),  # sums over columns
        ((8, 16), (16,), P("y")),
        ((8, 16), (4, 16), P(None, ("y", "x"))),  # k directions, although 4 divides 8
        ((8, 18), (4, 18), P("x", "y")),  # 2 divides 18, but 4 does not
        ((8, 18), (3, 18), P(None, "y")),
        ((8, 16), (8, 4), P(("x", "y"), None)),
        ((8, 16), (16, 16), P(None, ("y", "x"))),  # positions count, not sizes alone
        ((8, 16), (16, 8), P("x", "y")),
        ((8, 16), (3, 8, 16), P(None, "x", "y")),  # a history
        ((8, 8), (8, 8, 8), P(None, "x", "y")),
        ((8, 16), (8, 2, 16), P("x", None, "y")),
        ((8, 16), (8, 4, 4), P(("x", "y"), None, None)),
        ((8, 16), (5,), P(None)),
        ((8, 16), (), P()),
        ((8, 16), (1, 16), P(None, "y")),
        ((6, 8, 16), (8, 16), P("y", None)),  # stacked, P(None, "y")
        ((6, 8, 16), (6, 16), P(None, None)),
        ((6, 8, 16), (6, 8), P(None, "y")),
        ((0, 16), (1, 16), P(None, "y")),
    ],
    ids=str,
)
def test_placement_by_shape(param, leaf, expected):
    where = mesh(shape=(2, 2), names=("x", "y"))
    spec = P("x", "y") if len(param) == 2 else P(None, "y")
    params = {"w": jax.ShapeDtypeStruct(param, jnp.float32, sharding=NamedSharding(where, spec))}
    found = state_shardings(leaves_of(leaf), params)["moments"]["w"][0]
    assert found == NamedSharding(where, expected)


def test_leaves_that_fit_in_several_places_take_them_in_turn():
    where = NamedSharding(mesh(shape=(2, 2), names=("x", "y")), P("x", "y"))
    params = {name: jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=where) for name in "ab"}
    found = state_shardings(leaves_of((8,), (8,), (3,), (8,)), params)["moments"]
    for name in params:
        assert [leaf.spec for leaf in found[name]] == [P("x"), P("y"), P(None), P("x")]


@pytest.mark.parametrize(
    ("scales", "expected"),
    [
        ((8, 8), P("x", "y")),  # 4 blocks of 3 in each shard
        ((8, 2), P("x", "y")),
        ((8, 3), P("x", None)),  # a block lies in two shards
        ((8, 10), P("x", None)),
        ((8, 48), P("x", None)),  # more than there are entries
        ((2, 2), P("x", "y")),
        ((2,), P(None)),  # which axis is in blocks?
        ((8, 0), P("x", None)),
    ],
    ids=str,
)
def test_scales_of_blocks(scales, expected):
    where = NamedSharding(mesh(shape=(2, 2), names=("x", "y")), P("x", "y"))
    params = {"w": jax.ShapeDtypeStruct((8, 24), jnp.float32, sharding=where)}
    found = state_shardings(leaves_of((8, 24), scales), params)["moments"]["w"]
    assert [leaf.spec for leaf in found] == [P("x", "y"), expected]
    bare = state_shardings(leaves_of((8, 24), scales), params["w"])["moments"]
    assert [leaf.spec for leaf in bare] == [P("x", "y"), expected]


def test_several_mesh_axes_and_memory_of_a_parameter_are_kept():
    where = mesh(shape=(2, 2), names=("x", "y"))
    host = NamedSharding(where, P(("x", "y")), memory_kind="pinned_host")
    params = {"w": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=host)}
    tx = optax.chain(OPTIMIZERS["adafactor"](), optax.trace(0.9))
    factored, trace = state_shardings(tx, params)[0][0], state_shardings(tx, params)[1]
    assert trace.trace["w"] == host
    assert factored.v_row["w"] == NamedSharding(where, P(("x", "y")), memory_kind="pinned_host")
    assert factored.v_col["w"] == NamedSharding(where, P(None), memory_kind="pinned_host")


def test_what_belongs_to_no_parameter_is_replicated():
    params = {"b1": weights(ROWS)["kernel"]}
    book = optax.identity()._replace(init=lambda params: {"book": jnp.ones((4, 32))})
    tx = optax.chain(optax.inject_hyperparams(optax.adam)(1e-3), optax.add_noise(0.1, 0.5, 0), book)
    injected, noise, table = init_sharded(tx, params)
    everywhere = NamedSharding(params["b1"].sharding.mesh, P())
    assert injected.inner_state[0].mu["b1"].sharding == params["b1"].sharding
    assert injected.hyperparams["b1"].sharding.is_fully_replicated
    for leaf in (injected.count, noise.rng_key, table["book"]):
        assert leaf.sharding == everywhere


def test_arrays_of_a_shape_that_parameters_have_are_placed_like_most_of_them():
    where = mesh()
    specs = {"a": P("x"), "b": P(None, "x"), "c": P(None, "x"), "d": P("x")}
    shapes = {"a": (16, 32), "b": (16, 32), "c": (16, 32), "d": (8,)}
    params = {
        name: jax.ShapeDtypeStruct(shapes[name], jnp.float32, sharding=NamedSharding(where, spec))
        for name, spec in specs.items()
    }
    slots = [jnp.zeros((16, 32)), jnp.zeros(8), jnp.zeros((32, 16)), jnp.zeros(())]
    tx = optax.identity()._replace(init=lambda params: slots)
    found = state_shardings(tx, params)
    assert [sharding.spec for sharding in found] == [P(None, "x"), P("x"), P(), P()]


RULES = {
    "adamw": lambda: optax.adamw(1e-3),
    "frugal": lambda: jaxopt_lab.frugal_adamw(1e-3),
    "frugal(blocks)": lambda: jaxopt_lab.frugal_adamw(1e-3, projection=subspace.blocks()),
    "galore": lambda: jaxopt_lab.galore_adamw(1e-3, 16),
    "dct": lambda: jaxopt_lab.dct_adamw(1e-3, 16),
    "badam": lambda: jaxopt_lab.badam(1e-3),
    "int8": lambda: quantization.quantize_state(optax.adamw(1e-3), quantization.int8()),
    "int8 badam": lambda: quantization.quantize_state(jaxopt_lab.badam(1e-3), quantization.int8()),
}
SPLITS = {
    "rows": ((8,), ("x",), P("x")),
    "columns": ((8,), ("x",), P(None, "x")),
    "both": ((4, 2), ("x", "y"), P("x", "y")),
}


def bytes_on_a_device(tx, params):
    state = init_sharded(tx, params)
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
    )


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (256, 256)], ids=str)
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_compact_state_is_compact_on_each_device(shape, axis_type):
    """Eight kernels; the whole state on one device is what `state_bytes` says."""
    table = {}
    for split, (sizes, names, spec) in SPLITS.items():
        where = NamedSharding(mesh(axis_type, sizes, names), spec)
        kernel = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
        params = {f"layer{i}": kernel for i in range(8)}
        for name, make in RULES.items():
            table[name, split] = bytes_on_a_device(make(), params)
            whole = jaxopt_lab.state_bytes(make(), params).total
            # Indices (a number for each row or column kept or not), counters and flags are on each
            # device. Bases of GaLore are, a quarter of its moments; scales of blocks that lie on
            # several devices too, a 64th of a byte for each entry.
            beside = {"galore": 8 * 16 * min(shape) * 4, "int8": 8 * 2 * math.prod(shape) / 64}
            allowed = beside.get(name, 0) + 8 * max(shape) * 4 + 300
            assert table[name, split] <= whole / 8 + allowed, (name, split)
            assert table[name, split] <= table["adamw", split], (name, split)
    print(f"\nbytes of state on each of 8 devices, 8 kernels of {shape}")
    print(f"{'':16}" + "".join(f"{split:>10}" for split in SPLITS))
    for name in RULES:
        print(f"{name:16}" + "".join(f"{table[name, split]:10,}" for split in SPLITS))


def test_dividing_a_compact_state_costs_no_gather_of_the_gradient():
    """By rows, what was kept of them comes back by an exchange of what is kept, not of all."""
    where = NamedSharding(mesh(shape=(8,)), P("x"))
    params = {"up": jax.ShapeDtypeStruct((64, 256), jnp.float32, sharding=where)}
    tx = jaxopt_lab.frugal_adamw(1e-3)
    shardings = {"up": where}, state_shardings(tx, params)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(step, out_shardings=shardings).lower(params, init_sharded(tx, params))
    gathered = re.findall(r"= (\w+)\[([\d,]*)\]\S* all-gather", str(compiled.compile().as_text()))
    entries = [math.prod(map(int, size.split(","))) for _, size in gathered]
    assert max(entries, default=0) <= 64, gathered  # which rows are kept
    assert shardings[1][0].selected[0].mu["up"].spec == P(None, "x")


def test_bare_array():
    param = weights(ROWS)["kernel"]
    state = init_sharded(optax.adamw(1e-3), param)[0]
    assert state.mu.sharding == state.nu.sharding == param.sharding
    assert state.count.sharding.is_fully_replicated


def abstract(params):
    return jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params
    )


def test_abstract_in_abstract_out():
    weakly_typed = optax.identity()._replace(init=lambda params: {"rate": 1.0})
    params, tx = weights(COLUMNS), optax.chain(optax.adamw(1e-3), weakly_typed)
    found, real = init_sharded(tx, abstract(params)), init_sharded(tx, params)
    assert jax.tree.structure(found) == jax.tree.structure(real)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(real)):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert (leaf.shape, leaf.dtype, leaf.sharding, leaf.weak_type) == (
            wanted.shape, wanted.dtype, wanted.sharding, wanted.weak_type,
        )  # fmt: skip
    assert real[1]["rate"].weak_type
    no_devices = NamedSharding(AbstractMesh((4,), ("x",)), P("x"))
    params = {"w": jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=no_devices)}
    assert init_sharded(tx, params)[0][0].mu["w"].sharding == no_devices


def test_orbax_restores_into_it(tmp_path):
    params, tx = weights(COLUMNS), OPTIMIZERS["injected"]()
    _, state = training_step(tx)(jax.tree.map(jnp.copy, params), init_sharded(tx, params))
    ocp.save(tmp_path / "state", state)
    restored = ocp.load(tmp_path / "state", init_sharded(tx, abstract(params)))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    assert restored[1].inner_state[0].nu["kernel"].sharding == params["kernel"].sharding
    assert compilations(training_step(tx), params, restored) == 1


def test_one_device():
    device = jax.devices()[2]
    params = {"w": jax.device_put(jnp.ones((8, 4)), device)}
    tx = OPTIMIZERS["adafactor"]()
    state = init_sharded(tx, params)
    assert {leaf.device for leaf in jax.tree.leaves(state)} == {device}
    assert set(jax.tree.leaves(state_shardings(tx, params))) == {SingleDeviceSharding(device)}
    assert compilations(training_step(tx), params, state) == 1


@pytest.mark.parametrize("ones", [np.ones, jnp.ones])
def test_parameters_without_a_place(ones):
    params, tx = {"w": ones((8, 4), np.float32)}, optax.adamw(1e-3)
    assert jax.tree.leaves(state_shardings(tx, params)) == []
    for leaf in jax.tree.leaves(init_sharded(tx, params)):
        assert not leaf.committed
    sharded = weights(ROWS)["kernel"]
    moments = init_sharded(tx, params | {"sharded": sharded})[0].mu
    assert moments["w"].sharding == NamedSharding(sharded.sharding.mesh, P())
    assert moments["sharded"].sharding == sharded.sharding


def test_refusals():
    tx, kernel = optax.adamw(1e-3), weights(ROWS)["kernel"]
    other = jax.device_put(kernel, NamedSharding(mesh(shape=(2, 2), names=("x", "y")), P("x")))
    alone = jax.device_put(jnp.ones(3), jax.devices()[1])
    mixed = functools.partial(pytest.raises, ValueError)
    with mixed(match=r"'a/w' is on Mesh\('x': 4.*'b/w' on Mesh\('x': 2, 'y': 2"):
        init_sharded(tx, {"a": {"w": kernel}, "b": {"w": other}})
    with mixed(match=r"'a' is on \{CpuDevice\(id=1\)\}, 'w' on Mesh"):
        state_shardings(tx, {"a": alone, "w": kernel})
    with mixed(match=r"'a' is on \{CpuDevice\(id=1\)\}, 'b' on \{CpuDevice\(id=0\)\}"):
        state_shardings(tx, {"a": alone, "b": jax.device_put(jnp.ones(3), jax.devices()[0])})
    with mixed(match="'w': .* axis 0 is partitioned 4 times"):
        bad = jax.ShapeDtypeStruct((6, 4), jnp.float32, sharding=kernel.sharding)
        init_sharded(tx, {"w": bad})
    with pytest.raises(TypeError, match="'w' is traced"):
        jax.jit(lambda p: init_sharded(tx, p))({"w": kernel})
    with pytest.raises(TypeError, match="'params' is traced"):
        jax.jit(lambda p: init_sharded(tx, p))(kernel)
    with pytest.raises(TypeError, match=r"tx must be an optax\.GradientTransformation, got float"):
        init_sharded(0.1, {"w": kernel})  # type: ignore[arg-type]

    class Strange:
        shape, dtype, sharding = (4,), jnp.dtype(jnp.float32), "somewhere"

    with pytest.raises(TypeError, match="'w' has a str; expected a NamedSharding or one device"):
        state_shardings(tx, {"w": Strange()})
