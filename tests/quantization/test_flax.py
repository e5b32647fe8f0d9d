"""Compact states in what Flax does with states: modules, boxes, bytes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxopt_lab import quantization

CODECS = {"int8": quantization.int8(16), "bfloat16": quantization.bfloat16()}
ADAMW = optax.adamw(1e-2)


def quantized(codec) -> Any:
    return quantization.quantize_state(ADAMW, CODECS[codec], min_size=32)


def loss(model, x):
    return jnp.mean((model(x) - 1) ** 2)


def arrays(tree):
    return [np.asarray(x) for x in jax.tree.leaves(nnx.as_pure(tree))]


@pytest.mark.parametrize("codec", CODECS)
def test_nnx_optimizer_does_what_the_pure_loop_does(codec):
    x = jnp.linspace(-1, 1, 16).reshape(2, 8)
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, quantized(codec), wrt=nnx.Param)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    state = quantized(codec).init(params)
    graph = nnx.graphdef(model)
    structure = jax.tree.structure(nnx.as_pure(optimizer.opt_state))
    assert structure == jax.tree.structure(state)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model, x))

    @jax.jit
    def pure(params, state):
        grads = jax.grad(lambda p: loss(nnx.merge(graph, p), x))(params)
        updates, state = quantized(codec).update(nnx.as_pure(grads), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        step(model, optimizer)
        params, state = pure(params, state)
    assert jax.tree.structure(nnx.as_pure(optimizer.opt_state)) == structure
    for a, b in zip(arrays(optimizer.opt_state), arrays(state), strict=True):
        assert a.dtype == b.dtype
        # Two programs round sums in two orders: an entry between two codes may get the other.
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=1.01)
    for a, b in zip(arrays(nnx.state(model, nnx.Param)), arrays(params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert loss(model, x) < 0.9 * loss(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), x)


@pytest.mark.parametrize("pure", [True, False], ids=["arrays", "variables"])
def test_the_state_in_an_nnx_optimizer_is_encoded_and_decoded(pure):
    tx, model = quantized("int8"), nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    plain, compact, again = (nnx.Optimizer(model, t, wrt=nnx.Param) for t in (ADAMW, tx, ADAMW))
    grads = nnx.grad(loss)(model, jnp.ones((2, 8)))
    plain.update(model, grads)
    params = nnx.state(model, nnx.Param)
    params = nnx.as_pure(params) if pure else params

    structure = jax.tree.structure(compact.opt_state)
    found = quantization.encode_state(tx, plain.opt_state, params)
    nnx.update(compact.opt_state, nnx.state(found))
    assert jax.tree.structure(compact.opt_state) == structure
    expected = quantization.encode_state(
        tx, nnx.as_pure(plain.opt_state), nnx.as_pure(nnx.state(model, nnx.Param))
    )
    for a, b in zip(arrays(compact.opt_state), arrays(expected), strict=True):
        np.testing.assert_array_equal(a, b)

    back = quantization.decode_state(tx, compact.opt_state, params)
    nnx.update(again.opt_state, nnx.state(back))
    assert again.opt_state[0].count[...] == 1
    for a, b in zip(arrays(again.opt_state), arrays(plain.opt_state), strict=True):
        # The dynamic code's cells are at most a 28th of a number; blocks of 16 are one row here.
        np.testing.assert_allclose(a, b, rtol=0.1, atol=1e-2 * float(np.abs(b).max()))
    again.update(model, grads)


def test_codecs_by_path_have_the_same_paths_in_nnx():
    seen = set()

    def choose(path, leaf):
        seen.add((path, leaf.shape))
        return CODECS["int8"] if path.endswith("mu/kernel") else None

    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    tx = quantization.quantize_state(ADAMW, choose, min_size=32)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss)(model, jnp.ones((2, 8))))
    assert seen == {("0/mu/kernel", (8, 16)), ("0/nu/kernel", (8, 16))}


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS)
def test_nnx_with_names_of_mesh_axes(codec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2)
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("x", "y"))
    with jax.set_mesh(mesh):
        model = nnx.Linear(8, 32, kernel_init=init, rngs=nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, quantized(codec), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer):
            value, grads = nnx.value_and_grad(loss)(model, jnp.ones((2, 8)))
            optimizer.update(model, grads)
            return value

        first, _, last = (step(model, optimizer) for _ in range(3))
    codes = optimizer.opt_state.inner_state[0].mu["kernel"].get_value()
    assert codes.shape == (8, 32)
    assert codes.sharding.shard_shape(codes.shape) == (2, 16)
    assert last < first


@pytest.mark.parametrize("codec", CODECS)
def test_boxes_of_linen_place_codes_like_the_parameter(codec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), (AxisType.Auto,) * 2)
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("x", "y"))
    model: Any = nn.Dense(32, kernel_init=kernel_init)
    x = jnp.ones((2, 8))
    tx = quantized(codec)

    def make():
        params = model.init(jax.random.key(0), x)
        return params, tx.init(params)

    places = nn.get_sharding(jax.eval_shape(make), mesh)
    params, state = jax.jit(make, out_shardings=places)()
    kernel = NamedSharding(mesh, P("x", "y"))
    assert state.inner_state[0].mu["params"]["kernel"].value.sharding == kernel

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(lambda p: jnp.mean((model.apply(p, x) - 1) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    values = []
    for _ in range(3):
        params, state, value = step(params, state)
        values.append(value)
    assert values[2] < values[1] < values[0]


def after_three_steps(codec):
    params = {"w": jnp.linspace(-1, 1, 128).reshape(8, 16), "b": jnp.ones(4)}
    tx = quantized(codec)
    update, state = jax.jit(tx.update), tx.init(params)
    for _ in range(3):
        _, state = update(params, state, params)
    return tx, params, state, update


@pytest.mark.parametrize("codec", CODECS)
def test_bytes_dictionaries_pickles_and_copies(codec):
    tx, params, state, update = after_three_steps(codec)
    target = tx.init(params)
    found = {
        "bytes": serialization.from_bytes(target, serialization.to_bytes(state)),
        "dictionary": serialization.from_state_dict(target, serialization.to_state_dict(state)),
        "pickle": pickle.loads(pickle.dumps(state)),
        "copy": copy.deepcopy(state),
    }
    for name, other in found.items():
        assert jax.tree.structure(other) == jax.tree.structure(state), name
        jax.tree.map(np.testing.assert_array_equal, other, state)
        jax.tree.map(
            np.testing.assert_array_equal,
            update(params, other, params),
            update(params, state, params),
        )


def test_bytes_of_another_code_are_refused():
    """The arrays alone would fit: 8 bits without a sign either way."""
    _, params, state, _ = after_three_steps("int8")
    other = quantization.quantize_state(ADAMW, quantization.int8(8), min_size=32)
    with pytest.raises(ValueError, match=r"Encoding at '.*made with other settings .*block_size=8"):
        serialization.from_bytes(other.init(params), serialization.to_bytes(state))


def test_a_state_of_nnx_goes_through_bytes():
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, quantized("int8"), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(loss)(model, jnp.ones((2, 8))))
    saved = nnx.to_pure_dict(nnx.state(optimizer))
    data = serialization.msgpack_serialize(jax.tree.map(np.asarray, saved))
    assert len(data) > 0
    other = nnx.Optimizer(model, quantized("int8"), wrt=nnx.Param)
    state = nnx.state(other)
    restored: Any = serialization.msgpack_restore(data)
    nnx.replace_by_pure_dict(state, nnx.restore_int_paths(restored))
    nnx.update(other, state)
    for a, b in zip(arrays(other.opt_state), arrays(optimizer.opt_state), strict=True):
        np.testing.assert_array_equal(a, b)
