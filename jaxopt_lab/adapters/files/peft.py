r"""Adapter folders of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.

PyTorch's weights are (outputs, inputs): with s the same,

    lora_A.weight = a^T  (r, inputs),      lora_B.weight = b^T  (outputs, r)

Needs the package `safetensors` (`pip install safetensors`, or the checkout's extra `peft`).
docs/peft.md says field by field what is taken, what says nothing here, and what is refused.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxopt_lab.adapters import _kernels, _targets
from jaxopt_lab.adapters.adapt import AdapterBase, require_apart
from jaxopt_lab.adapters.files import (
    _foreign,
    _layouts,
    _miss,
    _pairs,
    _peft_config,
    _peft_tensors,
    _places,
    _tensors,
    _whole,
)
from jaxopt_lab.adapters.files._pairs import Named, Pair
from jaxopt_lab.adapters.files._peft_tensors import PREFIX, Part, Tensors
from jaxopt_lab.adapters.files._places import Names, Place
from jaxopt_lab.adapters.lora import LoraConfig
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
    modules = _parts(base, adapters, names)
    outputs = _outputs(base.params, names, modules)
    tensors: Tensors = {}
    if isinstance(config, MissConfig):
        for module, parts in modules.items():
            for name, value in _miss.write(config, parts, outputs[module]).items():
                tensors[f"{PREFIX}{module}.{name}"] = value
        fields = _miss_fields(config)
    else:
        ranks, alphas = {}, {}
        for module, parts in modules.items():
            found, r, scaling = _peft_tensors.write_pairs(parts, outputs[module])
            ranks[module] = r
            alphas[module] = _pairs.whole(scaling * (r**0.5 if config.use_rslora else r))
            for name, value in found.items():
                tensors[f"{PREFIX}{module}.{name}"] = value
        own = {module: parts[0].place.own_name for module, parts in modules.items()}
        fields = _lora_fields(config, {own[m]: n for m, n in ranks.items()}, {own[m]: n for m, n in alphas.items()})
    ...
    return pathlib.Path(folder)
