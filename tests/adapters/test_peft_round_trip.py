"""An adapter made here gives the same outputs in PyTorch, loaded by `peft`, and the reverse.

Needs the extra `test-peft`, which has an environment of its own.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import adapters
from jaxopt_lab.adapters.files import _foreign, _peft_config

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
safetensors_torch = pytest.importorskip("safetensors.torch")
kinds = pytest.importorskip("tests.adapters.peft_kinds")
KINDS, run = kinds.KINDS, kinds.run

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


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "use_dora": True}], ids=str)
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


@pytest.mark.parametrize("init", ["pissa", "lora_ga"])
def test_computed_starts_to_peft(tmp_path, init):
    """They change their base, and are converted to twice the rank on the original."""
    transformer = model()
    params = parameters(transformer)
    config = adapters.LoraConfig(**OURS, use_rslora=True)
    if init == "lora_ga":
        gradients = adapters.estimate_gradients(
            lambda p, tokens: jnp.mean(forward(p, tokens) ** 2), params, [TOKENS], config
        )
        chosen = adapters.lora_ga(gradients)
    else:
        chosen = adapters.pissa()
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


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "use_dora": True}], ids=str)
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


R, ALPHA = 2, 3
# Arguments of peft and here, by the option's name.
OPTIONS = {
    "plain": ({}, {}),
    "dora": ({"use_dora": True}, {"use_dora": True}),
    "rslora": ({"use_rslora": True}, {"use_rslora": True}),
    "patterns": None,
    "patterns, rslora, dora": None,
    "bias all": ({"bias": "all"}, {"bias": "all"}),
    "bias lora_only": ({"bias": "lora_only"}, {"bias": "lora_only"}),
    "modules_to_save": ({"modules_to_save": ["cls"]}, {"modules_to_save": ["cls"]}),
    "rank 16": ({"r": 16}, {"r": 16}),
    "16 bits": ({}, {"adapter_dtype": jnp.bfloat16}),
    "converted pissa": ({"init_lora_weights": "pissa"}, {"init_lora_weights": "pissa"}),
    "miss": None,
    "miss bat": None,
}


def arguments(kind, option):
    """Arguments of the two configs."""
    ours, theirs = kind.pattern
    more = {"use_rslora": True, "use_dora": True} if "rslora, dora" in option else {}
    if option.startswith("patterns"):
        return (
            {"rank_pattern": {theirs: 1}, "alpha_pattern": {theirs: 5}, **more},
            {"rank_pattern": {ours: 1}, "alpha_pattern": {ours: 5}, **more},
        )
    return OPTIONS[option]


def randomized(net, option):
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in net.parameters():
            if weight.requires_grad:
                weight += 0.3 * torch.randn_like(weight)
                if option == "16 bits":
                    weight.copy_(weight.to(torch.bfloat16))


def their_config(kind, option):
    if option.startswith("miss"):
        start = {"init_weights": "bat"} if option == "miss bat" else {}
        return peft.MissConfig(**kind.theirs(), r=R, **start)
    theirs, _ = arguments(kind, option)
    return peft.LoraConfig(**{"r": R, "lora_alpha": ALPHA, **kind.theirs(), **theirs})


def our_config(kind, option):
    if option.startswith("miss"):
        start: dict[str, Any] = {"init_weights": "bat"} if option == "miss bat" else {}
        return adapters.MissConfig(target_modules=kind.targets, r=R, **start)
    _, ours = arguments(kind, option)
    return adapters.LoraConfig(
        **{"target_modules": kind.targets, "r": R, "lora_alpha": ALPHA} | ours
    )


def peft_outputs(net, kind):
    return run(net.merge_and_unload() if kind.merged else net, kind.inputs)


def near(found, expected, base):
    changed = np.abs(expected - base).max() > 1e-2
    return changed and np.abs(found - expected).max() <= 1e-5 * max(1, np.abs(expected).max())


def reads(kind, option, folder):
    """What becomes of a folder that peft has written."""
    net = kind.net()
    params, before = kind.params(net), run(net, kind.inputs)
    more = {}
    try:
        adapted = peft.get_peft_model(net, their_config(kind, option))
        if option == "converted pissa":
            adapted.save_pretrained(str(folder / "initial"))
            more = {"path_initial_model_for_weight_conversion": str(folder / "initial")}
        randomized(adapted, option)
        adapted.save_pretrained(str(folder), **more)
        expected = peft_outputs(adapted, kind)
    except Exception as error:
        return f"not in peft ({type(error).__name__})"
    if option == "16 bits":
        path = folder / "adapter_model.safetensors"
        tensors = safetensors_torch.load_file(path)
        tensors |= {k: v.to(torch.bfloat16) for k, v in tensors.items() if "lora_" in k}
        safetensors_torch.save_file(tensors, path)
    again = peft_outputs(peft.PeftModel.from_pretrained(kind.net(), str(folder)), kind)
    if not near(again, expected, before):
        return "lost by peft"  # its own folder is not the adapter
    try:
        base, found = adapters.read_peft_folder(folder, params, kind.every_name.get)
    except ValueError as error:
        return f"refused: {error}"
    outputs = kind.outputs(adapters.apply_adapters(base, found))
    return "read" if near(outputs, expected, before) else "WRONG"


def writes(kind, option, folder):
    """What becomes of adapters that are made here, in peft."""
    net = kind.net()
    params, before = kind.params(net), run(net, kind.inputs)
    try:
        base, initial = adapters.init_adapters(params, our_config(kind, option), jax.random.key(0))
        found = random_factors(initial)
        expected = kind.outputs(adapters.apply_adapters(base, found))
        if option == "converted pissa":
            base, found = adapters.to_plain_lora(base, found, initial)
        adapters.write_peft_folder(folder, base, found, kind.every_name)
    except ValueError as error:
        return f"refused: {error}"
    try:
        loaded = peft.PeftModel.from_pretrained(net, str(folder))
    except Exception as error:
        return f"refused by peft ({type(error).__name__})"
    return "written" if near(peft_outputs(loaded, kind), expected, before) else "WRONG"


VERSION = tuple(map(int, peft.__version__.split(".")[:2]))
# What is not "read" and "written", by parts of the names of kind and option; the first counts.
EXCEPTIONS = {}
if VERSION < (0, 21):  # the biases of adapted layers are not saved
    EXCEPTIONS |= {
        ("grouped", "bias lora_only"): ("lost by peft|refused", "refused by peft"),
        ("", "bias lora_only"): ("read|lost by peft", "written|refused by peft"),
    }
if VERSION < (0, 19):  # with another layout of experts, which is read, and not written
    EXCEPTIONS |= {("experts", ""): ("read|not in peft|lost by peft", "refused")}
EXCEPTIONS |= {
    ("convolution, grouped", ""): ("refused: .*grouped convolution|not in", "refused by peft|ref"),
    ("convolution", "pissa"): ("not in peft", "written"),
    ("convolution", "miss"): ("not in peft", "refused: .*peft has MiSS for those alone"),
    ("embedding", "pissa"): ("lost by peft", "written"),
    ("ends", "pissa"): ("lost by peft", "written"),
    ("embedding", "miss"): ("not in peft", "refused: .*(those alone|must divide both sides)"),
    ("ends", "miss"): ("not in peft", "refused: .*(those alone|must divide both sides)"),
    ("experts", "dora"): ("not in peft", "refused: .*peft has no DoRA"),
    ("experts", "pissa"): ("not in peft", "written"),
    ("experts", "miss"): ("not in peft", "refused: .*peft has MiSS for those alone"),
    ("fused", "miss bat"): ("refused: .*are not parted", "refused: .*are not parted"),
}


@pytest.mark.filterwarnings("ignore")  # peft's own advice on models that are not transformers'
@pytest.mark.parametrize("name", KINDS)
def test_folders_of_every_kind_of_layer(tmp_path, name):
    wrong = []
    for option in OPTIONS:
        ways = [tmp_path / option / way for way in ("from peft", "to peft")]
        found = reads(KINDS[name], option, ways[0]), writes(KINDS[name], option, ways[1])
        print(f"{name:20} | {option:22} |", " | ".join(x.partition(": /")[0][:60] for x in found))
        matching = [w for (k, o), w in EXCEPTIONS.items() if k in name and o in option]
        for one, pattern in zip(found, matching[0] if matching else ("read", "written")):
            if not re.match(pattern, one, re.DOTALL):
                wrong.append((option, one))
    assert not wrong


def test_a_file_of_pytorch_is_read(tmp_path):
    kind = KINDS["dense"]
    net = kind.net()
    params = kind.params(net)
    adapted = peft.get_peft_model(net, their_config(kind, "plain"))
    randomized(adapted, "plain")
    adapted.save_pretrained(str(tmp_path / "new"))
    adapted.save_pretrained(str(tmp_path / "old"), safe_serialization=False)
    assert (tmp_path / "old" / "adapter_model.bin").exists()
    new, old = (
        adapters.read_peft_folder(tmp_path / age, params, kind.every_name.get)[1]
        for age in ("new", "old")
    )
    jax.tree.map(np.testing.assert_array_equal, new, old)
    torch.save({"a": torch.zeros(2, dtype=torch.bfloat16)}, tmp_path / "old" / "adapter_model.bin")
    with pytest.raises(ValueError, match="'a' is no tensor of an adapter of peft"):
        adapters.read_peft_folder(tmp_path / "old", params, kind.every_name.get)
    (tmp_path / "old" / "adapter_model.bin").write_bytes(b"PK nothing")
    with pytest.raises(ValueError, match="is damaged or cut short, or has more than tensors"):
        adapters.read_peft_folder(tmp_path / "old", params, kind.every_name.get)


def test_every_kind_and_field_of_peft_is_known():
    """A new release of peft shows here what it has added."""
    assert {kind.value for kind in peft.PeftType} <= {*_foreign.KINDS, *_foreign.READABLE}
    for name, config in (("LORA", peft.LoraConfig), ("MISS", peft.MissConfig)):
        known = _peft_config.TAKEN[name] | _peft_config.IGNORED[name]
        known |= set(_peft_config.REFUSED[name])
        fields = set(config(target_modules=["x"]).to_dict())
        assert fields <= known, fields - known
