"""Which kernels are adapted, with which rank and alpha, and names that match none."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxopt_lab import adapters

KEY = jax.random.key(0)
TREE = {
    "encoder": {
        str(i): {n: {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)} for n in ("query", "up")}
        for i in range(3)
    },
    "embed": {"embedding": jnp.ones((9, 4))},
    "lm_head": {"kernel": jnp.ones((4, 9))},
}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"target_modules": ["query"]}, [f"encoder/{i}/query/kernel" for i in range(3)]),
        ({"target_modules": ["encoder.1.up"]}, ["encoder/1/up/kernel"]),
        ({"target_modules": ["encoder/1/up"]}, ["encoder/1/up/kernel"]),
        ({"target_modules": r".*\.[02]\.(query|up)"}, [
            f"encoder/{i}/{n}/kernel" for i in (0, 2) for n in ("query", "up")
        ]),
        ({"target_modules": "all-linear", "exclude_modules": ["query"]}, [
            f"encoder/{i}/up/kernel" for i in range(3)
        ]),
        ({"target_modules": "all-linear", "layers_to_transform": [1]}, [
            "encoder/1/query/kernel", "encoder/1/up/kernel"
        ]),
        ({"target_modules": ["up"], "layers_to_transform": 2, "layers_pattern": "encoder"}, [
            "encoder/2/up/kernel"
        ]),
        ({"target_modules": ["embed"]}, ["embed/embedding"]),
    ],
)  # fmt: skip
def test_kernels_are_chosen_by_name(arguments, expected):
    kernels = adapters.LoraConfig(r=2, **arguments).kernels(TREE)
    assert [kernel.name for kernel in kernels] == expected


def test_ranks_and_alphas_by_pattern():
    lora = adapters.LoraConfig(
        target_modules=["query", "up"],
        r=2,
        lora_alpha=4,
        rank_pattern={"query": 1, r"2\.up": 4},
        alpha_pattern={"encoder.0.query": 8},
    )
    found = {k.name: (k.r, k.scaling) for k in lora.kernels(TREE)}
    assert found["encoder/0/query/kernel"] == (1, 8)
    assert found["encoder/1/query/kernel"] == (1, 4)
    assert found["encoder/1/up/kernel"] == (2, 2)
    assert found["encoder/2/up/kernel"] == (4, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target_modules": ["quary"]}, r"'quary' matches no kernel.*encoder\.0\.query"),
        ({"target_modules": ".*qry"}, r"'\.\*qry' matches no kernel"),
        ({"target_modules": ["p"]}, "'p' matches no kernel"),  # up ends with it, but in a word
        ({"target_modules": ["up"], "rank_pattern": {"p": 1}}, "rank_pattern: 'p'"),
        ({"target_modules": ["up"], "exclude_modules": ["upp"]}, "exclude_modules: 'upp'"),
        ({"target_modules": ["up"], "exclude_modules": ["up"]}, "no kernel is left"),
        ({"target_modules": ["up"], "rank_pattern": {"query": 1}}, "rank_pattern: 'query'"),
        ({"target_modules": ["up"], "alpha_pattern": {"q": 1}}, "alpha_pattern: 'q'"),
        ({"target_modules": ["up"], "r": 0}, "r must be a positive integer"),
        ({"target_modules": ["up"], "lora_alpha": 0}, "lora_alpha must be positive"),
    ],
)
def test_bad_configs(arguments, message):
    with pytest.raises(ValueError, match=message):
        adapters.init_adapters(TREE, adapters.LoraConfig(**{"r": 2} | arguments), KEY)
