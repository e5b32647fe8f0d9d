"""MiSS in peft's folders: a block a module, the same as here but for the transposes of "bat"."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxopt_lab.adapters import _kernels, _targets
from jaxopt_lab.adapters._kernels import Kernel
from jaxopt_lab.adapters.files import _pairs, _peft_config, _peft_tensors
from jaxopt_lab.adapters.files._pairs import Named
from jaxopt_lab.adapters.files._peft_tensors import Part, Tensors
from jaxopt_lab.adapters.miss import MissConfig


def read(
    found: Sequence[Named],
    modules: Mapping[str, Tensors],
    fields: Mapping[str, Any],
    saved: Sequence[str],
    kernel_axes: Any,
    path: pathlib.Path,
) -> tuple[MissConfig, tuple[Kernel, ...], dict[str, Any]]:
    """Returns a config, its kernels and the adapters.

    Raises:
      ValueError: blocks of another shape, parts of a module's outputs where blocks span them.
    """
    start, bias = fields.get("init_weights", True), fields.get("bias", "none")
    config = MissConfig(
        target_modules="|".join(_targets.exactly(one.layer.kernel.name) for one in found),
        r=fields["r"],
        mini_r=fields.get("mini_r", 1),
        init_weights=True if isinstance(start, bool) else start,
        kernel_axes=kernel_axes,
        bias="lora_only" if bias == _peft_config.LORA_ONLY["MISS"] else bias,
        modules_to_save=saved or None,
    )
    kernels, adapters = [], {}
    for one in found:
        kernel = one.layer.kernel._replace(r=config.r)
        config.check(kernel)
        batch = tuple(kernel.shape[axis] for axis in kernel.axes.batch)
        shape = config.shapes(kernel)["miss_block"][len(batch) :]
        blocks: list[np.ndarray | None] = []
        for place in one.places:
            if place.module not in modules:  # a layer of the stack that is not adapted
                blocks.append(None)
                continue
            where = f"{path}, module '{place.module}'"
            _peft_tensors.check_names(modules[place.module], ["miss_block"], where)
            block = modules[place.module]["miss_block"]
            rows = one.rows(place)
            if rows is not None:
                _require_columns(config, str(place))
                block = block[:, list(rows)] if block.shape[1] > rows[-1] else block
            if block.shape != shape:
                raise ValueError(
                    f"{where}: 'miss_block' has shape {block.shape}; kernel '{kernel.name}' with "
                    f"{kernel.matrix[0]} inputs and {kernel.matrix[1]} outputs needs {shape}"
                )
            blocks.append(block.swapaxes(-1, -2) if config.init_weights == "bat" else block)
        dtype = jnp.result_type(*(block.dtype for block in blocks if block is not None))
        stack = np.zeros((len(blocks), *shape), dtype)
        for index, own in enumerate(blocks):
            if own is not None:
                stack[index] = own
        factors = {"miss_block": jnp.asarray(stack.reshape(*batch, *shape))}
        _kernels.insert(adapters, kernel.name, factors)
        kernels.append(kernel)
    if config.init_weights is True:  # others are not parted
        _pairs.check_covered(
            found,
            modules,
            lambda tensors: _pairs.outputs_of(tensors["miss_block"], 1, every=False),
            str(path),
        )
    return config, tuple(kernels), adapters


def write(config: MissConfig, parts: Sequence[Part], outputs: int) -> Tensors:
    """Returns the tensors of a module; its kernels have their blocks as `b` of a pair.

    Raises:
      ValueError: what peft does not have, or cannot be parted.
    """
    first = parts[0]
    if first.layer.kind != "dense" or first.place.parameter is not None:
        raise ValueError(
            f"kernel '{first.layer.kernel.name}', '{first.place}' there, is no dense layer, and "
            "peft has MiSS for those alone; exclude it"
        )
    block = first.pairs[0].b
    if config.init_weights == "bat":
        block = block.swapaxes(-1, -2)
    if first.place.is_part:
        _require_columns(config, str(first.place))
        block = np.zeros((config.r, outputs), block.dtype)
        for part in parts:
            block[:, list(part.rows)] = part.pairs[0].b
    return {"miss_block": block}


def _require_columns(config: MissConfig, place: str) -> None:
    if config.init_weights is not True:
        raise ValueError(
            f"'{place}' is a part of a module's outputs, and the blocks of MiSS with "
            f"init_weights={config.init_weights!r} are not parted by outputs"
        )
