r"""Adapter folders of mlx-lm: `adapters.safetensors` and its `adapter_config.json`.

Factors are applied from the right, and s is in the file as it is, not divided by the rank:

    lora_a (inputs, r),  lora_b (r, outputs),        K' = K + s lora_a lora_b
    experts: lora_a (E, r, inputs),  lora_b (E, outputs, r);        DoRA: m (outputs,)
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


def read_mlx_folder(
    folder: str | os.PathLike[str],
    params: Any,
    names: Names,
    *,
    kernel_axes: Mapping[str, Any] | None = None,
) -> tuple[AdapterBase, dict[str, Any]]:
    """Reads a LoRA or DoRA adapter that mlx-lm has trained.

    Args:
      folder: with `adapter_config.json` and `adapters.safetensors`.
      params: the base model's parameters here; they are not changed.
      names: the dotted name of mlx-lm's module of each kernel, such as
        "model.layers.0.self_attn.q_proj", with lists and parts of outputs as in
        `write_peft_folder`. A stack of experts with one name is mlx-lm's own stack,
        "model.layers.0.mlp.switch_mlp.up_proj:weight".
      kernel_axes: by pattern, which axes of a kernel are inputs and outputs, as
        `optax.contrib.MuonDimensionNumbers`; by default they follow from names and shapes.

    Returns:
      A base and adapters, as from `init_adapters`. The scaling is the file's `scale`. mlx-lm's
      adapter of an embedding that is the head too changes both, as here.

    Raises:
      FileNotFoundError: a file is missing; the message says what is there.
      ValueError: a file that is cut short, or of another library; weights that are trained whole;
        DoRA of an embedding, whose lengths are of rows there; a module that no kernel is named
        after, with the nearest names; shapes that do not fit.
      ImportError: `safetensors` is not installed.

    Examples:
      >>> import json, pathlib, tempfile, jax.numpy as jnp, numpy as np, safetensors.numpy
      >>> from jaxopt_lab import adapters
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> fields = {"lora_parameters": {"rank": 1, "scale": 20.0, "dropout": 0.0}}
      >>> _ = (folder / "adapter_config.json").write_text(json.dumps(fields))
      >>> tensors = {"q.lora_a": np.ones((2, 1), "f"), "q.lora_b": np.ones((1, 3), "f")}
      >>> safetensors.numpy.save_file(tensors, folder / "adapters.safetensors")
      >>> params = {"q": {"kernel": jnp.zeros((2, 3))}}
      >>> base, lora = adapters.read_mlx_folder(folder, params, {"q/kernel": "q"})
      >>> adapters.apply_adapters(base, lora)["q"]["kernel"]
      Array([[20., 20., 20.],
             [20., 20., 20.]], dtype=float32)
    """
    _places.check(folder, names, kernel_axes)
    folder = pathlib.Path(folder)
    config, path = folder / _foreign.CONFIG, folder / _foreign.MLX_WEIGHTS
    for file in (config, path):
        if not file.exists():
            raise _foreign.missing(file, "a folder of mlx-lm")
    scale, dora = _read_config(config)
    modules = _by_module(_tensors.load(path), path)
    pairs_of = functools.partial(_pairs_of, scale=scale, dora=dora, path=path)
    options = {"use_dora": dora, "kernel_axes": kernel_axes}

    def changes(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
        b = tensors["lora_b"]
        return _pairs.outputs_of(b, 1 if b.ndim == 3 else -1, dora)

    return _pairs.load(params, names, modules, pairs_of, changes, str(path), **options)


def _read_config(path: pathlib.Path) -> tuple[float, bool]:
    """Returns the scaling and whether it is DoRA."""
    fields = _tensors.load_json(path)
    if "peft_type" in fields:
        raise ValueError(f"{path} is of peft, not of mlx-lm; use read_peft_folder")
    kind = fields.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise ValueError(
            f"{path}: fine_tune_type is {kind!r}; only 'lora' and 'dora' have adapters, others are "
            "weights of the model itself"
        )
    found = fields.get("lora_parameters")
    scale = found.get("scale") if isinstance(found, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or scale <= 0:
        raise ValueError(
            f"{path}: lora_parameters is {found!r}; expected a positive 'scale' in it, the factor "
            "of lora_a lora_b"
        )
    return float(scale), kind == "dora"


def _by_module(
    tensors: Mapping[str, np.ndarray], path: pathlib.Path
) -> dict[str, dict[str, np.ndarray]]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(.+)\.(lora_a|lora_b|m)", key)
        if match is None:
            raise ValueError(
                f"{path}: '{key}' is no tensor of a LoRA adapter of mlx-lm, which end in lora_a, "
                "lora_b or m"
            )
        found.setdefault(match.group(1), {})[match.group(2)] = value
    if not found:
        raise ValueError(f"{path} has no tensors")
    return found


def _pairs_of(
    one: Named,
    place: Place,
    tensors: Mapping[str, np.ndarray],
    scale: float,
    dora: bool,
    path: pathlib.Path,
) -> list[Pair]:
    kernel, where = one.layer.kernel, f"{path}, module '{place.module}'"
    _peft_tensors.check_names(tensors, ["lora_a", "lora_b", *(["m"] if dora else [])], where)
    if dora and one.layer.kind == "embedding":
        raise ValueError(
            f"{where} is DoRA of an embedding, with a length for each row; here, as in peft, each "
            "column has one"
        )
    a, b = tensors["lora_a"], tensors["lora_b"]
    if a.ndim == 3:
        a, b = a.swapaxes(1, 2), b.swapaxes(1, 2)
    if a.ndim == 2 and b.ndim == 2:
        a, b = a[None], b[None]
    rows = one.rows(place)
    if rows is not None and b.shape[-1] > rows[-1]:
        b = b[..., list(rows)]
    fan_in, fan_out = kernel.matrix
    rank = a.shape[-1]
    if a.shape != (one.each, fan_in, rank) or b.shape != (one.each, rank, fan_out):
        raise ValueError(
            f"{where}: 'lora_a' has shape {tensors['lora_a'].shape} and 'lora_b' "
            f"{tensors['lora_b'].shape}; kernel '{kernel.name}' with {fan_in} inputs and {fan_out} "
            f"outputs, {one.each} to a module, needs (inputs, r) and (r, outputs), or with experts "
            "in front (experts, r, inputs) and (experts, outputs, r)"
        )
    lengths = tensors.get("m")
    if lengths is not None and rows is not None and lengths.size > rows[-1]:
        lengths = lengths[list(rows)]
    if lengths is not None and lengths.shape != (fan_out,):
        raise ValueError(f"{where}: 'm' has shape {lengths.shape}; expected {(fan_out,)}")
    return [Pair(first, second, scale, lengths) for first, second in zip(a, b)]
