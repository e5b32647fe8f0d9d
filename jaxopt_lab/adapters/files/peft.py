r"""Adapter folders of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.

PyTorch's weights are (outputs, inputs): with s the same,

    lora_A.weight = a^T  (r, inputs),      lora_B.weight = b^T  (outputs, r)

Needs the package `safetensors` (`pip install safetensors`, or the checkout's extra `peft`).
docs/coming_from/peft.md says field by field what is taken, what says nothing here, and what is
refused.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from jaxopt_lab import _checks
from jaxopt_lab.adapters import _kernels, _targets
from jaxopt_lab.adapters._kernels import Kernel
from jaxopt_lab.adapters.adapt import AdapterBase, parts, require_apart
from jaxopt_lab.adapters.files import (
    _foreign,
    _pairs,
    _peft_config,
    _peft_miss,
    _peft_tensors,
    _peft_whole,
    _places,
    _tensors,
    _torch_layers,
)
from jaxopt_lab.adapters.files._pairs import Named, Pair
from jaxopt_lab.adapters.files._peft_tensors import PREFIX, Part, Tensors
from jaxopt_lab.adapters.files._places import Names
from jaxopt_lab.adapters.lora import LoraConfig, TaskType
from jaxopt_lab.adapters.miss import MissConfig


def write_peft_folder(
    folder: str | os.PathLike[str],
    base: AdapterBase,
    adapters: Mapping[str, Any],
    names: Names,
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> pathlib.Path:
    """Writes LoRA or MiSS adapters so that `peft` loads them onto the same model in PyTorch.

    Heads and other groups of axes are flattened, inputs first; kernels (window..., inputs |
    outputs) become the convolutions that `peft` makes of them.

    Args:
      folder: is made if it is not there; its two files are replaced, each at once.
      base: from `init_adapters`; for a start that changed the base, from `to_plain_lora`.
      adapters: the trained factors, and the leaves that are trained whole.
      names: the dotted name of the PyTorch module of each kernel, by the kernel's path, or a
        function of the path, which returns None for what it does not know. A list of names for a
        kernel that is a stack. "module[start:stop]", as in "attn.c_attn[0:768]", is a part of the
        module's outputs, which several kernels may share. "module:parameter", as in
        "mlp.experts:down_proj", is a parameter with one matrix an expert (`target_parameters`); of
        several in one module `peft` wraps the one declared first innermost, which is spelled as in
        its files, "mlp.experts.base_layer:gate_up_proj". A bias is in the module of its kernel,
        unless it has a name of its own.
      base_model_name_or_path: what `peft` is to load below the adapters.
      task_type: such as "CAUSAL_LM"; by default the config's.

    Returns:
      The folder.

    Raises:
      ValueError: a kernel without a name, or with as many names as it has no matrices; two kernels
        with one name; a base that has given up a part; adapters that are merged or neither LoRA
        nor MiSS; what `peft` cannot have, by name.
      ImportError: `safetensors` is not installed.

    Examples:
      >>> import jax, jax.numpy as jnp, tempfile
      >>> from jaxopt_lab import adapters
      >>> params = {"dense": {"kernel": jnp.ones((4, 6))}}
      >>> config = adapters.LoraConfig(target_modules=["dense"], r=2)
      >>> base, lora = adapters.init_adapters(params, config, jax.random.key(0))
      >>> names = {"dense/kernel": "model.dense"}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     _ = adapters.write_peft_folder(folder, base, lora, names)
      ...     _, again = adapters.read_peft_folder(folder, params, names)
      >>> bool(jnp.all(again["dense"]["kernel"]["lora_a"] == lora["dense"]["kernel"]["lora_a"]))
      True
    """
    require_apart(base, "write_peft_folder")
    _places.check(folder, names)
    if base_model_name_or_path is not None:
        _checks.check_path(base_model_name_or_path=base_model_name_or_path)
    if task_type is not None:
        _checks.check_choice(get_args(TaskType), task_type=task_type)
    config = base.config
    if type(config) not in (LoraConfig, MissConfig):  # a PerpConfig is LoRA, and another function
        raise ValueError(
            f"only LoRA and MiSS can be written, got adapters of a {type(config).__name__}"
        )
    if base.gave_up:
        raise ValueError(
            "the base of these adapters has given up a part at their start, and would not be the "
            "model that PyTorch has; convert them with to_plain_lora"
        )
    known = _known(base, names)
    modules = _parts(base, adapters, known)
    outputs = _outputs(known, modules)
    tensors: Tensors = {}
    ranks, alphas = {}, {}
    for module, own in modules.items():
        if isinstance(config, MissConfig):
            found = _peft_miss.write(config, own, outputs[module])
        else:
            found, r, scaling = _peft_tensors.write_pairs(own, outputs[module])
            name = own[0].place.own_name
            ranks[name] = r
            alphas[name] = _pairs.alpha(r, scaling, config.use_rslora)
        tensors |= {f"{PREFIX}{module}.{suffix}": value for suffix, value in found.items()}
    whole, more = _peft_whole.write(base, adapters, names, modules)
    if isinstance(config, MissConfig):
        fields = _peft_config.of_miss(config)
    else:
        fields = _peft_config.of_lora(config, ranks, alphas)
    first = [own[0].place for own in modules.values()]
    every = [p for name in _targets.candidates(base.params) for p in _places.places(names, name)]
    fields |= more | _peft_config.targets(first, every)
    if fields["bias"] == "lora_only":
        fields["bias"] = _peft_config.LORA_ONLY[fields["peft_type"]]
    fields["base_model_name_or_path"] = base_model_name_or_path
    fields["task_type"] = task_type or getattr(config, "task_type", None)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _tensors.save(folder / _foreign.WEIGHTS, tensors | whole)
    text = json.dumps(fields, indent=2, sort_keys=True)
    _tensors.save_text(folder / _foreign.CONFIG, text + "\n")
    return folder


def read_peft_folder(
    folder: str | os.PathLike[str],
    params: Any,
    names: Names,
    *,
    kernel_axes: Mapping[str, Any] | None = None,
    adapter_name: str | None = None,
    is_trainable: bool = False,
) -> tuple[AdapterBase, dict[str, Any]]:
    """Reads a LoRA, DoRA or MiSS adapter that `peft` or `write_peft_folder` has saved.

    Layers of a stack that the folder does not have, and ranks below the highest of a stack, are
    filled with zeros. Copies of the base, which `peft` writes beside adapters of `embed_tokens` and
    `lm_head`, are compared with `params`. In a tree whose head is its embedding, an adapter of the
    embedding changes both, as in PyTorch after merging.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`, or, where PyTorch is
        installed, `adapter_model.bin`.
      params: the base model's parameters here; they are not changed.
      names: see `write_peft_folder`. Kernels whose modules the folder does not have are left as
        they are.
      kernel_axes: by pattern, which axes of a kernel are inputs and outputs, as
        `optax.contrib.MuonDimensionNumbers`; by default they follow from names and shapes.
      adapter_name: which one, where a folder has adapters in folders of their names.
      is_trainable: whether the config is to have what acts in training alone, `lora_dropout`, to
        go on with it; `factored` then takes a key, and `apply_adapters` refuses.

    Returns:
      A base and adapters, as from `init_adapters`; the factors as the file has them, those in eight
      bits as float32.

    Raises:
      FileNotFoundError: a file is missing; the message says what is there.
      ValueError: a file that is cut short, or of another library; a kind of adapter that is neither
        LoRA nor MiSS; a field that is missing, unknown, or asks for what is not supported; a module
        of the folder, or a part of one that it changes, that no kernel is named after; two kernels
        with one name; shapes that do not fit; a base that is not `params`.
      ImportError: `safetensors` is not installed, or PyTorch for `adapter_model.bin`.

    Examples:
      See `write_peft_folder`.
    """
    _places.check(folder, names, kernel_axes)
    if adapter_name is not None:
        _checks.check_path(adapter_name=adapter_name)
    _checks.check_flag(is_trainable=is_trainable)
    config_path, path = _foreign.locate(pathlib.Path(folder), adapter_name)
    fields = _peft_config.read(config_path)
    dropout = _peft_config.dropout(fields, config_path) if is_trainable else 0.0
    content = _peft_tensors.split(_tensors.load(path), fields["peft_type"], path)
    content = _peft_whole.without_tied(content, fields, params, names)
    whole, saved = _peft_whole.read(content, fields, params, names, kernel_axes, path)
    if fields["peft_type"] == "MISS":
        found = _pairs.named(params, names, content.adapters, kernel_axes, str(path))
        config, kernels, adapters = _peft_miss.read(
            found, content.adapters, fields, saved, kernel_axes, path
        )
        base = AdapterBase(params, {}, config, kernels)
    else:
        task = fields.get("task_type")
        base, adapters = _pairs.load(
            params,
            names,
            content.adapters,
            functools.partial(_peft_tensors.read_pairs, fields=fields, path=path),
            functools.partial(_peft_tensors.changes, fields=fields),
            str(path),
            use_rslora=bool(fields.get("use_rslora")),
            use_dora=bool(fields.get("use_dora")),
            kernel_axes=kernel_axes,
            bias=fields.get("bias", "none"),
            modules_to_save=saved or None,
            task_type=task if task in get_args(TaskType) else None,
            lora_dropout=dropout,
        )
    for name, value in whole.items():
        _kernels.insert(adapters, name, value)
    return dataclasses.replace(base, whole=tuple(whole)), adapters


def _known(base: AdapterBase, names: Names) -> dict[str, Named]:
    """Returns the adapted kernels, and all others that are named as parts of modules."""
    own = {kernel.name: kernel for kernel in base.kernels}
    found = {}
    for name, candidate in _targets.candidates(base.params).items():
        if name in own:
            places = _places.of_kernel(names, name, own[name].count)
            found[name] = Named(_torch_layers.layer(own[name], candidate.role.kind), places)
            continue
        places = _places.places(names, name)
        if any(place.is_part for place in places):
            layer = _pairs.layer(name, candidate, base.config.kernel_axes)
            found[name] = Named(layer, places)
    return found


def _parts(
    base: AdapterBase, adapters: Mapping[str, Any], known: Mapping[str, Named]
) -> dict[str, list[Part]]:
    """Returns by module what kernels add to it, in the order of its outputs."""
    _places.check_apart(_pairs.claims(known[kernel.name] for kernel in base.kernels))
    found: dict[str, list[Part]] = collections.defaultdict(list)
    factors, _ = parts(base, adapters)
    for kernel in base.kernels:
        one = known[kernel.name]
        pairs = _pairs_of(kernel, factors[kernel.name])
        for index, place in enumerate(one.places):
            rows = place.rows(kernel.matrix[1], kernel.name)
            own = pairs[index * one.each : (index + 1) * one.each]
            found[place.module].append(Part(one.layer, place, rows, own))
    return {m: sorted(own, key=lambda part: part.rows[0]) for m, own in found.items()}


def _pairs_of(kernel: Kernel, factors: Mapping[str, Any]) -> list[Pair]:
    if "miss_block" in factors:
        block = np.asarray(factors["miss_block"])
        batch = len(kernel.axes.batch)
        return [Pair(own, own, 1.0) for own in block.reshape(-1, *block.shape[batch:])]
    a, b = (np.asarray(stack) for stack in kernel.stacks(factors))
    lengths: Any = [None] * kernel.count
    if "lora_magnitude" in factors:
        lengths = np.asarray(factors["lora_magnitude"]).reshape(kernel.count, -1)
    return [Pair(*own) for own in zip(a, b, [kernel.scaling] * kernel.count, lengths)]


def _outputs(known: Mapping[str, Named], modules: Mapping[str, list[Part]]) -> dict[str, int]:
    """Returns how many outputs each module has, as far as the kernels named after it say."""
    found = dict.fromkeys(modules, 0)
    for one in known.values():
        for place in one.places:
            if place.module in found:
                rows = place.rows(one.layer.kernel.matrix[1], one.layer.kernel.name)
                found[place.module] = max(found[place.module], rows[-1] + 1)
    return found
