"""Files of tensors: safetensors, and PyTorch's where PyTorch is there."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn, "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip


def load(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the tensors of a file, those in eight bits as float32, which has all their values.

    Raises:
      ValueError: a file that is damaged, cut short, no file of tensors, or has tensors that are
        not real floating point.
      ImportError: the package that reads it is not installed.
    """
    with path.open("rb") as file:
        if file.read(32).startswith(b"version https://git-lfs"):
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file; fetch it with 'git lfs pull'"
            )
    tensors = _load_torch(path) if path.suffix == ".bin" else _load_safetensors(path)
    return {key: _floating(key, tensor, path) for key, tensor in tensors.items()}


def save(path: pathlib.Path, tensors: Mapping[str, Any]) -> None:
    """Writes a safetensors file; whoever reads meanwhile finds the old file or the new one."""
    safetensors = _safetensors()
    # A transpose is a view: the file is to have its own order in memory.
    arrays = {key: np.ascontiguousarray(np.asarray(value)) for key, value in tensors.items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    safetensors.numpy.save_file(arrays, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def save_text(path: pathlib.Path, text: str) -> None:
    """Writes text as `save` writes tensors."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def load_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the fields of a JSON object.

    Raises:
      ValueError: the file is none.
    """
    try:
        fields = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON object: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is no JSON object, but a {type(fields).__name__}")
    return fields


def keys(path: pathlib.Path) -> list[str]:
    """Returns the names in a safetensors file, from its beginning, or nothing if it is none."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            return []
        try:
            header = json.loads(file.read(size))
        except ValueError:
            return []
    return [key for key in header if key != "__metadata__"] if isinstance(header, dict) else []


def _load_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    safetensors = _safetensors()
    try:
        found = safetensors.deserialize(path.read_bytes())
    except Exception as error:  # the package's own exception is no subclass of a public one
        raise ValueError(f"{path} is damaged or cut short: {error}") from error
    tensors = {}
    for key, entry in found:
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: '{key}' has dtype {entry['dtype']}, which is unknown here")
        flat = np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
        tensors[key] = flat.reshape(entry["shape"])
    return tensors


def _load_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ImportError(
            f"{path} is a file of PyTorch, which is not installed here; load it where it is, with "
            "torch.load(weights_only=True), and write it with safetensors.torch.save_file as "
            "adapter_model.safetensors"
        ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
        assert all(isinstance(value, torch.Tensor) for value in found.values())
    except Exception as error:
        raise ValueError(
            f"{path} is damaged or cut short, or has more than tensors: {error}"
        ) from error
    return {key: _from_torch(value, torch) for key, value in found.items()}


def _from_torch(tensor: Any, torch: Any) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(jnp.bfloat16)
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize == 1:
        return tensor.to(torch.float32).numpy()
    return tensor.numpy()


def _floating(key: str, tensor: np.ndarray, path: pathlib.Path) -> np.ndarray:
    if tensor.size == 1 and jnp.issubdtype(tensor.dtype, jnp.integer):  # an alpha of kohya's
        return tensor.astype(np.float32)
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise ValueError(f"{path}: '{key}' has dtype {tensor.dtype}; expected floating point")
    return tensor.astype(np.float32) if tensor.dtype.itemsize == 1 else tensor


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "adapter files need the package safetensors: pip install safetensors, or "
            'pip install -e ".[peft]" in the checkout'
        ) from error
    return safetensors
