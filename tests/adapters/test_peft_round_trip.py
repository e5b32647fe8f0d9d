"""An adapter made here gives the same outputs in PyTorch, loaded by `peft`, and the reverse.

Needs the extra `test-peft`, which has an environment of its own.
"""

from __future__ import annotations

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


def random_factors(tree):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(1)
    drawn = [jnp.asarray(x + 0.1 * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return jax.tree.unflatten(structure, drawn)


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
    "miss mini": None,
}


MISS: dict[str, dict[str, Any]] = {
    "miss": {},
    "miss bat": {"init_weights": "bat"},
    "miss mini": {"init_weights": "mini", "mini_r": 2},
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
        return peft.MissConfig(**kind.theirs(), r=R, **MISS[option])
    theirs, _ = arguments(kind, option)
    return peft.LoraConfig(**{"r": R, "lora_alpha": ALPHA, **kind.theirs(), **theirs})


def our_config(kind, option):
    if option.startswith("miss"):
        return adapters.MissConfig(target_modules=kind.targets, r=R, **MISS[option])
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
    ("fused", "miss mini"): ("refused: .*are not parted", "refused: .*are not parted"),
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("option", ["plain", "rslora", "dora", "miss", "miss bat", "miss mini"])
def test_some_layers_of_a_stack_go_there_and_back(tmp_path, option):
    kind = KINDS["stacked"]
    net, params = kind.net(), kind.params(kind.net())
    config = their_config(kind, option)
    config.target_modules = {"layers.0", "layers.2"}
    if not option.startswith("miss"):
        config.rank_pattern, config.alpha_pattern = {"layers.2": 1}, {"layers.2": 5}
    adapted = peft.get_peft_model(net, config)
    randomized(adapted, option)
    adapted.save_pretrained(str(tmp_path / "theirs"))
    expected, before = run(adapted, kind.inputs), run(kind.net(), kind.inputs)
    base, found = adapters.read_peft_folder(tmp_path / "theirs", params, kind.names)
    assert near(kind.outputs(adapters.apply_adapters(base, found)), expected, before)
    adapters.write_peft_folder(tmp_path / "ours", base, found, kind.names)
    loaded = peft.PeftModel.from_pretrained(kind.net(), str(tmp_path / "ours"))
    assert near(run(loaded, kind.inputs), expected, before)


def test_a_start_from_gradients_is_written_on_the_original_base(tmp_path):
    """It changes its base, and is converted to twice the rank."""
    kind = KINDS["dense"]
    net, params = kind.net(), kind.params(kind.net())
    before = run(net, kind.inputs)
    config = adapters.LoraConfig(target_modules=kind.targets, r=R, use_rslora=True)

    def loss(p, _):
        return jnp.stack([jnp.sin(jnp.square(x)).sum() for x in jax.tree.leaves(p)]).sum()

    gradients = adapters.estimate_gradients(loss, params, [0], config)
    base, initial = adapters.init_adapters(params, config, init=adapters.lora_ga(gradients))
    found = random_factors(initial)
    expected = kind.outputs(adapters.apply_adapters(base, found))
    adapters.write_peft_folder(
        tmp_path, *adapters.to_plain_lora(base, found, initial), kind.every_name
    )
    loaded = peft.PeftModel.from_pretrained(net, str(tmp_path))
    assert near(run(loaded, kind.inputs), expected, before)


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
