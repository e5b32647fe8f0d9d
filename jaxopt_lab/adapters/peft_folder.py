r"""Adapter folders of Hugging Face PEFT: `adapter_config.json` and `adapter_model.safetensors`.

PyTorch's weights are (outputs, inputs): with s the same,

    lora_A.weight = a^T  (r, inputs),      lora_B.weight = b^T  (outputs, r)

Needs the package `safetensors` (`pip install safetensors`, or the checkout's extra `peft`).
"""

from __future__ import annotations

import collections
import difflib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.adapters import _kernels, _targets
from jaxopt_lab.adapters._kernels import Kernel
from jaxopt_lab.adapters.adapt import AdapterBase, require_apart
from jaxopt_lab.adapters.lora import LoraConfig

Names = Mapping[str, str | Sequence[str]] | Callable[[str], str | Sequence[str] | None]

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Fields that decide what the adapter is.
_REQUIRED = ("peft_type", "r", "lora_alpha", "target_modules")
_USED = {*_REQUIRED, "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights"}
# Fields that change the function unless they have one of these values.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "lora_bias": (False,),
    "use_qalora": (False,),
    **dict.fromkeys(
        (
            "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication",
            "modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices",
            "use_bdlora", "velora_config",
        ),
        (None, [], {}, False),
    ),
}  # fmt: skip
# Fields that say how the adapter was made or is to be trained, or where.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
_CHANGES_BASE = re.compile(r"pissa.*|olora|corda|lora_ga")


