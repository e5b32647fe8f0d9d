"""Folders of peft, made and read: their tensors, fields and the change that they are."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from jaxopt_lab import adapters

PREFIX = "base_model.model."


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def pair(seed, fan_in, fan_out, r=2):
    return {"lora_A.weight": draw(seed, r, fan_in), "lora_B.weight": draw(seed + 1, fan_out, r)}


def folder(path, modules, **fields):
    """A folder of peft: tensors by module and name, fields beside plain ones; ... takes one out."""
    plain = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": sorted(modules)}
    path.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{PREFIX}{m}.{n}": np.ascontiguousarray(v)
        for m, own in modules.items()
        for n, v in own.items()
    }
    safetensors.numpy.save_file(tensors, path / "adapter_model.safetensors")
    found = {k: v for k, v in (plain | fields).items() if v is not ...}
    (path / "adapter_config.json").write_text(json.dumps(found))
    return path


def change(base, lora, *path):
    """What the adapters add to a leaf."""
    new, old = adapters.apply_adapters(base, lora), base.params
    for part in path:
        new, old = new[part], old[part]
    return np.asarray(new - old)


def expected(tensors, scaling=1.0):
    """The same of a dense module, from its tensors."""
    return scaling * (tensors["lora_B.weight"] @ tensors["lora_A.weight"]).T


def fields_of(path):
    return json.loads((path / "adapter_config.json").read_text())


def tensors_of(path):
    return safetensors.numpy.load_file(path / "adapter_model.safetensors")


def same(found, wanted):
    np.testing.assert_allclose(found, wanted, 0, 1e-5)


def trained(params, config, seed=0):
    """Adapters with random values."""
    base, start = adapters.init_adapters(params, config, jax.random.key(0))
    leaves, structure = jax.tree.flatten(start)
    drawn = [jnp.asarray(draw(seed + i, *x.shape), x.dtype) for i, x in enumerate(leaves)]
    return base, jax.tree.unflatten(structure, drawn)


def there_and_back(path, base, lora, names, params, **options):
    """Writes, reads, and compares the parameters that both give."""
    adapters.write_peft_folder(path, base, lora, names)
    again, found = adapters.read_peft_folder(path, params, names, **options)
    jax.tree.map(same, adapters.apply_adapters(again, found), adapters.apply_adapters(base, lora))
    return again, found


QKV = {n: {"kernel": jnp.asarray(draw(i, 4, 6)), "bias": jnp.zeros(6)} for i, n in enumerate("qkv")}
QKV_NAMES = {f"{n}/kernel": f"c_attn[{6 * i}:{6 * i + 6}]" for i, n in enumerate("qkv")}
