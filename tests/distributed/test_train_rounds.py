"""Whole rounds as one program: the numbers of single steps, and where the exchange's state is."""

from __future__ import annotations

import re
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh

from jaxopt_lab.distributed import (
    co2_exchange,
    device_replicas,
    diloco_exchange,
    gossip_exchange,
    local_updates,
    noloco_exchange,
    simulated_replicas,
    train_rounds,
)
from jaxopt_lab.distributed.replicas import shared_counters
from pallas_kernels import targets
from tests.distributed.modes import AXIS
from tests.pallas_kernels.targets import needs

PARAMS = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
ROUNDS, H = 4, 3
BATCHES = np.random.default_rng(0).normal(size=(ROUNDS, 4, H, 5, 3)).astype(np.float32)
KINDS = {
    "devices": lambda: device_replicas(devices=jax.devices()[:4]),
    "simulated": lambda: simulated_replicas(4),
}
EXCHANGES = {
    "diloco": lambda: diloco_exchange(axis_name=AXIS),
    "noloco": lambda: noloco_exchange(axis_name=AXIS),
    "co2": lambda: co2_exchange(axis_name=AXIS),
    "gossip": lambda: gossip_exchange(axis_name=AXIS),
}
MEMORY_KINDS = ("device", "pinned_host")


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch @ params["w"]) + params["b"] - 0.5) ** 2)


def make(replicas, method="diloco", memory_kind: Any = "device", **options):
    return train_rounds(
        replicas, options.pop("loss", loss), optax.adam(1e-2), EXCHANGES[method](), H,
        exchange_memory_kind=memory_kind, **options,
    )  # fmt: skip


def trained(replicas, rounds, state=None, batches=BATCHES):
    state = rounds.init(PARAMS) if state is None else state
    losses = []
    for batch in batches:
        state, value = rounds.step(state, replicas.shard(batch))
        losses.append(np.asarray(value))
    return state, np.concatenate([np.empty((4, 0)), *losses], axis=1)


def single_steps(replicas, method):
    tx = local_updates(optax.adam(1e-2), EXCHANGES[method](), H)
    state, step, losses = replicas.init(tx, PARAMS), replicas.train_step(loss, tx), []
    for batch in BATCHES.swapaxes(1, 2).reshape(ROUNDS * H, 4, 5, 3):
        state, value = step(state, replicas.shard(batch))
        losses.append(np.asarray(value))
    return state, np.stack(losses, axis=1)


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", EXCHANGES)
def test_a_round_is_its_steps(kind, method):
    replicas = KINDS[kind]()
    expected, expected_losses = single_steps(replicas, method)
    by_memory = [trained(replicas, make(replicas, method, memory)) for memory in MEMORY_KINDS]
    assert_equal(*by_memory)
    for found, losses in by_memory:
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        # An update of a single step leads to the target but for the rounding of one sum, which
        # Adam's division by small moments enlarges.
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-6)


