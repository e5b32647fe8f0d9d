"""Adapters joined here are those that `peft` joins, and its dropout and its choice of leaves.

Needs the extra `test-peft`, which has an environment of its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import adapters

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

NAMES = ("first", "second")


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(7, 6)
        self.first = torch.nn.Linear(6, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.second = torch.nn.Linear(8, 5, bias=False)
        self.head = torch.nn.Linear(5, 3)


def model():
    torch.manual_seed(0)
    return Model()


def parameters(module):
    """Its weights here."""

    def dense(layer):
        found = {"kernel": jnp.asarray(layer.weight.detach().numpy().T)}
        if layer.bias is not None:
            found["bias"] = jnp.asarray(layer.bias.detach().numpy())
        return found

    norm = {"scale": module.norm.weight, "bias": module.norm.bias}
    return {
        "embed": {"embedding": jnp.asarray(module.embed.weight.detach().numpy())},
        "norm": {name: jnp.asarray(x.detach().numpy()) for name, x in norm.items()},
        **{name: dense(getattr(module, name)) for name in (*NAMES, "head")},
    }


CONFIGS = {
    "one": {"r": 2, "lora_alpha": 6, "target_modules": ["first", "second"]},
    "two": {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": ["first", "second"],
            "rank_pattern": {"second": 3}},
}  # fmt: skip
WEIGHTS = [0.7, 0.4]


def trained():
    """A model of peft with two adapters, and both here."""
    theirs: Any = None
    for name, fields in CONFIGS.items():
        config = peft.LoraConfig(init_lora_weights=False, **fields)
        if theirs is None:
            theirs = peft.get_peft_model(model(), config, adapter_name=name)
        else:
            theirs.add_adapter(name, config)
    params, pairs = parameters(model()), []
    for name, fields in CONFIGS.items():
        base, _ = adapters.init_adapters(params, adapters.LoraConfig(**fields), jax.random.key(0))
        own = {}
        for layer in NAMES:
            module = getattr(theirs.base_model.model, layer)
            factors = {"lora_a": module.lora_A[name], "lora_b": module.lora_B[name]}
            factors = {n: jnp.asarray(f.weight.detach().numpy().T) for n, f in factors.items()}
            own[layer] = {"kernel": factors}
        pairs.append((base, own))
    return theirs, pairs


@pytest.mark.parametrize(
    ("combination_type", "rank"), [("cat", None), ("svd", 5), ("svd", 3), ("svd", None)]
)
def test_joined_adapters_are_those_of_peft(combination_type, rank):
    theirs, pairs = trained()
    theirs.add_weighted_adapter(
        list(CONFIGS), WEIGHTS, "joined", combination_type=combination_type, svd_rank=rank
    )
    bases, factors = [base for base, _ in pairs], [own for _, own in pairs]
    base, joined = adapters.join_adapters(bases, factors, WEIGHTS, combination_type, svd_rank=rank)
    found = adapters.apply_adapters(base, joined)
    for layer in NAMES:
        module = getattr(theirs.base_model.model, layer)
        expected = module.get_base_layer().weight + module.get_delta_weight("joined")
        expected = expected.detach().numpy().T
        start = np.asarray(base.params[layer]["kernel"])
        assert np.abs(expected - start).max() > 0.01
        if rank is None and combination_type == "svd" and layer == "second":
            continue  # theirs has the largest rank of any layer, ours the largest of this one
        np.testing.assert_allclose(
            found[layer]["kernel"], expected, 0, 2e-6 * np.abs(expected).max()
        )


@pytest.mark.parametrize(
    "choice",
    [
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["head", "norm"]},
        {"modules_to_save": ["second"], "bias": "all"},
    ],
)
def test_the_leaves_that_are_trained_whole_are_those_of_peft(choice):
    fields = {"r": 2, "target_modules": ["first", "second"]} | choice
    theirs = peft.get_peft_model(model(), peft.LoraConfig(**fields))
    trainable = {
        name.removeprefix("base_model.model.").replace("base_layer.", "")
        for name, x in theirs.named_parameters()
        if x.requires_grad
    }
    kernels = {name.split(".lora_")[0] for name in trainable if ".lora_" in name}
    leaves = {name for name in trainable if ".lora_" not in name}
    leaves = {name.replace("modules_to_save.default.", "") for name in leaves}
    spelled = {"head/kernel": "head.weight", "second/kernel": "second.weight",
               "norm/scale": "norm.weight"}  # fmt: skip
    base, _ = adapters.init_adapters(
        parameters(model()), adapters.LoraConfig(**fields), jax.random.key(0)
    )
    assert {spelled.get(name, name.replace("/", ".")) for name in base.whole} == leaves
    assert {kernel.name.split("/")[0] for kernel in base.kernels} == kernels


def test_dropout_has_the_distribution_of_peft():
    """Means and variances of the outputs over masks, for the same factors."""
    rate, draws = 0.4, 4000
    fields = {"r": 3, "lora_alpha": 6, "target_modules": ["layer"], "lora_dropout": rate}
    torch.manual_seed(1)
    module = torch.nn.Sequential()
    module.add_module("layer", torch.nn.Linear(6, 4))
    theirs = peft.get_peft_model(module, peft.LoraConfig(init_lora_weights=False, **fields)).train()
    layer = theirs.base_model.model.layer
    params = {"layer": {"kernel": jnp.asarray(layer.base_layer.weight.detach().numpy().T)}}
    bias = layer.base_layer.bias.detach().numpy()
    base, _ = adapters.init_adapters(params, adapters.LoraConfig(**fields), jax.random.key(0))
    pair = {"lora_a": layer.lora_A, "lora_b": layer.lora_B}
    factors = {n: jnp.asarray(f["default"].weight.detach().numpy().T) for n, f in pair.items()}
    x = np.random.default_rng(0).normal(size=(draws, 6)).astype(np.float32)
    x[:] = x[0]
    with torch.no_grad():
        expected = theirs(torch.tensor(x)).numpy() - bias
    apply = adapters.factored(lambda p, x: x @ p["layer"]["kernel"])
    found = np.asarray(apply(base, {"layer": {"kernel": factors}}, x, key=jax.random.key(2)))
    # The same 64 values, of which each mask gives one, and each as often.
    values = [np.unique(out.round(3), axis=0) for out in (found, expected)]
    assert values[0].shape == values[1].shape == (64, 4)
    np.testing.assert_allclose(values[0], values[1], 0, 2e-3)
    for statistic in (np.mean, np.std):
        # Five standard deviations of a mean of 4000.
        bound = 5 * np.sqrt(2 / draws) * found.std()
        np.testing.assert_allclose(statistic(found, 0), statistic(expected, 0), 0, bound)
