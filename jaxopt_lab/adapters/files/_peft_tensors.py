"""Tensors of peft's adapters: their keys, and the factors of each module, both ways."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxopt_lab.adapters.files import _foreign, _pairs, _peft_config, _torch_layers
from jaxopt_lab.adapters.files._pairs import Named, Pair, Tensors, dtype_of_b, scaled_b
from jaxopt_lab.adapters.files._places import Place
from jaxopt_lab.adapters.files._torch_layers import Layer

PREFIX = "base_model.model."
_OF_ADAPTERS = re.compile(
    r"(.*\.)?(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|miss_block)\b"
)
_NAMES = {
    "LORA": r"lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|lora_magnitude_vector",
    "MISS": r"miss_block",
}


class Content(NamedTuple):
    """The tensors of a file."""

    adapters: dict[str, Tensors]  # by module
    whole: dict[tuple[str, str], np.ndarray]  # by module and parameter, without adapters on them
    base: dict[tuple[str, str], np.ndarray]  # likewise, of modules that have adapters


def split(tensors: Mapping[str, np.ndarray], kind: str, path: pathlib.Path) -> Content:
    """Sorts tensors by the module that they belong to.

    Raises:
      ValueError: a key that peft does not write, or no factors at all.
    """
    found = Content({}, {}, {})
    for key, value in tensors.items():
        name = re.sub(r"(lora_magnitude_vector)\.weight$", r"\1", key.removeprefix(PREFIX))
        match = re.fullmatch(rf"(.+)\.({_NAMES[kind]})", name)
        if not key.startswith(PREFIX) or (match is None and _OF_ADAPTERS.match(name)):
            raise _foreign.wrong_key(key, path, PREFIX)
        if match is not None:
            found.adapters.setdefault(match.group(1), {})[match.group(2)] = value
            continue
        module, _, parameter = name.rpartition(".")
        if parameter == "num_batches_tracked":
            continue  # a counter of PyTorch's batch norm alone
        if "original_module" in module.split("."):
            continue  # what modules_to_save has replaced
        module = module.removesuffix(".modules_to_save")
        own = module.removesuffix(".base_layer")
        (found.whole if own == module else found.base)[own, parameter] = value
    if not found.adapters:
        raise ValueError(f"{path} has no tensors of a {kind} adapter")
    return found


def changes(tensors: Tensors, fields: Mapping[str, Any]) -> np.ndarray:
    """Returns which outputs of a module its tensors change."""
    name = "lora_B.weight" if "lora_B.weight" in tensors else "lora_embedding_B"
    return _pairs.outputs_of(tensors[name], 0, bool(fields.get("use_dora")))


def read_pairs(
    one: Named, place: Place, tensors: Tensors, fields: Mapping[str, Any], path: pathlib.Path
) -> list[Pair]:
    """Returns the pairs of a module, one for each of its matrices.

    Raises:
      ValueError: tensors that are missing, too many, or of other shapes.
    """
    layer, where = one.layer, f"{path}, module '{place.module}'"
    embedding = any(name.startswith("lora_embedding") for name in tensors)
    form = "lora_embedding_{}" if embedding else "lora_{}.weight"
    wanted = [form.format("A"), form.format("B")]
    wanted += ["lora_magnitude_vector"] if fields.get("use_dora") else []
    check_names(tensors, wanted, where)
    a, b = (tensors[name] for name in wanted[:2])
    r, scaling = _peft_config.rank_and_scaling(fields, place)
    if place.parameter is not None:
        return _read_experts(one, place, a, b, r, scaling, fields, where)
    square = layer.kernel.matrix[0] == layer.kernel.matrix[1]
    if layer.kind == "embedding" and not embedding and square:
        raise ValueError(
            f"{where} is a dense layer, but kernel '{layer.kernel.name}' an embedding with as many "
            "rows as columns, which may be either side"
        )
    if embedding:
        layer = layer._replace(kind="embedding")
    elif layer.kind == "embedding":
        layer = layer._replace(kind="dense")
    labels = [f"{where}: '{name}'" for name in wanted]
    if a.ndim == 0 or a.shape[0] != r:
        raise ValueError(
            f"{labels[0]} has shape {a.shape}; kernel '{layer.kernel.name}' with rank {r} needs "
            f"{layer.a_shape(r)}"
        )
    rows = one.rows(place)
    pair = Pair(layer.read_a(a, labels[0]), layer.read_b(b, r, rows, labels[1]), scaling)
    if fields.get("use_dora"):
        lengths = tensors["lora_magnitude_vector"].reshape(-1)
        if rows is not None and lengths.size > rows[-1]:
            lengths = lengths[list(rows)]
        if lengths.size != layer.kernel.matrix[1]:
            raise ValueError(
                f"{labels[2]} has {lengths.size} values; expected {layer.kernel.matrix[1]}"
            )
        pair = pair._replace(magnitude=lengths)
    return [pair]


def _read_experts(
    one: Named,
    place: Place,
    a: np.ndarray,
    b: np.ndarray,
    r: int,
    scaling: float,
    fields: Any,
    where: str,
) -> list[Pair]:
    if a.shape[0] != one.each * r:
        raise ValueError(
            f"{where}: 'lora_A.weight' has shape {a.shape}; {one.each} experts of rank {r} need "
            f"({one.each * r}, inputs)"
        )
    rows = one.rows(place)
    if rows is not None:
        if b.shape[0] <= rows[-1]:
            raise ValueError(
                f"{where}: 'lora_B.weight' has shape {b.shape}; '{place}' needs more outputs"
            )
        b = b[list(rows)]
    pairs = _torch_layers.read_experts(
        one.layer.kernel, a, b, one.each, _peft_config.is_legacy(fields), where
    )
    return [Pair(first, second, scaling) for first, second in pairs]


class Part(NamedTuple):
    """What one kernel adds to a module."""

    layer: Layer
    place: Place
    rows: range  # of the module's outputs
    pairs: list[Pair]  # one, or one an expert


def write_pairs(parts: Sequence[Part], outputs: int) -> tuple[Tensors, int, float]:
    """Returns the tensors of a module, its rank and its scaling.

    Kernels that are parts of one module share `a` where they have the same, and stand side by side
    in it otherwise.

    Args:
      parts: the kernels of the module.
      outputs: its outputs, with those that no kernel adapts.

    Raises:
      ValueError: what peft does not have.
    """
    layer, place = parts[0].layer, parts[0].place
    if layer.kind == "depthwise":
        raise ValueError(
            f"kernel '{layer.kernel.name}' is that of a grouped convolution, whose factors peft "
            "groups too; exclude it"
        )
    if place.parameter is not None and parts[0].pairs[0].magnitude is not None:
        raise ValueError(f"'{place}' is a parameter, for which peft has no DoRA; exclude it")
    if len(parts) == 1 and len(parts[0].rows) == outputs:
        joined = parts[0].pairs
    else:
        shared = all(
            np.array_equal(mine.a, first.a)
            for part in parts
            for mine, first in zip(part.pairs, parts[0].pairs)
        )
        every = zip(*(part.pairs for part in parts))
        joined = [_side_by_side(pairs, parts, outputs, shared) for pairs in every]
    r, scaling = joined[0].a.shape[1], joined[0].scaling
    if place.parameter is not None:
        a, b = _torch_layers.write_experts([(pair.a, pair.b) for pair in joined])
        return {"lora_A.weight": a, "lora_B.weight": b}, r, scaling
    (pair,) = joined
    ones = tuple(1 for _ in layer.window)
    form = "lora_embedding_{}" if layer.kind == "embedding" else "lora_{}.weight"
    found = {
        form.format("A"): layer.write_a(pair.a),
        form.format("B"): pair.b.T.reshape(outputs, r, *ones),
    }
    if pair.magnitude is not None:
        shape = (1, -1, *ones) if ones else (-1,)
        found["lora_magnitude_vector"] = pair.magnitude.reshape(shape)
    return found, r, scaling


def _side_by_side(pairs: Sequence[Pair], parts: Sequence[Part], outputs: int, shared: bool) -> Pair:
    first = pairs[0]
    ranks = [pair.a.shape[1] for pair in pairs]
    starts = [0 if shared else sum(ranks[:index]) for index in range(len(pairs))]
    a = first.a
    if not shared:
        dtype = jnp.result_type(*(pair.a.dtype for pair in pairs))
        a = np.concatenate([pair.a.astype(dtype) for pair in pairs], axis=1)
    b = np.zeros((a.shape[1], outputs), dtype_of_b(pairs, first.scaling))
    magnitude = None if first.magnitude is None else np.zeros(outputs, first.magnitude.dtype)
    missing = set(range(outputs))
    for pair, part, start in zip(pairs, parts, starts):
        own = scaled_b(pair, first.scaling)
        b[start : start + len(own), list(part.rows)] = own
        missing -= set(part.rows)
        if magnitude is not None:
            magnitude[list(part.rows)] = pair.magnitude
    if magnitude is not None and missing:
        raise ValueError(
            f"with use_dora all outputs of module '{parts[0].place.module}' need an adapter; those "
            f"from {min(missing)} on have none"
        )
    return Pair(a, b, first.scaling, magnitude)


def check_names(tensors: Mapping[str, Any], wanted: Sequence[str], where: str) -> None:
    """Refuses a module whose tensors are not these.

    Raises:
      ValueError: one is missing, or there are others.
    """
    for name in wanted:
        if name not in tensors:
            raise ValueError(f"{where}: '{name}' is missing; found {', '.join(sorted(tensors))}")
    for name in tensors:
        if name not in wanted:
            raise ValueError(f"{where}: '{name}' is no part of such an adapter")
