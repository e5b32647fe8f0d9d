"""What a folder or file of adapters is, found from its names, its keys and its first bytes."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxopt_lab.adapters.files import _tensors

CONFIG = "adapter_config.json"
WEIGHTS, PYTORCH_WEIGHTS, MLX_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapters.safetensors",
)

_UNKNOWN = "of a kind that is not known"
_KOHYA = "kohya's scripts; use read_kohya_file"
_PEFT = "an adapter of peft; read_peft_folder takes its folder"
# Forms of LyCORIS, by the end of a tensor's name that no other has.
_LYCORIS = {
    r"hada_(w[12]_[ab]|t[12])": "LoHa",
    r"lokr_(w[12](_[ab])?|t[12])": "LoKr",
    r"[ab][12]\.weight": "GLoRA",
    r"oft_(blocks|diag)": "OFT or BOFT",
    r"on_input": "IA3",
}
READABLE = ("LORA", "MISS")
# Kinds of peft, by what they train.
KINDS = {
    **dict.fromkeys(
        ("ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING",
         "PROMPT_TUNING", "P_TUNING"),
        "tokens or prefixes before the input, not weights; train a LoRA adapter instead",
    ),
    **dict.fromkeys(
        ("POLY", "SHADOW", "XLORA"),
        "a change that depends on the input; train a LoRA adapter instead",
    ),
    **dict.fromkeys(
        ("ADALORA", "ADAMSS", "BEFT", "BOFT", "BONE", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD",
         "GLORA", "GRALORA", "HIRA", "HRA", "IA3", "LILY", "LN_TUNING", "LOHA", "LOKR", "OFT",
         "OSF", "PEANUT", "PSOFT", "PVERA", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING",
         "TINYLORA", "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT"),
        "weights in a form of its own; merge it with peft (merge_and_unload) where that is "
        "possible, or train a LoRA adapter instead",
    ),
}  # fmt: skip


def check_kind(fields: Mapping[str, Any], path: pathlib.Path) -> None:
    """Refuses every kind of adapter but LoRA and MiSS as what it is.

    Raises:
      ValueError: another `peft_type`, none, or the configuration of another library.
    """
    kind = fields.get("peft_type")
    if kind in READABLE:
        return
    if kind in KINDS:
        raise ValueError(
            f"{path}: peft_type is {kind!r}, which trains {KINDS[kind]}; read_peft_folder reads "
            f"{' and '.join(READABLE)}"
        )
    if "lora_parameters" in fields or "fine_tune_type" in fields:
        raise ValueError(f"{path} is of mlx-lm, not of peft; use read_mlx_folder")
    if kind is None:
        raise ValueError(f"{path}: the field 'peft_type' is missing; is this a folder of peft?")
    raise ValueError(f"{path}: peft_type {kind!r} is unknown; expected {' or '.join(READABLE)}")


def locate(folder: pathlib.Path, adapter_name: str | None) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns the configuration and the weights of an adapter of peft.

    Raises:
      FileNotFoundError: one of them is missing; the message says what is there.
      ValueError: a file in place of a folder, or a folder of another library.
    """
    if not folder.exists():
        raise FileNotFoundError(
            f"{folder} is not there; {folder.parent} has {_content(folder.parent)}"
        )
    if folder.is_file():
        raise ValueError(f"{folder} is a file, {describe(folder)}; expected a folder of peft")
    if adapter_name is not None and not (adapter_name == "default" and (folder / CONFIG).exists()):
        if not (folder / adapter_name / CONFIG).exists():
            raise FileNotFoundError(
                f"{folder} has no adapter named {adapter_name!r}; {_adapters_of(folder)}"
            )
        folder = folder / adapter_name
    config = folder / CONFIG
    if not config.exists():
        for path in sorted(folder.iterdir()):
            if path.suffix == ".gguf":
                raise ValueError(f"{folder} is no folder of peft: {path.name} is {describe(path)}")
        raise FileNotFoundError(
            f"{config} is missing; {_adapters_of(folder)}; the folder has {_content(folder)}"
        )
    for name in (WEIGHTS, PYTORCH_WEIGHTS):
        if (folder / name).exists():
            return config, folder / name
    if (folder / MLX_WEIGHTS).exists():
        check_kind(_tensors.load_json(config), config)  # mlx-lm's has no peft_type
    raise FileNotFoundError(
        f"{folder / WEIGHTS} is missing, and {PYTORCH_WEIGHTS} too; the folder has "
        f"{_content(folder)}"
    )


