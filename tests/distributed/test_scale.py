"""A model of 1B parameters on 3,072 TPU chips and on 32 GPUs, as their compilers see it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab.distributed import (
    compiled_collectives,
    device_replicas,
    noloco,
    one_bit_adam,
)
from jaxopt_lab.distributed.replicas import TrainState, shared_counters
from pallas_kernels import targets
from tests.distributed.modes import AXIS
from tests.pallas_kernels.targets import needs

PARAMS = {
    "layers": jax.ShapeDtypeStruct((20, 12, 2048, 2048), jnp.bfloat16),
    "norms": jax.ShapeDtypeStruct((20, 2048), jnp.float32),
}
SIZE = sum(np.prod(leaf.shape) for leaf in PARAMS.values())
METHODS = {
    "one_bit_adam": lambda: one_bit_adam(1e-4, 1000, AXIS),
    "noloco": lambda: noloco(optax.adam(1e-4, mu_dtype=jnp.float32), axis_name=AXIS),
}
MACHINES = [("v5p", "v5p:16x16x12", 3072), ("h200", "1x4x8", 32)]


def loss(params, batch):
    """Something with a gradient; the model itself is not what is measured."""
    total = sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in params.values())
    return total * batch


def compiled(method, chip, topology):
    replicas = device_replicas(devices=list(targets.abstract_devices(chip, topology)))
    mesh: Any = replicas.mesh
    tx = METHODS[method]()
    copies = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((replicas.count, *x.shape), x.dtype), PARAMS
    )
    init = jax.vmap(tx.init, axis_name=AXIS, axis_size=replicas.count)
    state = TrainState(copies, jax.eval_shape(init, copies))

    def placed(shared, leaf):
        spec, shape = (jax.P(), leaf.shape[1:]) if shared else (jax.P(AXIS), leaf.shape)
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)

    state = jax.tree.map(placed, shared_counters(jax.tree.map(lambda x: x, state)), state)
    batch = placed(False, jax.ShapeDtypeStruct((replicas.count,), jnp.float32))
    return replicas.train_step(loss, tx).lower(state, batch).compile()


# Bytes a parameter on one chip: parameters, state and gradients' place among the arguments, and the
# temporaries. One-bit Adam has m, v and the worker's error in float32 (and a part of the server's);
# its vectors are copies of all leaves in float32, and a TPU keeps bytes in words of four.
ARGUMENTS = {"one_bit_adam": 2 + 12.2, "noloco": 2 + 14.1}
TEMPORARIES = {
    ("v5p", "one_bit_adam"): 53,
    ("h200", "one_bit_adam"): 20,
    ("v5p", "noloco"): 13,
    ("h200", "noloco"): 25,
}
SIGNS = -(-SIZE // 8)  # bytes of one bit an entry, without padding


@pytest.mark.parametrize(
    ("chip", "method", "topology", "replicas"),
    [
        needs.on(chip, method, topology, replicas)
        for chip, topology, replicas in MACHINES
        for method in METHODS
    ],
)
def test_one_step_of_a_billion_parameters(chip, method, topology, replicas):
    program = compiled(method, chip, topology)
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes <= ARGUMENTS[method] * SIZE
    assert memory.temp_size_in_bytes <= TEMPORARIES[chip, method] * SIZE
    found = compiled_collectives(program)
    assert {c.replicas for c in found} == {replicas}
    if method == "noloco":
        # One branch for each of the 31 rounds of the round robin, or of the 32 random matchings,
        # with one permute for each of two leaves.
        branches = min(replicas - 1, 32)
        assert [c.kind for c in found] == ["permute"] * 2 * branches
        assert sum(c.payload_bytes for c in found) == branches * 4 * SIZE
        return
    # The warm-up's mean, in float32, is the only large message that is not of bits: one to those
    # who average, one from them. The TPU's compiler makes an all-reduce of the second, whose
    # payload then is the whole vector.
    warm_up = [c for c in found if c.payload_bytes >= SIZE]
    assert [(c.kind, c.payload_bytes) for c in warm_up] == [("all-reduce", 4 * SIZE)]
    by_kind = {"all-reduce": 0, "all-gather": 0, "all-to-all": 0}
    for c in found:
        by_kind[c.kind] += 0 if c in warm_up else c.payload_bytes
    padding = replicas + 8  # the vector is padded to a multiple of 8 N entries; and the scales
    assert SIGNS <= by_kind["all-to-all"] <= SIGNS + padding
    if chip == "v5p":
        assert SIGNS <= by_kind["all-reduce"] <= SIGNS + 9 * padding
    else:
        assert SIGNS <= by_kind["all-gather"] * replicas <= SIGNS + 9 * padding
