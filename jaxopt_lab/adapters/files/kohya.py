r"""Adapter files of kohya's scripts, as image models have them: one safetensors file.

    <module>.lora_down.weight (r, in, window...),  .lora_up.weight (out, r, 1...),  .alpha
    K' = K + alpha / r  lora_down^T lora_up^T

The module's name is that of PyTorch with "_" for each dot, behind "lora_unet" or "lora_te".
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxopt_lab.adapters.adapt import AdapterBase
from jaxopt_lab.adapters.files import _foreign, _pairs, _peft_tensors, _places, _tensors
from jaxopt_lab.adapters.files._pairs import Named, Pair
from jaxopt_lab.adapters.files._places import Names, Place

_REFUSED = {
    "dora_scale": "DoRA, whose lengths are kept in several ways by these scripts",
    "lora_mid": "a convolution in three factors (LoCon with use_tucker)",
    "diff": "whole differences of weights",
    "diff_b": "whole differences of biases",
    "w_norm": "differences of norms",
    "b_norm": "differences of norms",
}


def read_kohya_file(
    path: str | os.PathLike[str],
    params: Any,
    names: Names,
    *,
    kernel_axes: Mapping[str, Any] | None = None,
) -> tuple[AdapterBase, dict[str, Any]]:
    """Reads a LoRA adapter in the format of kohya's scripts.

    Args:
      path: the safetensors file.
      params: the base model's parameters here, all models in one tree; they are not changed.
      names: the name of the file's module of each kernel, such as
        "lora_unet.down_blocks.0.attentions.0.proj_in"; dots are written as the "_" that the file
        has. Lists and parts of outputs are as in `write_peft_folder`.
      kernel_axes: by pattern, which axes of a kernel are inputs and outputs, as
        `optax.contrib.MuonDimensionNumbers`; by default they follow from names and shapes.

    Returns:
      A base and adapters, as from `init_adapters`. A module without `alpha` has the scaling 1.

    Raises:
      FileNotFoundError: the file is missing.
      ValueError: a file that is cut short or of another library (GGUF, LyCORIS, peft, mlx-lm), said
        as what it is; DoRA, and factors other than two; a module that no kernel is named after,
        with the nearest names; shapes that do not fit.
      ImportError: `safetensors` is not installed.

    Examples:
      >>> import pathlib, tempfile, jax.numpy as jnp, numpy as np, safetensors.numpy
      >>> from jaxopt_lab import adapters
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "style.safetensors"
      >>> tensors = {
      ...     "lora_unet_mid_to_q.lora_down.weight": np.ones((2, 3), "f"),
      ...     "lora_unet_mid_to_q.lora_up.weight": np.ones((4, 2), "f"),
      ...     "lora_unet_mid_to_q.alpha": np.float32(1),
      ... }
      >>> safetensors.numpy.save_file({k: np.asarray(v) for k, v in tensors.items()}, path)
      >>> params = {"mid": {"to_q": {"kernel": jnp.zeros((3, 4))}}}
      >>> names = {"mid/to_q/kernel": "lora_unet.mid.to_q"}
      >>> base, lora = adapters.read_kohya_file(path, params, names)
      >>> float(adapters.apply_adapters(base, lora)["mid"]["to_q"]["kernel"][0, 0])
      1.0
    """
    _places.check(path, names, kernel_axes, "path")
    path = pathlib.Path(path)
    if not path.is_file():
        raise _foreign.missing(path, "a file of kohya's scripts")
    _foreign.check_file(path)
    modules = _by_module(_tensors.load(path), path)

    def written(kernel: str) -> list[str]:
        return [_underscores(place) for place in _places.places(names, kernel)]

    return _pairs.load(
        params,
        written,
        modules,
        functools.partial(_pairs_of, path=path),
        lambda tensors: _pairs.outputs_of(tensors["lora_up"], 0, every=False),
        str(path),
        kernel_axes=kernel_axes,
    )


def _underscores(place: Place) -> str:
    return str(place._replace(module=place.module.replace(".", "_")))


def _by_module(
    tensors: Mapping[str, np.ndarray], path: pathlib.Path
) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        module, _, name = key.partition(".")
        kind = re.sub(r"\.weight$", "", name)
        if kind in _REFUSED:
            raise ValueError(f"{path}: '{key}' is of {_REFUSED[kind]}, which is not read here")
        if kind not in ("lora_down", "lora_up", "alpha"):
            raise ValueError(
                f"{path}: '{key}' is no tensor of a LoRA adapter of kohya's scripts, which end in "
                "lora_down.weight, lora_up.weight or alpha"
            )
        found.setdefault(module, {})[kind] = value
    if not found:
        raise ValueError(f"{path} has no tensors")
    return found


def _pairs_of(
    one: Named, place: Place, tensors: Mapping[str, np.ndarray], path: pathlib.Path
) -> list[Pair]:
    where = f"{path}, module '{place.module}'"
    optional = ["alpha"] if "alpha" in tensors else []
    _peft_tensors.check_names(tensors, ["lora_down", "lora_up", *optional], where)
    if place.parameter is not None:
        raise ValueError(f"{where}: '{place}' is a parameter, and these files have modules alone")
    down, up = tensors["lora_down"], tensors["lora_up"]
    a = one.layer.read_a(down, f"{where}: 'lora_down.weight'")
    r = a.shape[1]
    b = one.layer.read_b(up, r, one.rows(place), f"{where}: 'lora_up.weight'")
    alpha = float(tensors["alpha"].reshape(-1)[0]) if "alpha" in tensors else float(r)
    return [Pair(a, b, alpha / r)]