def kinds_of_memory(state):
    """Pairs: whether an array is more than a scalar for each replica, and where it is."""
    return {(leaf.ndim > 1, leaf.sharding.memory_kind) for leaf in jax.tree.leaves(state)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", EXCHANGES)
def test_the_state_of_the_exchange_stays_on_the_host(kind, method):
    replicas = KINDS[kind]()
    rounds = make(replicas, method, "pinned_host")
    for batches in (BATCHES[:0], BATCHES[:1]):
        state = trained(replicas, rounds, batches=batches)[0]
        own, inner = kinds_of_memory(state.params), kinds_of_memory(state.opt_state.inner_state)
        assert own == {(True, "device")}
        assert inner == {(True, "device"), (False, "device")}
        found = kinds_of_memory(state.opt_state.exchange_state)
        assert found <= {(True, "pinned_host"), (False, "device")}
        assert method == "gossip" or (True, "pinned_host") in found  # gossip keeps a counter only


@pytest.mark.parametrize("memory", MEMORY_KINDS)
def test_a_run_resumes_with_the_same_bits(memory):
    replicas = KINDS["devices"]()
    rounds = make(replicas, "co2", memory)
    whole, _ = trained(replicas, rounds)
    half, _ = trained(replicas, rounds, batches=BATCHES[:2])
    copies = jax.tree.map(np.asarray, half)
    resumed, _ = trained(replicas, rounds, copies, BATCHES[2:])
    assert_equal(resumed, whole)


def test_has_aux():
    replicas = KINDS["simulated"]()
    rounds = make(
        replicas, has_aux=True, loss=lambda params, batch: (loss(params, batch), batch.shape[0])
    )
    _, (losses, sizes) = rounds.step(rounds.init(PARAMS), replicas.shard(BATCHES[0]))
    assert losses.shape == sizes.shape == (4, H)
    assert np.all(np.asarray(sizes) == 5)


def programs(rounds, replicas):
    traced = jax.make_jaxpr(rounds.step)(rounds.init(PARAMS), replicas.shard(BATCHES[0])).jaxpr
    return [e for e in traced.eqns if e.primitive.name in ("jit", "pjit")
            and e.params["name"] in ("one_round", "begin", "steps", "finish")]  # fmt: skip


@pytest.mark.parametrize("method", EXCHANGES)
def test_the_local_steps_have_nothing_of_the_host_s(method):
    """They are a program of their own, whose arguments are not the exchange's."""
    replicas = KINDS["devices"]()
    begin, steps, finish = programs(make(replicas, method, "pinned_host"), replicas)
    assert [e.params["name"] for e in (begin, steps, finish)] == ["begin", "steps", "finish"]
    assert not set(steps.invars) & (set(begin.invars) | set(begin.outvars))
    on_host = [v for v in finish.invars if "host" in str(v.aval)]
    assert bool(on_host) == (method != "gossip")
    assert not any("host" in str(v.aval) for v in (*steps.invars, *steps.outvars))


def test_co2_averages_beside_the_steps():
    """No step of the round is among what the all-reduce waits for, nor the reverse."""
    replicas = KINDS["devices"]()
    rounds = make(replicas, "co2")
    (program,) = programs(rounds, replicas)
    eqns = program.params["jaxpr"].jaxpr.eqns
    begin, steps, finish = [e for e in eqns if e.primitive.name == "shard_map"]
    assert "psum" in str(begin.params["jaxpr"])
    assert "scan" in str(steps.params["jaxpr"])
    assert not set(steps.invars) & set(begin.outvars)
    assert set(finish.invars) >= set(begin.outvars)


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="runs it before the steps")
@pytest.mark.parametrize("chip", [needs.on("h200")])
def test_the_compiler_lets_the_all_reduce_run_beside_the_steps(chip):
    replicas = device_replicas(devices=list(targets.abstract_devices(chip, "1x4x2")))
    rounds, mesh = make(replicas, "co2"), cast(Mesh, replicas.mesh)

    def placed(shared, leaf):
        spec = jax.P() if shared else jax.P(AXIS)
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(make(simulated_replicas(replicas.count), "co2").init, PARAMS)
    state = jax.tree.map(placed, shared_counters(state), state)
    batches = placed(False, jax.ShapeDtypeStruct((replicas.count, H, 5, 3), jnp.float32))
    text = str(jax.jit(rounds.step).lower(state, batches).compile().as_text())
    order = re.findall(r"\b(while|all-reduce-start|all-reduce-done)\(", text[text.index("ENTRY") :])
    assert order.index("all-reduce-start") < order.index("while") < order.index("all-reduce-done")


def test_bad_input():
    replicas = KINDS["simulated"]()
    with pytest.raises(ValueError, match=r"exchange_memory_kind must be one of .*, got 'disk'"):
        make(replicas, memory_kind="disk")
    with pytest.raises(ValueError, match=r"over axis 'replica', .* on axis 'other'"):
        make(simulated_replicas(4, "other"))
    with pytest.raises(ValueError, match="sync_every"):
        train_rounds(replicas, loss, optax.sgd(1.0), EXCHANGES["diloco"](), 0)
    with pytest.raises(TypeError, match="exchange must be an Exchange"):
        train_rounds(replicas, loss, optax.sgd(1.0), optax.sgd(1.0), 2)  # pyright: ignore
    rounds = make(replicas)
    state = rounds.init(PARAMS)
    with pytest.raises(ValueError, match=r"batch 'x' has shape \(4, 2, 5, 3\); .* 3 local"):
        rounds.step(state, {"x": jnp.ones((4, 2, 5, 3))})
    with pytest.raises(TypeError, match="LocalUpdatesState"):
        rounds.step(state._replace(opt_state=()), jnp.ones((4, H, 5, 3)))
