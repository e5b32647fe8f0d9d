"""Bytes counted by hand, and bytes of arrays that really exist."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab
from jaxopt_lab import diagnostics

PARAMS = {
    "dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)},
    "norm": {"scale": jnp.ones(8)},
}
SIZE = 44
MATRICES = {"dense": {"kernel": True, "bias": False}, "norm": {"scale": False}}


class Pair(NamedTuple):
    a: Any
    mu: Any


def fields(found):
    return {leaf.name: dict(leaf.fields) for leaf in found.parameters}


def others(found):
    return {leaf.name: leaf.bytes for leaf in found.others}


def real_bytes(tree):
    def nbytes(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        return np.asarray(leaf).nbytes

    return sum(nbytes(leaf) for leaf in jax.tree.leaves(tree))


def quantized():
    """A moment kept as int8 codes with a scale for each leaf, a shared code book, a random key."""

    def init(params):
        def pack(p):
            return {"codes": jnp.zeros(p.shape, jnp.int8), "scale": jnp.zeros(())}

        book = jnp.zeros(256)
        return {"mu": jax.tree.map(pack, params), "book": book, "key": jax.random.key(0)}

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def low_rank():
    """A projection and a projected moment for matrices, nothing for other leaves."""

    def init(params):
        def basis(p):
            return jnp.zeros((p.shape[0], 2)) if p.ndim == 2 else None

        def moment(p):
            return jnp.zeros((2, p.shape[1]) if p.ndim == 2 else p.shape)

        return {"basis": jax.tree.map(basis, params), "moment": jax.tree.map(moment, params)}

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def partitioned():
    labels = jax.tree.map(lambda matrix: "adam" if matrix else "sgd", MATRICES)
    return optax.partition({"adam": optax.adam(1e-3), "sgd": optax.sgd(1.0, 0.9)}, labels)


def multi_steps():
    return optax.MultiSteps(optax.adam(1e-3), 4).gradient_transformation()


WRAPPED = {
    "adamw": functools.partial(optax.adamw, 1e-3),
    "bfloat16": functools.partial(optax.adamw, 1e-3, mu_dtype=jnp.bfloat16),
    "lion": functools.partial(jaxopt_lab.lion, 1e-3),
    "muon": functools.partial(jaxopt_lab.muon, 1e-2),
    "masked": lambda: optax.masked(optax.adam(1e-3), MATRICES),
    "prefix_mask": lambda: optax.masked(optax.adam(1e-3), {"dense": True, "norm": False}),
    "partition": partitioned,
    "multi_steps": multi_steps,
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(1e-3),
    "noise": lambda: optax.chain(optax.add_noise(0.1, 0.5, 0), optax.adam(1e-3)),
    "quantized": quantized,
    "low_rank": low_rank,
    "sgd": lambda: optax.sgd(1.0),
}


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("params", [PARAMS, jnp.ones((3, 4))], ids=["tree", "bare"])
def test_total_is_that_of_real_arrays(name, params):
    if params is not PARAMS and name in ("masked", "prefix_mask", "partition"):
        params = {"dense": {"kernel": params, "bias": params[0]}, "norm": {"scale": params}}
    tx = WRAPPED[name]()
    found = diagnostics.state_bytes(tx, params)
    assert found.total == real_bytes(tx.init(params))
    assert found.num_parameters == sum(x.size for x in jax.tree.leaves(params))
    assert found.bytes_per_parameter == found.total / found.num_parameters


def test_adamw():
    found = diagnostics.state_bytes(optax.adamw(1e-3), PARAMS)
    assert found.total == 8 * SIZE + 4
    assert fields(found) == {
        "dense/bias": {"mu": 16, "nu": 16},
        "dense/kernel": {"mu": 128, "nu": 128},
        "norm/scale": {"mu": 32, "nu": 32},
    }
    assert others(found) == {"0/count": 4}


def test_mu_dtype():
    found = diagnostics.state_bytes(WRAPPED["bfloat16"](), PARAMS)
    assert found.total == 6 * SIZE + 4
    assert fields(found)["dense/kernel"] == {"mu": 64, "nu": 128}


def test_lion():
    found = diagnostics.state_bytes(jaxopt_lab.lion(1e-3), PARAMS)
    assert found.bytes_per_parameter == 4
    assert others(found) == {}


def test_muon():
    found = diagnostics.state_bytes(jaxopt_lab.muon(1e-2), PARAMS)
    leaves = {leaf.name: leaf.bytes for leaf in found.parameters}
    assert leaves == {"dense/kernel": 4 * 32, "dense/bias": 8 * 4, "norm/scale": 8 * 8}


@pytest.mark.parametrize("name", ["masked", "prefix_mask"])
def test_masked(name):
    found = diagnostics.state_bytes(WRAPPED[name](), PARAMS)
    bias = {"mu": 16, "nu": 16} if name == "prefix_mask" else {}
    kernel = {"mu": 128, "nu": 128}
    assert fields(found) == {"dense/kernel": kernel, "dense/bias": bias, "norm/scale": {}}


def test_partition():
    found = diagnostics.state_bytes(partitioned(), PARAMS)
    assert fields(found) == {
        "dense/bias": {"trace": 16},
        "dense/kernel": {"mu": 128, "nu": 128},
        "norm/scale": {"trace": 32},
    }
    assert others(found) == {"inner_states/adam/inner_state/0/count": 4}


def test_multi_steps():
    found = diagnostics.state_bytes(multi_steps(), PARAMS)
    assert fields(found)["norm/scale"] == {"mu": 32, "nu": 32, "acc_grads": 32}
    wrapper: Any = optax.MultiSteps(optax.adam(1e-3), 4)
    assert diagnostics.state_bytes(wrapper, PARAMS) == found


def test_codes_with_scales_and_keys():
    found = diagnostics.state_bytes(quantized(), PARAMS)
    assert fields(found)["dense/kernel"] == {"mu/codes": 32, "mu/scale": 4}
    key = jax.random.key_data(jax.random.key(0)).nbytes
    assert others(found) == {"book": 1024, "key": key}


def test_low_rank():
    found = diagnostics.state_bytes(low_rank(), PARAMS)
    assert fields(found)["dense/kernel"] == {"basis": 64, "moment": 32}
    assert fields(found)["norm/scale"] == {"moment": 32}


@pytest.mark.parametrize(
    "params",
    [
        {"a": jnp.ones(2), "b": {"a": jnp.ones(3)}},
        {"mu": jnp.ones(2), "nu": {"mu": jnp.ones(3)}},
        Pair(a=jnp.ones(2), mu=Pair(a=jnp.ones(3), mu=jnp.ones(5))),
        (jnp.ones(2), jnp.ones(3)),
        [jnp.ones(2), [jnp.ones(3)]],
        {"0": jnp.ones(2), "count": jnp.ones(3), "inner_state": jnp.ones(5)},
        {"b1": jnp.ones(2), "b2": jnp.ones(3), "eps": jnp.ones(5), "eps_root": jnp.ones(6)},
    ],
    ids=["suffix", "fields", "attributes", "tuple", "lists", "state_names", "hyperparams"],
)
@pytest.mark.parametrize("name", ["adamw", "multi_steps", "inject_hyperparams"])
def test_ambiguous_names(name, params):
    found = diagnostics.state_bytes(WRAPPED[name](), params)
    for leaf in found.parameters:
        moments = {"mu": 4 * leaf.shape[0], "nu": 4 * leaf.shape[0]}
        assert {k: v for k, v in leaf.fields.items() if k != "acc_grads"} == moments
    assert all(leaf.shape == () for leaf in found.others)


def test_labels_that_are_parameters():
    params = {"w": jnp.ones((2, 2)), "b": jnp.ones(2)}
    tx = optax.partition({"w": optax.adam(1.0), "b": optax.adam(1.0)}, {"w": "b", "b": "w"})
    found = diagnostics.state_bytes(tx, params)
    assert fields(found) == {"w": {"mu": 16, "nu": 16}, "b": {"mu": 8, "nu": 8}}
    assert len(found.others) == 2


def test_bare_array():
    found = diagnostics.state_bytes(optax.adam(1e-3), jnp.ones((3, 4)))
    assert fields(found) == {"": {"mu": 48, "nu": 48}}
    assert others(found) == {"0/count": 4}


def test_fields_of_one_name_are_added():
    tx = optax.chain(optax.scale_by_adam(), optax.scale_by_adam())
    assert fields(diagnostics.state_bytes(tx, PARAMS))["norm/scale"] == {"mu": 64, "nu": 64}


def test_nothing_is_allocated():
    before = {id(array) for array in jax.live_arrays()}
    params = {f"layer_{i}": jax.ShapeDtypeStruct((32768, 32768), jnp.float32) for i in range(10)}
    found = diagnostics.state_bytes(optax.adamw(1e-3), params)
    assert found.total == 8 * 10 * 2**30 + 4
    memory = diagnostics.training_memory(
        lambda p, x: sum(jnp.sum(leaf) for leaf in p.values()) * x,
        optax.adamw(1e-3),
        params,
        jax.ShapeDtypeStruct((), jnp.float32),
    )
    assert memory.parameters == 4 * 10 * 2**30
    # Scalars may be cached by jax itself; nothing as large as the smallest leaf can have come.
    assert all(x.nbytes < 1024 for x in jax.live_arrays() if id(x) not in before)


def test_no_parameters():
    found = diagnostics.state_bytes(optax.adam(1e-3), {})
    assert found.total == 4
    assert np.isnan(found.bytes_per_parameter)
    assert "total" in str(found)


def test_table_has_the_largest_first_and_aligns():
    lines = str(diagnostics.state_bytes(optax.adam(1e-3), PARAMS)).splitlines()
    assert [line.split()[0] for line in lines] == [
        "parameter", "dense/kernel", "norm/scale", "dense/bias", "no", "0/count", "total",
    ]  # fmt: skip
    end = lines[0].index("bytes") + len("bytes")
    for line, count in zip(lines[1:4], ("256", "64", "32")):
        assert line[:end].endswith(" " + count)
    assert lines[-1].endswith("8.091 for each of 44")


def test_a_function_is_no_transformation():
    tx: Any = optax.adamw
    with pytest.raises(
        TypeError, match=r"tx must be an optax.GradientTransformation, got the func"
    ):
        diagnostics.state_bytes(tx, PARAMS)
    with pytest.raises(
        TypeError, match=r"tx must be an optax.GradientTransformation, got the func"
    ):
        diagnostics.training_memory(loss, tx, MODEL, BATCH)


# training_memory

MODEL = {"w": jnp.ones((64, 64)), "v": jnp.ones((64, 64))}
BATCH = jax.ShapeDtypeStruct((16, 64), jnp.float32)
WEIGHTS = 4 * 2 * 64 * 64


def loss(params, x):
    return jnp.mean(jnp.square(jnp.tanh(x @ params["w"]) @ params["v"]))


@functools.cache
def memory(rows=16, donate=True):
    batch = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    return diagnostics.training_memory(loss, optax.adam(1e-3), MODEL, batch, donate=donate)


def test_arguments_split():
    found = memory()
    assert found.parameters == WEIGHTS
    assert found.state == 2 * WEIGHTS + 4
    assert found.batch == 16 * 64 * 4
    # CPU buffers are neither padded nor tiled.
    assert found.arguments == found.parameters + found.state + found.batch
    assert found.peak == found.arguments + found.outputs - found.aliased + found.temporaries


def test_a_donated_step_aliases_parameters_and_state():
    assert memory().aliased >= memory().parameters + memory().state
    assert memory(donate=False).aliased == 0
    assert memory(donate=False).peak > memory().peak


def test_outputs_are_parameters_state_and_loss():
    found = memory()
    # XLA adds at most one pointer for each output and the tuple of them.
    assert 0 <= found.outputs - (found.parameters + found.state + 4) <= 8 * 8


def test_a_larger_batch_needs_more():
    small, large = memory(), memory(rows=1024)
    assert large.batch == 64 * small.batch
    # The hidden layer has the shape of the batch and is kept for the backward pass.
    assert large.temporaries - small.temporaries >= large.batch - small.batch
    # Beside it only gradients are temporary: not the state, which is in the arguments.
    assert small.temporaries < small.parameters + small.state
    assert large.state == small.state


def test_arrays_and_abstract_arrays_agree():
    abstract = jax.eval_shape(lambda: (MODEL, jnp.ones((16, 64))))
    found = diagnostics.training_memory(loss, optax.adam(1e-3), *abstract)
    assert found == memory()
    found = diagnostics.training_memory(loss, optax.adam(1e-3), MODEL, np.ones((16, 64), "f4"))
    assert found == memory()


def test_unused_entries_of_the_batch_count():
    batch = {"x": BATCH, "y": jax.ShapeDtypeStruct((100,), jnp.int32), "key": jax.random.key(0)}
    found = diagnostics.training_memory(lambda p, b: loss(p, b["x"]), optax.sgd(1.0), MODEL, batch)
    assert found.batch == 16 * 64 * 4 + 400 + jax.random.key_data(jax.random.key(0)).nbytes
    assert found.arguments == found.parameters + found.state + found.batch


def test_sharded_parameters_count_their_shard():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(MODEL, sharding)
    batch = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=everywhere)
    found = diagnostics.training_memory(loss, optax.sgd(1.0), params, batch)
    assert found.parameters == WEIGHTS // 4
    assert found.arguments == found.parameters + found.state + found.batch


def test_a_transformation_that_asks_for_the_loss():
    tx = optax.chain(optax.sgd(1.0), optax.contrib.reduce_on_plateau())
    assert diagnostics.training_memory(loss, tx, MODEL, BATCH).parameters == WEIGHTS


def test_table_in_mib():
    found = diagnostics.TrainingMemory(2**20, 2**21, 0, 3 * 2**20, 3 * 2**20, 3 * 2**20, 2**19, 0)
    rows = dict(line.rsplit(maxsplit=1) for line in str(found).splitlines()[1:])
    assert {name.strip(): value for name, value in rows.items()} == {
        "arguments": "3.00", "parameters": "1.00", "state": "2.00", "batch": "0.00",
        "outputs": "3.00", "aliased": "3.00", "temporaries": "0.50", "peak": "3.50",
        "generated code": "0.00",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        (lambda p, x: x @ p["w"], r"float32\[16, 64\]"),
        (lambda p, x: (loss(p, x), x), "tuple"),
        (lambda p, x: jnp.zeros((), int), r"int\d+\[\]"),
        (lambda p, x: loss(p, x) * 1j, r"complex\d+\[\]"),
        (lambda p, x: None, "NoneType"),
    ],
    ids=["matrix", "aux", "integer", "complex", "none"],
)
def test_the_loss_must_be_a_scalar(bad, found):
    with pytest.raises(TypeError, match=rf"must return a real floating scalar, got {found}$"):
        diagnostics.training_memory(bad, optax.sgd(1.0), MODEL, BATCH)


def test_integer_parameters_are_refused_by_name():
    with pytest.raises(TypeError, match="parameter 'steps' has dtype int32"):
        diagnostics.training_memory(
            lambda p, x: loss(p, x),
            optax.sgd(1.0),
            {**MODEL, "steps": jnp.zeros((), jnp.int32)},
            BATCH,
        )
