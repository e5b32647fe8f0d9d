"""`adapter_config.json` of peft: which fields are taken, which say nothing here, which refuse."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxopt_lab.adapters import _targets
from jaxopt_lab.adapters.files import _foreign, _tensors
from jaxopt_lab.adapters.files._places import Place
from jaxopt_lab.adapters.lora import LoraConfig
from jaxopt_lab.adapters.miss import MissConfig

_REQUIRED = {"LORA": ("r", "lora_alpha", "target_modules"), "MISS": ("r", "target_modules")}

# What `bias` of the layers with an adapter is called.
LORA_ONLY = {"LORA": "lora_only", "MISS": "MiSS_only"}

# Fields that decide what the adapter is.
TAKEN = {
    "LORA": {
        "alpha_pattern", "bias", "ensure_weight_tying", "fan_in_fan_out", "init_lora_weights",
        "lora_alpha", "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern",
        "target_modules", "target_parameters", "task_type", "use_dora", "use_rslora",
    },
    "MISS": {
        "bias", "init_weights", "mini_r", "modules_to_save", "peft_type", "r", "target_modules",
    },
}  # fmt: skip

# Fields that say how the adapter was made or is to be trained, or where.
IGNORED = {
    "LORA": {
        "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
        "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
        "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config",
        "megatron_core", "qalora_group_size", "revision", "runtime_config",
    },
    "MISS": {
        "auto_mapping", "base_model_name_or_path", "exclude_modules", "inference_mode",
        "layers_pattern", "layers_to_transform", "miss_dropout", "peft_version", "revision",
        "task_type",
    },
}  # fmt: skip

# Values by which a field asks for nothing.
_NEUTRAL: tuple[Any, ...] = (None, False, [], {})

_MERGE = "merge it with peft (merge_and_unload) and take the merged weights"
_NO_FILE = "its function is not that of one pair a layer; there is no remedy but training anew"

# Fields that change the function, and what to do then.
REFUSED = {
    "LORA": {
        "alora_invocation_tokens": "the change depends on the tokens; " + _NO_FILE,
        "arrow_config": "the change depends on the input; " + _NO_FILE,
        "kasa_config": "the base has given up its small singular values; " + _MERGE,
        "layer_replication": "the model has more layers than its base; " + _MERGE,
        "lora_bias": _MERGE,
        "monteclora_config": "factors are drawn during training; " + _MERGE,
        "trainable_token_indices": "some rows of an embedding are replaced; " + _MERGE,
        "use_bdlora": "factors have blocks; " + _MERGE,
        "use_qalora": "inputs are pooled, above a quantised base; " + _NO_FILE,
        "velora_config": "factors are compressed in training; " + _MERGE,
    },
    "MISS": {},
}

# Starts that leave the base as it was, and those that take something out of it.
_STARTS = ("eva", "gaussian", "mica", "orthogonal")
_CHANGES_BASE = re.compile(r"pissa.*|olora|corda|lora_ga|loftq", re.IGNORECASE)


def read(path: pathlib.Path) -> dict[str, Any]:
    """Returns the fields.

    Raises:
      ValueError: another kind of adapter; fields that are missing, unknown, or ask for what is not
        supported, each by name and value.
    """
    fields = _tensors.load_json(path)
    _foreign.check_kind(fields, path)
    kind = fields["peft_type"]
    for name in _REQUIRED[kind]:
        if name not in fields:
            raise ValueError(f"{path}: the field '{name}' is missing")
    for name, value in fields.items():
        _check_field(kind, name, value, path)
    _check_number(fields["r"], "r", path, whole=True)
    patterns = [("rank_pattern", True), ("alpha_pattern", False)]
    for name, whole in patterns if kind == "LORA" else ():
        for pattern, value in (fields.get(name) or {}).items():
            _check_number(value, f"{name}[{pattern!r}]", path, whole)
    if kind == "LORA":
        _check_number(fields["lora_alpha"], "lora_alpha", path, whole=False)
        _check_start(fields.get("init_lora_weights", True), path)
    elif fields.get("init_weights", True) not in (True, False, "bat", "mini"):
        raise ValueError(
            f"{path}: init_weights={fields['init_weights']!r} is unknown; expected true, false, "
            "'bat' or 'mini'"
        )
    only = LORA_ONLY[kind]
    if fields.get("bias", "none") not in ("none", "all", only):
        raise ValueError(
            f"{path}: bias={fields['bias']!r} is unknown; expected 'none', 'all' or '{only}'"
        )
    return fields


def rank_and_scaling(fields: Mapping[str, Any], place: Place) -> tuple[int, float]:
    """Returns rank and scaling of a module, found as peft finds them: the first pattern counts."""
    r = _by_pattern(place.own_name, fields.get("rank_pattern"), fields["r"])
    alpha = _by_pattern(place.own_name, fields.get("alpha_pattern"), fields["lora_alpha"])
    return r, alpha / r**0.5 if fields.get("use_rslora") else alpha / r


def dropout(fields: Mapping[str, Any], path: pathlib.Path) -> float:
    """Returns the dropout of an adapter that is trained on.

    Raises:
      ValueError: no probability below 1, or that of adapters which have none here.
    """
    name = "lora_dropout" if fields["peft_type"] == "LORA" else "miss_dropout"
    rate = fields.get(name) or 0.0
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 <= rate < 1:
        raise ValueError(f"{path}: {name} is {rate!r}; expected a number from 0 up to 1")
    if rate and (name == "miss_dropout" or fields.get("use_dora")):
        kind = "MiSS" if name == "miss_dropout" else "DoRA"
        raise ValueError(
            f"{path}: {name}={rate} is not supported for {kind}; is_trainable=False reads the "
            "adapter without it, and training goes on without dropout"
        )
    return float(rate)


def is_legacy(fields: Mapping[str, Any]) -> bool:
    """Whether peft was older than 0.19, which laid experts out in another way."""
    version = re.match(r"(\d+)\.(\d+)", fields.get("peft_version") or "0.0")
    return version is not None and tuple(map(int, version.groups())) < (0, 19)


def is_saved(fields: Mapping[str, Any], module: str) -> bool:
    """Whether a module, or one that it is part of, is named in `modules_to_save`."""
    # peft compares the ends of names as text, without regard to dots.
    parts = module.split(".")
    above = [".".join(parts[: index + 1]) for index in range(len(parts))]
    return any(name.endswith(end) for end in fields.get("modules_to_save") or () for name in above)


def of_lora(
    config: LoraConfig, ranks: Mapping[str, int], alphas: Mapping[str, float]
) -> dict[str, Any]:
    """Returns the fields of LoRA with rank and alpha of each module."""
    r, rank_pattern = _targets.patterns(ranks)
    alpha, alpha_pattern = _targets.patterns(alphas)
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "lora_dropout": config.lora_dropout,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "bias": "none",
        "inference_mode": True,
    }


def of_miss(config: MissConfig) -> dict[str, Any]:
    """Returns the fields of MiSS."""
    return {
        "peft_type": "MISS",
        "r": config.r,
        "mini_r": config.mini_r,
        "init_weights": config.init_weights,
        "bias": "none",
        "inference_mode": True,
    }


def targets(places: Sequence[Place], known: Sequence[Place]) -> dict[str, Any]:
    """Returns `target_modules` and `target_parameters` for these places alone.

    peft takes all whose name ends in an entry of the list, so that a list that would have more is
    written as a pattern.

    Raises:
      ValueError: parameters for which that is not possible.
    """
    fields: dict[str, Any] = {"target_modules": []}
    for field, names, others in (
        ("target_modules", *_own_names(places, known, parameters=False)),
        ("target_parameters", *_own_names(places, known, parameters=True)),
    ):
        clashes = [n for n in names if any(other.endswith(f".{n}") for other in others)]
        if clashes and field == "target_parameters":
            raise ValueError(
                f"peft finds target_parameters by the end of the name: '{clashes[0]}' would be "
                "others too, which have no adapter"
            )
        if names:
            fields[field] = "|".join(map(re.escape, names)) if clashes else names
    if "target_parameters" in fields:
        fields["peft_version"] = "0.19.0"  # the first with this layout of experts
    return fields


def _own_names(
    places: Sequence[Place], known: Sequence[Place], parameters: bool
) -> tuple[list[str], set[str]]:
    own, every = (
        {place.own_name for place in group if (place.parameter is not None) == parameters}
        for group in (places, known)
    )
    return sorted(own), every - own


def _by_pattern(module: str, found: Mapping[str, Any] | None, default: Any) -> Any:
    for pattern, value in (found or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_field(kind: str, name: str, value: Any, path: pathlib.Path) -> None:
    if (
        name in TAKEN[kind]
        or name in IGNORED[kind]
        or any(value is x or (value == x and type(value) is type(x)) for x in _NEUTRAL)
    ):
        return
    if name in REFUSED[kind]:
        raise ValueError(f"{path}: {name}={value!r} is not supported: {REFUSED[kind][name]}")
    raise ValueError(
        f"{path}: the field '{name}' is unknown, with value {value!r}, which may change what the "
        f"adapter does; if it does not, take it out of the file, or {_MERGE}"
    )


def _check_number(value: Any, name: str, path: pathlib.Path, whole: bool) -> None:
    kinds = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
        expected = "whole number" if whole else "number"
        raise ValueError(f"{path}: {name} is {value!r}; expected a positive {expected}")


def _check_start(start: Any, path: pathlib.Path) -> None:
    if isinstance(start, str) and _CHANGES_BASE.fullmatch(start):
        remedy = (
            "there is no conversion for it; " + _MERGE
            if start.lower() == "loftq"
            else "save the adapter with peft's path_initial_model_for_weight_conversion"
        )
        raise ValueError(f"{path}: init_lora_weights={start!r} has changed the base; {remedy}")
    if not isinstance(start, bool) and start is not None and str(start).lower() not in _STARTS:
        raise ValueError(f"{path}: init_lora_weights={start!r} is unknown; it may change the base")
