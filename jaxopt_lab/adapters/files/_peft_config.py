"""`adapter_config.json` of peft: which fields are taken, which say nothing here, which refuse."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxopt_lab.adapters.files import _foreign
from jaxopt_lab.adapters.files._places import Place

_REQUIRED = {"LORA": ("r", "lora_alpha", "target_modules"), "MISS": ("r", "target_modules")}

# Fields that decide what the adapter is.
TAKEN = {
    "LORA": {
        "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout",
        "modules_to_save", "peft_type", "peft_version", "r", "rank_pattern", "target_modules",
        "target_parameters", "task_type", "use_dora", "use_rslora",
    },
    "MISS": {
        "bias", "init_weights", "mini_r", "modules_to_save", "peft_type", "r", "target_modules",
    },
}  # fmt: skip

# Fields that say how the adapter was made or is to be trained, or where.
IGNORED = {
    "LORA": {
        "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
        "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern",
        "layers_to_transform", "loftq_config", "lora_ga_config", "megatron_config",
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
        "use_qalora": "inputs are pooled; " + _MERGE,
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
    try:
        fields = json.loads(path.read_text())
        assert isinstance(fields, dict)
    except (ValueError, AssertionError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from error
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
    only = "lora_only" if kind == "LORA" else "MiSS_only"
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


def patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """Returns what is not the default by patterns that match one module alone."""
    return {"^" + re.escape(name): v for name, v in sorted(values.items()) if v != default}


def targets(modules: Sequence[str], known: Sequence[str]) -> list[str] | str:
    """Returns `target_modules` for these modules alone: a pattern where a list would have more.

    peft takes each module whose name ends in an entry of the list.
    """
    others = set(known) - set(modules)
    if any(other.endswith(f".{module}") for module in modules for other in others):
        return "|".join(re.escape(module) for module in sorted(modules))
    return sorted(modules)


def _by_pattern(module: str, found: Mapping[str, Any] | None, default: Any) -> Any:
    for pattern, value in (found or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_field(kind: str, name: str, value: Any, path: pathlib.Path) -> None:
    if name in TAKEN[kind] or name in IGNORED[kind] or any(value is x or (value == x and type(value) is type(x)) for x in _NEUTRAL):
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