def missing(path: pathlib.Path, what: str) -> Exception:
    """Returns the error for a file that is not there, or the one for what is there instead."""
    folder = path.parent
    if (folder / WEIGHTS).exists() or (folder / PYTORCH_WEIGHTS).exists():
        return ValueError(
            f"{folder} is no place of {what}, but a folder of peft; use read_peft_folder"
        )
    for other in sorted(folder.glob("*.gguf")) if folder.is_dir() else ():
        return ValueError(f"{path} is missing; {other.name} is {describe(other)}")
    return FileNotFoundError(f"{path} is missing, of {what}; {folder} has {_content(folder)}")


def check_file(path: pathlib.Path) -> None:
    """Refuses a single file that is not kohya's, as what it is.

    Raises:
      ValueError: another format.
    """
    found = describe(path)
    if found not in (_KOHYA, _UNKNOWN):
        raise ValueError(f"{path} is {found}; expected a file of kohya's scripts")


def describe(path: pathlib.Path) -> str:
    """Returns what a file is, as a text, and what reads it."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return (
            "an adapter in llama.cpp's format GGUF, which is not read here; take the folder of "
            "peft that it was converted from (convert_lora_to_gguf.py)"
        )
    if start[:2] == b"PK" or path.suffix in (".bin", ".pt", ".pth"):
        return "a file of PyTorch"
    return _of_keys(_tensors.keys(path)) or _UNKNOWN


def wrong_key(key: str, path: pathlib.Path, prefix: str) -> ValueError:
    """Returns the error for a key that is none of peft's LoRA: a wrong prefix is named as such."""
    other = _of_keys([key])
    if other not in (None, _PEFT):
        return ValueError(f"{path}: '{key}' is a tensor of {other}")
    match = re.fullmatch(r"(.+?)\.?(lora_(?:A|B|embedding_A|embedding_B)|miss_block)\.?(.*)", key)
    if match is None:
        return ValueError(f"{path}: '{key}' is no tensor of an adapter of peft")
    module, kind, rest = match.groups()
    if not key.startswith(prefix):
        return ValueError(
            f"{path}: '{key}' has no prefix '{prefix}'; peft writes '{prefix}{module}.{kind}...'. "
            "If the module's name is right, add the prefix to all keys of the file"
        )
    if rest not in ("", "weight", "bias"):
        return ValueError(
            f"{path}: '{key}' has an adapter's name in it, '{rest.removesuffix('.weight')}'; "
            "peft's save_pretrained leaves it out, model.state_dict() does not"
        )
    return ValueError(f"{path}: '{key}' is no tensor of an adapter of peft")


def _of_keys(keys: Iterable[str]) -> str | None:
    for key in keys:
        for mark, name in _LYCORIS.items():
            if re.search(rf"\.{mark}$", key):
                return f"LyCORIS ({name}), which is not read here"
        if ".lora_down." in key or ".lora_up." in key:
            return _KOHYA
        if key.endswith((".lora_a", ".lora_b")):
            return "mlx-lm; use read_mlx_folder"
        if ".lora.down." in key or ".lora.up." in key or "_lora.down." in key:
            return "an early release of diffusers, which is not read here; save it with a newer one"
        if key.startswith("base_model.model."):
            return _PEFT
    return None


def _adapters_of(folder: pathlib.Path) -> str:
    named = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    if (folder / CONFIG).exists():
        named.insert(0, "default")
    if not named:
        return "there are no adapters in folders below it"
    return f"there are the adapters {', '.join(named)}: choose one with adapter_name="


def _content(folder: pathlib.Path) -> str:
    if not folder.is_dir():
        return "nothing, and is not there itself"
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    return ", ".join(names[:12]) + (" ..." if len(names) > 12 else "") if names else "nothing"
