"""Starts by the names of peft, and the ranks that they allow."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import adapters
from tests.adapters import models

KEY = jax.random.key(0)
PARAMS = {"w": models.draw(1, 6, 9), "embed": {"embedding": models.draw(2, 300, 6)}}


def start(name, init=None, key=KEY, targets=("w",), **changes):
    config = adapters.LoraConfig(
        target_modules=list(targets), **{"r": 4, "init_lora_weights": name} | changes
    )
    return adapters.init_adapters(PARAMS, config, key, init=init)


@pytest.mark.parametrize(
    ("name", "init"),
    [
        ("pissa", adapters.pissa("full")),
        ("olora", adapters.olora()),
        ("pissa_niter_4", adapters.pissa("randomized", power_iterations=4)),
    ],
)
def test_a_start_that_the_kernel_gives_is_had_by_its_name(name, init):
    base, factors = start(name)
    expected_base, expected = start(True, init)
    for one, other in zip(*map(jax.tree.leaves, ((base.params, factors),
                                                 (expected_base.params, expected)))):  # fmt: skip
        np.testing.assert_array_equal(one, other)
    assert base.gave_up
    assert not start(True)[0].gave_up
    with pytest.raises(ValueError, match="a PerpConfig has no computed start"):
        adapters.init_adapters(
            PARAMS, adapters.PerpConfig(target_modules=["w"], r=2, init_lora_weights=name), KEY
        )


def test_false_leaves_both_factors_random():
    base, factors = start(False, targets=("w", "embedding"))
    a, b = (factors["w"][name] for name in ("lora_a", "lora_b"))
    assert 0.5 / math.sqrt(6) < np.abs(a).max() <= 1 / math.sqrt(6)
    assert 0.5 / math.sqrt(4) < np.abs(b).max() <= 1 / math.sqrt(4)
    table = factors["embed"]["embedding"]["lora_a"]
    assert np.std(table) == pytest.approx(1, abs=0.15)  # 1200 draws of variance one
    assert not base.gave_up
    assert np.abs(adapters.apply_adapters(base, factors)["w"] - PARAMS["w"]).max() > 0.01


@pytest.mark.parametrize("name", [True, "gaussian"])
def test_what_is_looked_up_starts_at_zero(name):
    params = {
        "wte": {"weight": jnp.ones((9, 4))},
        "embed": {"embedding": jnp.ones((9, 4))},
        "embedding": {"kernel": jnp.ones((9, 4))},
    }
    config = adapters.LoraConfig(target_modules=["wte", "embedding"], r=2, init_lora_weights=name)
    _, factors = adapters.init_adapters(params, config, KEY)
    for table in (factors["wte"]["weight"], factors["embed"]["embedding"]):
        assert not table["lora_a"].any()
        assert table["lora_b"].any()
    # A dense layer of that name is multiplied with its inputs.
    assert factors["embedding"]["kernel"]["lora_a"].any()
    assert not factors["embedding"]["kernel"]["lora_b"].any()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eva", r"'eva' is no start by name here: it needs activations.*adapters\.eva\("),
        ("corda", r"'corda' is no start .*init=adapters\.corda\("),
        ("lora_ga", r"'lora_ga' is no start .*init=adapters\.lora_ga\("),
        ("loftq", r"'loftq' is no start .*quantised base.*'pissa'"),
        ("mica", r"'mica' is no start .*frozen"),
        ("pisa", r"got 'pisa'; the nearest is 'pissa'"),
        ("pissa_niter_x", r"got 'pissa_niter_x'; the nearest is 'pissa_niter_16'"),
        ("orthogonl", r"got 'orthogonl'; the nearest is 'orthogonal'"),
    ],
)
def test_other_starts_are_refused_with_the_way_that_there_is(name, message):
    with pytest.raises(ValueError, match=message):
        adapters.LoraConfig(target_modules=["w"], init_lora_weights=name)


@pytest.mark.parametrize("value", [None, 1])
def test_a_start_is_a_flag_or_a_name(value):
    with pytest.raises(TypeError, match=f"init_lora_weights must be True, False.*got {value}"):
        adapters.LoraConfig(target_modules=["w"], init_lora_weights=value)


@pytest.mark.slow
def test_ranks_above_the_smaller_side_are_for_starts_that_are_drawn():
    for name in (True, False, "gaussian", "orthogonal"):
        base, factors = start(name, r=16)
        assert factors["w"]["lora_a"].shape == (6, 16)
        if name not in (True, "orthogonal"):
            continue
        new = jax.tree.map(lambda x: x + 0.1, factors)
        found = adapters.apply_adapters(base, new)["w"]
        expected = PARAMS["w"] + new["w"]["lora_a"] @ new["w"]["lora_b"] / 2
        np.testing.assert_allclose(found, expected, 1e-5, 1e-5)
        split = adapters.factored(lambda p: jnp.eye(6) @ p["w"])(base, new)
        np.testing.assert_allclose(split, expected, 1e-5, 1e-5)
    for name in ("pissa", "pissa_niter_2", "olora"):
        with pytest.raises(ValueError, match=r"rank 16 is above .* 'w'.*at most 6 directions"):
            start(name, r=16)
    for init in (adapters.lora_ga({"w": PARAMS["w"]}), adapters.corda({"w": jnp.eye(6)[None]})):
        with pytest.raises(ValueError, match="rank 16 is above the smaller side"):
            start(True, init, r=16)
    # Twice the rank, as of a converted start.
    base, first = start("pissa", r=5)
    plain, factors = adapters.to_plain_lora(base, first, first)
    again, _ = adapters.init_adapters(PARAMS, plain.config, KEY)
    assert again.kernels == plain.kernels
    adapters.apply_adapters(again, factors)
