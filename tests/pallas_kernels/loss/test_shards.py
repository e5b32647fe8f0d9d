"""The vocabulary over a mesh axis, in simulation and on devices; tokens over devices."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_kernels
from tests.pallas_kernels.loss import cases

PARTS = 4
FEATURES = {
    "plain": ("plain",),
    "everything": (
        "ignored", "bias", "class weights", "label smoothing", "soft cap", "z-loss",
    ),
    "tied": ("tied embedding", "ignored"),
    "in forward": ("gradient in forward", "ignored"),
    "everything in forward": (
        "gradient in forward", "ignored", "bias", "class weights", "label smoothing", "soft cap",
        "z-loss", "sum",
    ),
    "each with lse": ("a loss each", "lse", "z-loss"),
}  # fmt: skip


def problem(features: tuple[str, ...]):
    """Returns a case of 36 classes: its loss of (hidden, weight, bias, labels), and arrays."""
    case = cases.Case(features)
    hidden, weight, labels, bias, weights = case.arrays()
    axis = case.options().get("vocabulary_axis", 1)
    weight = np.delete(weight, 36, axis)
    bias = np.zeros(36, np.float32) if bias is None else bias[:36]
    weights = np.ones(36, np.float32) if weights is None else weights[:36]
    labels = np.where(labels == 36, 3, labels)

    def loss(hidden, weight, bias, weights, labels, **more):
        out = pallas_kernels.cross_entropy(
            hidden, weight, labels, bias, class_weights=weights, block_vocabulary=4,
            **case.options(), **more,
        )  # fmt: skip
        factors = (np.cos(np.arange(x.size)).reshape(x.shape) for x in jax.tree.leaves(out))
        terms = zip(jax.tree.leaves(out), factors)
        return sum(jnp.sum(x * f.astype(np.float32)) for x, f in terms)

    return loss, (hidden, weight, bias, weights, labels), axis


def agree(found, wanted):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        # Rounding of sums of up to 66 terms of order 1, in another order.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_parts_in_a_vmap_are_the_whole(features):
    loss, args, axis = problem(features)
    wanted = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*args)

    def parts(x, axis):
        return np.stack(np.split(x, PARTS, axis))

    def in_parts(hidden, weight, bias):
        part = functools.partial(loss, axis_name="v")
        each: Any = jax.vmap(part, (None, 0, 0, 0, None), axis_name="v")
        return each(hidden, weight, bias, parts(args[3], 0), args[4])[0]

    hidden, weight, bias = args[0], parts(args[1], axis), parts(args[2], 0)
    value, slopes = jax.jit(jax.value_and_grad(in_parts, (0, 1, 2)))(hidden, weight, bias)
    whole = np.concatenate(list(slopes[1]), axis)
    agree((value, (slopes[0], whole, slopes[2].reshape(-1))), wanted)


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
def test_parts_on_devices_are_the_whole(features, check):
    loss, args, axis = problem(features)
    wanted = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(*args)
    mesh = Mesh(np.array(jax.devices()[:PARTS]), ("v",))
    of_weight = P(None, "v") if axis == 1 else P("v")
    sharded = jax.shard_map(
        functools.partial(loss, axis_name="v"),
        mesh=mesh,
        in_specs=(P(), of_weight, P("v"), P("v"), P()),
        out_specs=P(),
        check_vma=check,
    )
    agree(jax.jit(jax.value_and_grad(sharded, (0, 1, 2)))(*args), wanted)


@pytest.mark.parametrize("features", [FEATURES["plain"], FEATURES["in forward"]], ids=str)
def test_tokens_and_classes_over_two_axes(features):
    loss, args, _ = problem((*features, "sum"))
    args = (np.concatenate([args[0]] * 2), *args[1:4], np.concatenate([args[4]] * 2))
    wanted = jax.jit(jax.value_and_grad(loss, (0, 1)))(*args)
    mesh = Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("d", "v"))

    def local(*args):
        return jax.lax.psum(loss(*args, axis_name="v"), "d")

    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("d"), P(None, "v"), P("v"), P("v"), P("d")),
        out_specs=P(),
    )
    agree(jax.jit(jax.value_and_grad(sharded, (0, 1)))(*args), wanted)


@pytest.mark.parametrize("in_forward", [False, True])
def test_a_sharded_batch_stays_where_it_is(in_forward):
    draw = np.random.default_rng(0)
    hidden = draw.normal(size=(8, 16, 6)).astype(np.float32)
    weight = draw.normal(size=(6, 64)).astype(np.float32)
    labels = draw.integers(0, 64, (8, 16))
    plan = {"gradient_in_forward": True, "block_tokens": 32} if in_forward else {}
    fn = functools.partial(pallas_kernels.cross_entropy, block_vocabulary=16, **plan)
    program = jax.jit(jax.value_and_grad(fn, (0, 1)))
    mesh = Mesh(np.array(jax.devices()[:4]), ("d",))
    batch = NamedSharding(mesh, P("d"))
    args = (
        jax.device_put(hidden, batch),
        jax.device_put(weight, NamedSharding(mesh, P())),
        jax.device_put(labels, batch),
    )
    text = program.lower(*args).compile().as_text() or ""
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in text
    agree(program(*args), program(hidden, weight, labels))


def test_an_axis_that_is_not_there_is_named():
    loss, args, _ = problem(("plain",))
    with pytest.raises(ValueError, match="axis_name='model' is no axis here"):
        loss(*args, axis_name="model")