def write_peft_folder(
    folder: str | os.PathLike[str],
    base: AdapterBase,
    adapters: Mapping[str, Any],
    names: Names,
    *,
    base_model_name_or_path: str | None = None,
    task_type: str | None = None,
) -> pathlib.Path:
    """Writes adapters so that `peft` loads them onto the same model in PyTorch.

    Heads and other groups of axes are flattened, inputs first; kernels (height, width, inputs |
    outputs) become the convolutions that `peft` makes of them.

    Args:
      folder: is made if it is not there; its two files are replaced, each at once.
      base: from `init_adapters`; for a start that changed the base, from `to_plain_lora`.
      adapters: the trained factors.
      names: the dotted name of the PyTorch module of each kernel, by the kernel's path, or a
        function of the path; a list of names for a kernel that is a stack.
      base_model_name_or_path: what `peft` is to load below the adapters.
      task_type: such as "CAUSAL_LM".

    Returns:
      The folder.

    Raises:
      ValueError: a kernel without a name, or with as many names as it has no matrices; a base that
        has given up a part; adapters that are merged or not LoRA.
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
    safetensors = _safetensors()
    require_apart(base, "write_peft_folder")
    config = base.config
    if type(config) is not LoraConfig:  # a PerpConfig is one, and another function
        raise ValueError(f"only LoRA can be written, got adapters of a {type(config).__name__}")
    if base.gave_up:
        raise ValueError(
            "the base of these adapters has given up a part at their start, and would not be the "
            "model that PyTorch has; convert them with to_plain_lora"
        )
    tensors: dict[str, jax.Array] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for kernel in base.kernels:
        factors = _kernels.lookup(adapters, kernel.name)
        for index, module in enumerate(_modules(names, kernel)):
            ranks[module] = factors["lora_a"].shape[-1]
            root = math.sqrt(ranks[module]) if config.use_rslora else ranks[module]
            alphas[module] = _whole(kernel.scaling * root)
            for suffix, value in _to_torch(kernel, factors, index).items():
                tensors[f"{_PREFIX}{module}.{suffix}"] = value
    r, alpha = (collections.Counter(d.values()).most_common(1)[0][0] for d in (ranks, alphas))
    fields = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model_name_or_path,
        "target_modules": sorted(ranks),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(m): n for m, n in sorted(ranks.items()) if n != r},
        "alpha_pattern": {re.escape(m): a for m, a in sorted(alphas.items()) if a != alpha},
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Whoever reads meanwhile finds the old files or the new ones, never half of one.
    temporary = folder / f".{WEIGHTS}.{os.getpid()}"
    safetensors.save_file(tensors, temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / WEIGHTS)
    temporary = folder / f".{CONFIG}.{os.getpid()}"
    temporary.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    os.replace(temporary, folder / CONFIG)
    return folder


def read_peft_folder(
    folder: str | os.PathLike[str],
    params: Any,
    names: Names,
    *,
    kernel_axes: Mapping[str, Any] | None = None,
) -> tuple[AdapterBase, dict[str, Any]]:
    """Reads a LoRA adapter that `peft` or `write_peft_folder` has saved.

    Args:
      folder: with `adapter_config.json` and `adapter_model.safetensors`.
      params: the base model's parameters here; they are not changed.
      names: see `write_peft_folder`. Kernels whose modules the folder does not have are left as
        they are.
      kernel_axes: see `LoraConfig`.

    Returns:
      A base and adapters, as from `init_adapters`.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file that is cut short; a field that is missing, unknown, or asks for what is
        not LoRA or DoRA; a module of the folder that no kernel is named after, with the nearest
        names; shapes that do not fit.
      ImportError: `safetensors` is not installed.

    Examples:
      See `write_peft_folder`.
    """
    folder = pathlib.Path(folder)
    fields = _read_config(folder / CONFIG)
    tensors = _read_weights(folder / WEIGHTS)
    found = _by_module(tensors, folder / WEIGHTS)
    candidates = _targets.candidates(params)
    modules = {name: _names_of(names, name) for name in candidates}
    known = {module: name for name, own in modules.items() for module in own}
    for module in found:
        if module not in known:
            near = difflib.get_close_matches(module, known, n=3, cutoff=0.0)
            raise ValueError(
                f"{folder / WEIGHTS}: no kernel is named after module '{module}'; the nearest "
                f"names are {', '.join(near) or 'none'}"
            )
    chosen = [name for name, own in modules.items() if any(m in found for m in own)]
    ranks, alphas = {}, {}
    for name in chosen:
        for module in modules[name]:
            if module not in found:
                raise ValueError(
                    f"{folder / WEIGHTS} has nothing for module '{module}', one of the stack "
                    f"'{name}'"
                )
        ranks[name], alphas[name] = _rank_and_alpha(fields, modules[name], folder / CONFIG)
    config = LoraConfig(
        target_modules=chosen,
        r=max(ranks.values()),
        lora_alpha=fields["lora_alpha"],
        use_rslora=fields.get("use_rslora", False),
        use_dora=fields.get("use_dora", False),
        rank_pattern={re.escape(name.replace("/", ".")): r for name, r in ranks.items()},
        alpha_pattern={re.escape(name.replace("/", ".")): a for name, a in alphas.items()},
        kernel_axes=kernel_axes,
    )
    kernels = config.kernels(params)
    adapters: dict[str, Any] = {}
    for kernel in kernels:
        parts = [
            _from_torch(kernel, found[m], config.use_dora, f"{folder / WEIGHTS}, module '{m}'")
            for m in modules[kernel.name]
        ]
        if len(parts) != kernel.count:
            raise ValueError(
                f"kernel '{kernel.name}' is {kernel.count} matrices, but has {len(parts)} names"
            )
        a, b = (jnp.stack([part[name] for part in parts]) for name in ("lora_a", "lora_b"))
        factors = kernel.pair(a, b)
        if config.use_dora:
            lengths = jnp.stack([part["lora_magnitude"] for part in parts])
            batch, _, outputs = (tuple(kernel.shape[i] for i in axes) for axes in kernel.axes)
            factors["lora_magnitude"] = lengths.reshape(*batch, *outputs)
        _kernels.insert(adapters, kernel.name, factors)
    return AdapterBase(params, {}, config, kernels), adapters


def _safetensors() -> Any:
    try:
        import safetensors.flax
    except ImportError as error:
        raise ImportError(
            "peft folders need the package safetensors: pip install safetensors, or "
            'pip install -e ".[peft]" in the checkout'
        ) from error
    return safetensors.flax


def _names_of(names: Names, kernel: str) -> list[str]:
    found = names(kernel) if callable(names) else names.get(kernel)
    return [] if found is None else [found] if isinstance(found, str) else list(found)


def _modules(names: Names, kernel: Kernel) -> list[str]:
    found = _names_of(names, kernel.name)
    if not found:
        raise ValueError(f"names has no PyTorch module for kernel '{kernel.name}'")
    if len(found) != kernel.count:
        raise ValueError(
            f"kernel '{kernel.name}' is {kernel.count} matrices, but has {len(found)} names"
        )
    return found


def _whole(value: float) -> float:
    """Undoes the rounding of a product that was a whole number."""
    return round(value) if abs(value - round(value)) < 1e-9 * abs(value) else value


def _is_convolution(kernel: Kernel) -> bool:
    return kernel.axes == ((), (0, 1, 2), (3,))


def _to_torch(kernel: Kernel, factors: _kernels.Factors, index: int) -> dict[str, jax.Array]:
    a, b = (stack[index] for stack in kernel.stacks(factors))
    if kernel.name.split("/")[-1] == "embedding":
        found = {"lora_embedding_A": a.T, "lora_embedding_B": b.T}
    elif _is_convolution(kernel):
        window = a.reshape(*kernel.shape[:3], -1).transpose(3, 2, 0, 1)
        found = {"lora_A.weight": window, "lora_B.weight": b.T[:, :, None, None]}
    else:
        found = {"lora_A.weight": a.T, "lora_B.weight": b.T}
    if "lora_magnitude" in factors:
        lengths = factors["lora_magnitude"].reshape(-1, kernel.matrix[1])[index]
        shape = (1, -1, 1, 1) if _is_convolution(kernel) else (-1,)
        found["lora_magnitude_vector"] = lengths.reshape(shape)
    # A transpose is a view: the file is to have its own order in memory.
    return {name: jnp.asarray(np.ascontiguousarray(value)) for name, value in found.items()}


def _from_torch(
    kernel: Kernel, tensors: Mapping[str, jax.Array], dora: bool, where: str
) -> _kernels.Factors:
    embedding = kernel.name.split("/")[-1] == "embedding"
    kind = "lora_embedding_{}" if embedding else "lora_{}.weight"
    wanted = [kind.format("A"), kind.format("B"), *(["lora_magnitude_vector"] if dora else [])]
    for name in wanted:
        if name not in tensors:
            raise ValueError(f"{where}: '{name}' is missing; found {', '.join(sorted(tensors))}")
    for name in tensors:
        if name not in wanted:
            raise ValueError(f"{where}: '{name}' is no part of such an adapter")
    (fan_in, fan_out), r = kernel.matrix, kernel.r
    a_shape, b_shape = (r, fan_in), (fan_out, r)
    if _is_convolution(kernel):
        height, width, channels, _ = kernel.shape
        a_shape, b_shape = (r, channels, height, width), (fan_out, r, 1, 1)
    a, b = tensors[wanted[0]], tensors[wanted[1]]
    for name, value, shape in ((wanted[0], a, a_shape), (wanted[1], b, b_shape)):
        if value.shape != shape:
            raise ValueError(
                f"{where}: '{name}' has shape {value.shape}; kernel '{kernel.name}' with {fan_in} "
                f"inputs and {fan_out} outputs needs {shape}"
            )
    if _is_convolution(kernel):
        a = a.transpose(0, 2, 3, 1)
    found = {"lora_a": a.reshape(r, fan_in).T, "lora_b": b.reshape(fan_out, r).T}
    if dora:
        lengths = tensors["lora_magnitude_vector"]
        if lengths.size != fan_out:
            raise ValueError(
                f"{where}: 'lora_magnitude_vector' has shape {lengths.shape}; expected {fan_out}"
            )
        found["lora_magnitude"] = lengths.reshape(-1)
    return found


def _read_config(path: pathlib.Path) -> dict[str, Any]:
    text = path.read_text()
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    for name in _REQUIRED:
        if name not in fields:
            raise ValueError(f"{path}: the field '{name}' is missing")
    if fields["peft_type"] != "LORA":
        raise ValueError(f"{path}: peft_type is {fields['peft_type']!r}; only 'LORA' can be read")
    for name, value in fields.items():
        if name in _NEUTRAL:
            if not any(value == neutral for neutral in _NEUTRAL[name]):
                raise ValueError(f"{path}: {name}={value!r} is not supported")
        elif name not in _USED | _IGNORED:
            raise ValueError(f"{path}: the field '{name}' is unknown, with value {value!r}")
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and _CHANGES_BASE.fullmatch(start):
        raise ValueError(
            f"{path}: init_lora_weights={start!r} has changed the base; save the adapter with "
            "peft's path_initial_model_for_weight_conversion"
        )
    return fields


def _read_weights(path: pathlib.Path) -> dict[str, jax.Array]:
    safetensors = _safetensors()
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return safetensors.load_file(path)
    except Exception as error:  # the package's own exception is no subclass of a public one
        raise ValueError(f"{path} is damaged or cut short: {error}") from error


def _by_module(
    tensors: Mapping[str, jax.Array], path: pathlib.Path
) -> dict[str, dict[str, jax.Array]]:
    """Groups tensors by the module that they belong to."""
    found: dict[str, dict[str, jax.Array]] = {}
    for key, value in tensors.items():
        match = re.fullmatch(rf"{re.escape(_PREFIX)}(.+)\.(lora_.+)", key)
        if match is None:
            raise ValueError(f"{path}: '{key}' is no tensor of a LoRA adapter")
        found.setdefault(match.group(1), {})[match.group(2)] = value
    if not found:
        raise ValueError(f"{path} has no tensors")
    return found


def _rank_and_alpha(
    fields: Mapping[str, Any], modules: Sequence[str], path: pathlib.Path
) -> tuple[int, float]:
    """Returns the rank and alpha of the modules of one kernel, which must agree."""

    def of(module: str) -> tuple[int, float]:
        name = module.replace(".", "/") + "/weight"
        r = _targets.by_pattern(name, fields.get("rank_pattern") or {}, fields["r"])
        alpha = _targets.by_pattern(name, fields.get("alpha_pattern") or {}, fields["lora_alpha"])
        return r, alpha

    found = {of(module) for module in modules}
    if len(found) > 1:
        raise ValueError(
            f"{path}: the modules {', '.join(modules)} of one stack differ in rank or alpha"
        )
    return found.pop()
