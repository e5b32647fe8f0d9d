"""An adapter made here gives the same outputs in PyTorch, loaded by `peft`, and the reverse.

Needs the extra `test-peft`, which has an environment of its own.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import adapters

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

VOCABULARY, WIDTH, HEADS, LAYERS, TIME = 11, 16, 2, 2, 5
LINEAR = ("query", "key", "value", "out", "up", "down")
SIZES = dict.fromkeys(LINEAR, (WIDTH, WIDTH)) | {
    "up": (WIDTH, 4 * WIDTH),
    "down": (4 * WIDTH, WIDTH),
}


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for name, (fan_in, fan_out) in SIZES.items():
            setattr(self, f"{name}_proj", torch.nn.Linear(fan_in, fan_out))

    def forward(self, x):
        batch, time, _ = x.shape
        split = (batch, time, HEADS, WIDTH // HEADS)
        q, k, v = (getattr(self, f"{n}_proj")(x).view(split) for n in ("query", "key", "value"))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH // HEADS)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v)
        x = x + self.out_proj(mixed.reshape(x.shape))
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class Transformer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.layers = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = torch.nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens):
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def model():
    torch.manual_seed(0)
    return Transformer()


def parameters(transformer):
    """The same weights here; heads have their own axis."""

    def linear(module):
        weight, bias = (x.detach().numpy() for x in (module.weight, module.bias))
        return {"kernel": jnp.asarray(weight.T), "bias": jnp.asarray(bias)}

    layers = {}
    for index, block in enumerate(transformer.layers):
        layers[str(index)] = {n: linear(getattr(block, f"{n}_proj")) for n in LINEAR}
        for name in ("query", "key", "value"):
            dense = layers[str(index)][name]
            dense["kernel"] = dense["kernel"].reshape(WIDTH, HEADS, WIDTH // HEADS)
            dense["bias"] = dense["bias"].reshape(HEADS, WIDTH // HEADS)
        out = layers[str(index)]["out"]
        out["kernel"] = out["kernel"].reshape(HEADS, WIDTH // HEADS, WIDTH)
    embedding = jnp.asarray(transformer.tokens.weight.detach().numpy())
    return {"tokens": {"embedding": embedding}, "layers": layers, "head": linear(transformer.head)}


def forward(params, tokens):
    x = params["tokens"]["embedding"][tokens]
    for index in range(LAYERS):
        p = params["layers"][str(index)]
        q, k, v = (
            jnp.einsum("bte,ehd->bthd", x, p[n]["kernel"]) + p[n]["bias"]
            for n in ("query", "key", "value")
        )
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(WIDTH // HEADS))
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        x = x + jnp.einsum("bqhd,hde->bqe", mixed, p["out"]["kernel"]) + p["out"]["bias"]
        hidden = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
        x = x + hidden @ p["down"]["kernel"] + p["down"]["bias"]
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def names(kernel):
    """layers/0/query/kernel -> layers.0.query_proj"""
    *parents, _ = kernel.split("/")
    dotted = ".".join(parents)
    return f"{dotted}_proj" if parents[-1] in LINEAR else dotted


TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, TIME))
OURS = {
    "target_modules": ["tokens", *LINEAR],
    "r": 4,
    "lora_alpha": 6,
    "rank_pattern": {"query": 2},
    "alpha_pattern": {r"1\.up": 9},
    "kernel_axes": adapters.FLAX_KERNELS,
}
THEIRS = {
    "target_modules": ["tokens", *(f"{n}_proj" for n in LINEAR)],
    "r": 4,
    "lora_alpha": 6,
    "rank_pattern": {"query_proj": 2},
    "alpha_pattern": {r"1\.up_proj": 9},
}


def random_factors(tree):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(1)
    drawn = [jnp.asarray(x + 0.1 * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, drawn)


def close(found, expected, base):
    assert np.abs(expected - base).max() > 0.05  # the adapter does something
    np.testing.assert_allclose(found, expected, 0, 1e-5)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_from_here_to_peft(tmp_path, options):
    transformer = model()
    params = parameters(transformer)
    base, factors = adapters.init_adapters(
        params, adapters.LoraConfig(**OURS, **options), jax.random.key(0)
    )
    factors = random_factors(factors)
    adapters.write_peft_folder(tmp_path, base, factors, names)
    loaded = peft.PeftModel.from_pretrained(transformer, str(tmp_path))
    with torch.no_grad():
        found = loaded(torch.as_tensor(TOKENS)).numpy()
    expected = forward(adapters.apply_adapters(base, factors), TOKENS)
    close(found, np.asarray(expected), np.asarray(forward(params, TOKENS)))


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
def test_computed_starts_to_peft(tmp_path, init):
    """They change their base, and are converted to twice the rank on the original."""
    transformer = model()
    params = parameters(transformer)
    config = adapters.LoraConfig(**OURS, use_rslora=True)
    start = {"pissa": adapters.pissa, "olora": adapters.olora}.get(init)
    if start is None:
        gradients = adapters.estimate_gradients(
            lambda p, tokens: jnp.mean(forward(p, tokens) ** 2), params, [TOKENS], config
        )
        chosen = adapters.lora_ga(gradients)
    else:
        chosen = start()
    base, initial = adapters.init_adapters(params, config, init=chosen)
    factors = random_factors(initial)
    plain, converted = adapters.to_plain_lora(base, factors, initial)
    adapters.write_peft_folder(tmp_path, plain, converted, names)
    loaded = peft.PeftModel.from_pretrained(transformer, str(tmp_path))
    with torch.no_grad():
        found = loaded(torch.as_tensor(TOKENS)).numpy()
    expected = forward(adapters.apply_adapters(base, factors), TOKENS)
    # The outputs grow with factors of this size; 1e-5 of the largest.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, 0, 1e-5)


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_from_peft_to_here(tmp_path, options):
    transformer = model()
    params = parameters(transformer)
    base_outputs = np.asarray(forward(params, TOKENS))
    adapted = peft.get_peft_model(transformer, peft.LoraConfig(**THEIRS, **options))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight += 0.1 * torch.randn_like(weight)
        expected = adapted(torch.as_tensor(TOKENS)).numpy()
    adapted.save_pretrained(str(tmp_path))
    base, factors = adapters.read_peft_folder(
        tmp_path, params, names, kernel_axes=adapters.FLAX_KERNELS
    )
    found = np.asarray(forward(adapters.apply_adapters(base, factors), TOKENS))
    close(found, expected, base_outputs)
