"""Blocks of leaves: layers are found under any nesting, and what they save."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import jaxopt_lab
from jaxopt_lab.subspace._layers import layers_of

SIX = {f"layers_{i}": {"up": jnp.zeros((32, 32))} for i in range(6)}
LAYER = {
    "attn/q/kernel": (8, 8),
    "attn/o/kernel": (8, 8),
    "mlp/Dense_0/kernel": (8, 32),
    "mlp/Dense_1/kernel": (32, 8),
    "norm_1/scale": (8,),
    "norm_2/scale": (8,),
}


def found(leaves: dict[str, tuple[int, ...]]) -> list[str]:
    return list(dict.fromkeys(layers_of(list(leaves), list(leaves.values()))))


@pytest.mark.parametrize(
    "params",
    [
        SIX,
        {"decoder": SIX},
        {"gpt2": SIX},
        {"Transformer_0": SIX},
        {"t5": {"encoder": SIX}},
        {"model": {"h": [{"up": jnp.zeros((32, 32))} for _ in range(6)]}},
        {f"model.layers.{i}.up.weight": jnp.zeros((32, 32)) for i in range(6)},
        {"conv2d": {"v1": SIX}},
        {f"stage{i}": {f"block{j}": {"up": jnp.zeros((32, 32))} for j in (1, 2)} for i in range(3)},
    ],
    ids=["bare", "decoder", "gpt2", "Linen", "t5", "list", "torch", "digits", "stages"],
)
def test_badam_keeps_the_moments_of_one_layer(params):
    state = jaxopt_lab.state_bytes(jaxopt_lab.badam(1e-3), params)
    # 8 bytes a parameter for a sixth of them, and a few for flags and counters.
    assert 8 / 6 <= state.bytes_per_parameter < 1.36


@pytest.mark.parametrize(
    "nesting", ["layers_{}", "decoder/layers_{}", "gpt2/h/{}", "Transformer_0/Block_{}", "v1/b{}"]
)
def test_a_layer_is_the_outermost_that_repeats(nesting):
    layers = [nesting.format(i) for i in range(3)]
    leaves = {f"{layer}/{name}": shape for layer in layers for name, shape in LAYER.items()}
    outside = {"embed/table": (99, 8), "decoder/norm/scale": (8,), "decoder/norm/bias": (8,)}
    assert found(leaves | outside) == [*layers, "embed", "decoder/norm"]
    boxed = {f"{name}/value": shape for name, shape in leaves.items()}
    assert found(boxed) == layers


def test_blocks_of_stages_that_are_not_alike():
    leaves = {"conv1/bias": (4,), "fc/weight": (10, 32)}
    for stage in (1, 2, 3):
        for block in (0, 1):
            size = 4 * 2**stage
            first = size if block else size // 2
            leaves[f"layer{stage}/{block}/conv1/weight"] = (3, 3, first, size)
            leaves[f"layer{stage}/{block}/bn1/scale"] = (size,)
            leaves[f"layer{stage}/{block}/bn2/scale"] = (size,)
    blocks = [f"layer{stage}/{block}" for stage in (1, 2, 3) for block in (0, 1)]
    assert found(leaves) == ["conv1", "fc", *blocks]


def test_two_kinds_of_sublayers_are_one_layer():
    leaves = {}
    for i in range(3):
        leaves[f"encoder/block/{i}/layer/0/SelfAttention/q"] = (8, 8)
        leaves[f"encoder/block/{i}/layer/1/Dense/wi"] = (8, 32)
    assert found(leaves) == [f"encoder/block/{i}" for i in range(3)]


def test_stacks_are_blocks_of_their_own():
    leaves = {"layers/up": (6, 8, 8), "layers/down": (6, 8, 8), "embed/table": (9, 8)}
    assert found(leaves) == ["layers/up", "layers/down", "embed"]


def test_numbers_without_siblings_are_names():
    assert found({"conv2d/kernel": (3, 3), "conv2d/bias": (3,), "v1/w": (3, 3)}) == ["conv2d", "v1"]
    assert found({"w": (3, 3)}) == ["w"]


def test_a_bare_array_is_a_block():
    tx = jaxopt_lab.badam(0.1)
    x = jnp.ones((2, 3))
    updates, _ = tx.update(x, tx.init(x), x)
    assert jax.tree.leaves(updates)[0].shape == (2, 3)
