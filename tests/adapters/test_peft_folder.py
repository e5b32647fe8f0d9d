"""Adapter folders: written and read again, and everything that can be wrong with one."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import adapters
from tests.adapters import models

KEY = jax.random.key(0)
PARAMS = {
    "embed": {"embedding": models.draw(1, 9, 8)},
    "attention": {"query": {"kernel": models.draw(2, 8, 2, 4)}},
    "Conv_0": {"kernel": models.draw(3, 3, 2, 4, 5)},
    "layers": {"up": {"kernel": models.draw(4, 3, 8, 6)}},
    "head": {"kernel": models.draw(5, 8, 9)},
}
AXES = {**adapters.FLAX_KERNELS, "layers.up": models.STACKED}
NAMES = {
    "embed/embedding": "model.embed_tokens",
    "attention/query/kernel": "model.attn.q_proj",
    "Conv_0/kernel": "model.conv",
    "layers/up/kernel": [f"model.layers.{i}.up" for i in range(3)],
    "head/kernel": "lm_head",
}


def made(**changes):
    arguments = {
        "target_modules": ["embed", "query", "Conv_0", "up"],
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {"query": 3},
        "alpha_pattern": {"Conv_0": 5},
        "kernel_axes": AXES,
    }
    config = adapters.LoraConfig(**arguments | changes)
    base, factors = adapters.init_adapters(PARAMS, config, KEY)
    leaves, structure = jax.tree.flatten(factors)
    drawn = [models.draw(i, *x.shape) for i, x in enumerate(leaves)]
    return base, jax.tree.unflatten(structure, drawn)


@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_what_is_written_is_read(tmp_path, changes):
    base, factors = made(**changes)
    adapters.write_peft_folder(tmp_path, base, factors, NAMES)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    again, found = adapters.read_peft_folder(tmp_path, PARAMS, NAMES.get, kernel_axes=AXES)
    assert jax.tree.structure(found) == jax.tree.structure(factors)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(factors)):
        np.testing.assert_array_equal(one, other)
    scalings = {k.name: (k.r, pytest.approx(k.scaling, rel=1e-12)) for k in base.kernels}
    assert {k.name: (k.r, k.scaling) for k in again.kernels} == scalings
    for one, other in zip(
        jax.tree.leaves(adapters.apply_adapters(again, found)),
        jax.tree.leaves(adapters.apply_adapters(base, factors)),
    ):
        np.testing.assert_allclose(one, other, 1e-6, 1e-6)


def test_the_layout_is_pytorchs(tmp_path):
    from safetensors import numpy as safetensors

    base, factors = made()
    adapters.write_peft_folder(tmp_path, base, factors, NAMES)
    tensors = safetensors.load_file(tmp_path / "adapter_model.safetensors")
    a = factors["attention"]["query"]["kernel"]["lora_a"]
    b = factors["attention"]["query"]["kernel"]["lora_b"]
    stem = "base_model.model.model.attn.q_proj"
    np.testing.assert_array_equal(tensors[f"{stem}.lora_A.weight"], a.T)
    np.testing.assert_array_equal(tensors[f"{stem}.lora_B.weight"], b.reshape(3, 8).T)
    window = factors["Conv_0"]["kernel"]["lora_a"]
    np.testing.assert_array_equal(
        tensors["base_model.model.model.conv.lora_A.weight"], window.transpose(3, 2, 0, 1)
    )
    assert tensors["base_model.model.model.embed_tokens.lora_embedding_A"].shape == (2, 9)
    assert tensors["base_model.model.model.layers.1.up.lora_B.weight"].shape == (6, 2)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["r"], fields["lora_alpha"]) == (2, 3)
    assert fields["rank_pattern"] == {r"^model\.attn\.q_proj": 3}
    assert fields["alpha_pattern"] == {r"^model\.conv": 5}


def test_a_start_that_changed_the_base_is_converted(tmp_path):
    config = adapters.LoraConfig(target_modules=["head"], r=2, use_rslora=True)
    base, initial = adapters.init_adapters(PARAMS, config, init=adapters.pissa())
    trained = jax.tree.map(lambda x: 1.5 * x, initial)
    with pytest.raises(ValueError, match=r"given up a part.*to_plain_lora"):
        adapters.write_peft_folder(tmp_path, base, trained, NAMES)
    plain, factors = adapters.to_plain_lora(base, trained, initial)
    # Whoever makes adapters by the new config has the same scaling.
    assert plain.config.scaling("head") == pytest.approx(base.kernels[0].scaling)
    np.testing.assert_allclose(plain.params["head"]["kernel"], PARAMS["head"]["kernel"], 0, 1e-6)
    expected = adapters.apply_adapters(base, trained)["head"]["kernel"]
    found = adapters.apply_adapters(plain, factors)["head"]["kernel"]
    np.testing.assert_allclose(found, expected, 0, 1e-5)
    adapters.write_peft_folder(tmp_path, plain, factors, NAMES)
    again, read = adapters.read_peft_folder(tmp_path, PARAMS, NAMES)
    found = adapters.apply_adapters(again, read)["head"]["kernel"]
    np.testing.assert_allclose(found, expected, 0, 1e-5)
    with pytest.raises(ValueError, match=r"shape \(8, 4\).*needs lora_a of shape \(8, 2\)"):
        adapters.to_plain_lora(base, factors, initial)


def written(tmp_path, **fields):
    base, factors = made(target_modules=["query"], rank_pattern={}, alpha_pattern={})
    adapters.write_peft_folder(tmp_path, base, factors, NAMES)
    path = tmp_path / "adapter_config.json"
    old = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in old.items() if v is not ...}))
    return tmp_path


def read(folder, names=NAMES, params=PARAMS):
    before = jax.tree.map(np.array, params)
    try:
        return adapters.read_peft_folder(folder, params, names, kernel_axes=AXES)
    finally:
        for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(params)):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": ...}, "the field 'r' is missing"),
        ({"target_modules": ...}, "the field 'target_modules' is missing"),
        ({"init_lora_weights": "pissa_niter_4"}, "has changed the base"),
        ({"r": 3}, r"'lora_A.weight' has shape \(2, 8\).* needs \(3, 8\)"),
        ({"use_dora": True}, "'lora_magnitude_vector' is missing"),
    ],
)
def test_bad_fields(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        read(written(tmp_path, **fields))


def test_bad_folders(tmp_path):
    folder = written(tmp_path)
    with pytest.raises(
        ValueError, match=r"no kernel is named after module 'model.attn.q_proj'.*q_proy"
    ):
        read(folder, {**NAMES, "attention/query/kernel": "model.attn.q_proy"})
    with pytest.raises(ValueError, match="is 3 matrices, but has 2 names"):
        read(folder, {"layers/up/kernel": ["model.attn.q_proj", "other"]})
    with pytest.raises(
        ValueError, match=r"'lora_B.weight' has shape \(8, 2\); kernel 'head/kernel'"
    ):
        read(folder, {"head/kernel": "model.attn.q_proj"})
    config = folder / "adapter_config.json"
    text = config.read_text()
    config.write_text(text[:20])
    with pytest.raises(ValueError, match="is no JSON"):
        read(folder)
    config.write_text(text)
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for size in (len(whole) - 4, 20, 0):
        weights.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="is damaged or cut short"):
            read(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors is missing"):
        read(folder)


def test_what_cannot_be_written(tmp_path):
    base, factors = made()
    for names, message in [
        ({}, "no PyTorch module for kernel 'Conv_0/kernel'"),
        ({**NAMES, "layers/up/kernel": ["one"]}, "is 3 matrices, but has 1 names"),
    ]:
        with pytest.raises(ValueError, match=message):
            adapters.write_peft_folder(tmp_path, base, factors, names)
    merged = adapters.merge_adapters(base, factors)
    with pytest.raises(ValueError, match="are merged into this base"):
        adapters.write_peft_folder(tmp_path, merged, factors, NAMES)
    config = adapters.MissConfig(target_modules=["head"], r=2)
    miss, blocks = adapters.init_adapters(PARAMS, config)
    config = adapters.PerpConfig(target_modules=["head"], r=2)
    perp, factors = adapters.init_adapters(PARAMS, config, KEY)
    with pytest.raises(
        ValueError, match="only LoRA and MiSS can be written, got adapters of a PerpConfig"
    ):
        adapters.write_peft_folder(tmp_path, perp, factors, NAMES)
    with pytest.raises(ValueError, match="converts LoRA"):
        adapters.to_plain_lora(perp, factors, factors)
    with pytest.raises(ValueError, match="converts LoRA"):
        adapters.to_plain_lora(miss, blocks, blocks)
    assert not list(tmp_path.iterdir())


def test_bfloat16_is_kept(tmp_path):
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    config = adapters.LoraConfig(target_modules=["w"], r=2, adapter_dtype=jnp.bfloat16)
    base, factors = adapters.init_adapters(params, config, KEY)
    adapters.write_peft_folder(tmp_path, base, factors, {"w": "w"})
    _, found = adapters.read_peft_folder(tmp_path, params, {"w": "w"})
    assert found["w"]["lora_a"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found["w"]["lora_a"], factors["w"]["lora_a"])
