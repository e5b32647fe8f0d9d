"""Tensors beside the factors: leaves that are trained whole, and copies of the base."""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _matrices, _names, _roles
from jaxopt_lab.adapters import _kernels, _targets, _whole
from jaxopt_lab.adapters.files import _pairs, _peft_config, _places
from jaxopt_lab.adapters.files._peft_tensors import PREFIX, Content, Tensors
from jaxopt_lab.adapters.files._places import Names, Place
from jaxopt_lab.adapters.files._torch_layers import Layer

_PARAMETERS = {"mean": "running_mean", "var": "running_var"}


class _Piece(NamedTuple):
    """One of the places of a leaf."""

    leaf: str
    layer: Layer | None  # None for biases, scales and the like
    place: Place
    index: int
    count: int  # number of places of the leaf

    def matrix(self, value: np.ndarray) -> np.ndarray:
        """Returns the leaf as (places, inputs, outputs), or (places, outputs)."""
        if self.layer is None:
            return value.reshape(self.count, -1)
        return np.asarray(self.layer.kernel.matrices(jnp.asarray(value)))

    def read(self, tensor: np.ndarray, size: int) -> np.ndarray | None:
        """Returns what a tensor has for this place, None if it has another shape."""
        rows = self.place.rows(size, self.leaf) if self.place.is_part else None
        if self.layer is not None:
            value = self.layer.read_weight(tensor, rows)
            if value is None and self.layer.kind == "dense":  # GPT-2's Conv1D: (inputs, outputs)
                value = self.layer.read_weight(tensor.T, rows)
            return value
        if rows is not None and tensor.size > rows[-1]:
            tensor = tensor.reshape(-1)[list(rows)]
        return tensor.reshape(-1) if tensor.size == size else None


def without_tied(content: Content, fields: Mapping[str, Any], params: Any, names: Names) -> Content:
    """Drops what `ensure_weight_tying` repeats for a head, where the tree has the embedding alone.

    An adapter of the embedding then changes both; DoRA's lengths would be others on each side.
    """
    if not fields.get("ensure_weight_tying") or fields.get("use_dora"):
        return content
    known = {place.module for own in _named(params, names).values() for place in own}
    dropped = {
        module
        for module, own in content.adapters.items()
        if module not in known and any(_mirrors(own, x) for x in content.adapters.values())
    }
    dropped |= {
        module
        for (module, _), tensor in content.whole.items()
        if module not in known and _is_tied(content, fields, module, tensor)
    }
    return Content(
        {k: x for k, x in content.adapters.items() if k not in dropped},
        {k: x for k, x in content.whole.items() if k[0] not in dropped},
        {k: x for k, x in content.base.items() if k[0] not in dropped},
    )


def _mirrors(head: Mapping[str, np.ndarray], embedding: Mapping[str, np.ndarray]) -> bool:
    """Whether the factors of a dense layer are those of an embedding, from the other side."""
    pairs = ("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A")
    return all(
        mine in head and other in embedding and np.array_equal(head[mine], embedding[other].T)
        for mine, other in pairs
    )


def read(
    content: Content,
    fields: Mapping[str, Any],
    params: Any,
    names: Names,
    kernel_axes: Any,
    path: pathlib.Path,
) -> tuple[dict[str, Any], list[str]]:
    """Reads what is trained whole, and compares the rest with `params`.

    Returns:
      The leaves that are trained whole, by name, and the modules of `modules_to_save` here.

    Raises:
      ValueError: a tensor without a leaf, of another shape, or a base that is not the user's.
    """
    if not content.whole and not content.base:
        return {}, []
    named = _named(params, names)
    found = _index(
        params, named, kernel_axes, (module for module, _ in (*content.whole, *content.base))
    )
    leaves = _kernels.named_leaves(params)
    matrices: dict[str, np.ndarray] = {}  # of the leaves that the file has something for
    modules = set()
    trained: dict[str, list[tuple[_Piece, np.ndarray]]] = collections.defaultdict(list)
    beside = fields.get("bias", "none") != "none"
    for tensors, suffix in ((content.whole, ""), (content.base, ".base_layer")):
        for (module, parameter), tensor in tensors.items():
            where = f"{path}: '{PREFIX}{module}{suffix}.{parameter}'"
            saved = not suffix and (
                _peft_config.is_saved(fields, module) or _is_tied(content, fields, module, tensor)
            )
            is_trained = saved or (parameter == "bias" and beside)
            read = 0
            for piece in _pieces(found, named, module, parameter, where):
                if piece.leaf not in matrices:
                    matrices[piece.leaf] = piece.matrix(np.asarray(leaves[piece.leaf]))
                own = matrices[piece.leaf]
                value = piece.read(tensor, own.shape[-1])
                if value is None:
                    raise ValueError(
                        f"{where} has shape {tensor.shape}, which is not that of '{piece.leaf}' "
                        f"{jnp.shape(leaves[piece.leaf])} (was the vocabulary resized?)"
                    )
                if is_trained and _may_be_turned(piece, own[piece.index], tensor, fields):
                    raise ValueError(
                        f"{where} is square and trained whole, and may be of a layer that has "
                        "(inputs, outputs), GPT-2's Conv1D; merge it with peft (merge_and_unload) "
                        "and take the merged weights"
                    )
                read += value.size
                if is_trained:
                    trained[piece.leaf].append((piece, value))
                    modules |= {_module(piece.leaf)} if saved else set()
                elif not _same(own[piece.index], value):
                    raise ValueError(
                        f"{where} is the base below the adapter, and differs from '{piece.leaf}' "
                        "of params: the adapter was made for other weights"
                    )
            if is_trained and read != tensor.size:
                raise ValueError(
                    f"{where} has {tensor.size} values and is trained whole, but kernels are named "
                    f"after {read} of them alone; names needs all parts of a module"
                )
    values = {
        name: _put(matrices[name], jnp.shape(leaf), trained[name])
        for name, leaf in leaves.items()
        if name in trained
    }
    return values, sorted(modules)


def write(
    base: Any, adapters: Mapping[str, Any], names: Names, adapted: Iterable[str]
) -> tuple[Tensors, dict[str, Any]]:
    """Returns the tensors of the leaves that are trained whole, and their fields.

    Args:
      base: from `init_adapters`.
      adapters: with an array for each leaf in `base.whole`.
      names: the name map.
      adapted: modules that have factors.

    Raises:
      ValueError: a leaf without a name, a module that has factors too or whose name is the end of
        another's, a part of a module without the rest.
    """
    if not base.whole:
        return {}, {}
    adapted = set(adapted)
    named = _named(base.params, names)
    for name in base.whole:
        if name not in named:
            raise ValueError(f"names has no PyTorch module for '{name}', which is trained whole")
    modules = {place.module for name in base.whole for place in named[name]}
    found = _index(base.params, named, base.config.kernel_axes, modules)
    bias = base.config.bias
    wanted = {key for key, pieces in found.items() if any(p.leaf in base.whole for p in pieces)}
    saved = {module for module, parameter in wanted if parameter != "bias" or bias == "none"}
    _check_saved(saved, adapted, {place.module for own in named.values() for place in own})
    wanted |= {key for key in found if key[0] in saved}
    tensors = {}
    leaves = _kernels.named_leaves(base.params)
    for module, parameter in sorted(wanted):
        pieces = found[module, parameter]
        values = {
            piece.leaf: np.asarray(
                _kernels.lookup(adapters, piece.leaf)
                if piece.leaf in base.whole
                else leaves[piece.leaf]
            )
            for piece in pieces
        }
        suffix = ".base_layer" if module in adapted else ""
        key = f"{PREFIX}{module}{suffix}.{parameter}"
        tensors[key] = _tensor(pieces, values, key)
    biases = any(parameter == "bias" and module not in saved for module, parameter in wanted)
    return tensors, {
        "bias": bias if biases else "none",
        "modules_to_save": sorted(saved) or None,
    }


def _named(params: Any, names: Names) -> dict[str, list[Place]]:
    """Returns the places of each leaf that has any; a bias is in the module of its kernel."""
    own = {name: _places.places(names, name) for name in _targets.candidates(params)}
    beside = {name.rpartition("/")[0]: found for name, found in own.items() if found}
    for name, role in zip(_kernels.named_leaves(params), _roles.roles(params)):
        if name not in own and role.kind == "vector":
            above = name.rpartition("/")[0]
            own[name] = _places.places(names, name) or beside.get(above, [])
    return {name: found for name, found in own.items() if found}


def _index(
    params: Any, named: Mapping[str, list[Place]], kernel_axes: Any, modules: Iterable[str]
) -> dict[tuple[str, str], list[_Piece]]:
    """Returns the leaves of some modules by module and parameter."""
    modules, candidates = set(modules), _targets.candidates(params)
    found: dict[tuple[str, str], list[_Piece]] = collections.defaultdict(list)
    for name, own in named.items():
        if not modules & {place.module for place in own}:
            continue
        kernel = candidates.get(name)
        layer = None if kernel is None else _pairs.layer(name, kernel, kernel_axes)
        for index, place in enumerate(own):
            parameter = place.parameter or _parameter(name, layer)
            found[place.module, parameter].append(_Piece(name, layer, place, index, len(own)))
    return found


def _parameter(name: str, layer: Layer | None) -> str:
    last = _names.parts_of(name)[-1].lower()
    if layer is None and (last == "beta" or _whole.is_bias(name)):
        return "bias"
    return _PARAMETERS.get(last, "weight")


def _pieces(
    found: Mapping[tuple[str, str], list[_Piece]],
    named: Mapping[str, list[Place]],
    module: str,
    parameter: str,
    where: str,
) -> list[_Piece]:
    pieces = found.get((module, parameter), [])
    if not pieces:
        known = [place.module for own in named.values() for place in own]
        raise ValueError(
            f"{where} has no leaf: none is named after parameter '{parameter}' of module "
            f"'{module}'; the nearest names are {_matrices.nearest(module, known)}"
        )
    for piece in pieces:
        if piece.layer is not None and piece.place.parameter is not None:
            raise ValueError(
                f"{where} is a parameter of experts as a whole; only their adapters are read"
            )
    return pieces


def _is_tied(content: Content, fields: Mapping[str, Any], module: str, tensor: np.ndarray) -> bool:
    """Whether a module is trained whole because one that it is tied to is."""
    return bool(fields.get("ensure_weight_tying")) and any(
        other != module and _peft_config.is_saved(fields, other) and np.array_equal(tensor, own)
        for (other, _), own in content.whole.items()
    )


def _module(leaf: str) -> str:
    """Returns the dotted name of the module that a leaf is in, its own if there is none."""
    return (leaf.rpartition("/")[0] or leaf).replace("/", ".")


def _put(
    matrix: np.ndarray, shape: tuple[int, ...], pieces: list[tuple[_Piece, np.ndarray]]
) -> Any:
    dtype = jnp.result_type(matrix.dtype, *(value.dtype for _, value in pieces))
    first, stack = pieces[0][0], matrix.astype(dtype)
    for piece, value in pieces:
        stack[piece.index] = value
    if first.layer is None:
        return jnp.asarray(stack.reshape(shape))
    return first.layer.kernel.kernel(jnp.asarray(stack))


def _tensor(pieces: list[_Piece], values: Mapping[str, np.ndarray], key: str) -> np.ndarray:
    parts = []
    for piece in pieces:
        own = piece.matrix(values[piece.leaf])[piece.index]
        tensor = own if piece.layer is None else piece.layer.write_weight(own)
        parts.append((piece.place.rows(own.shape[-1], piece.leaf), tensor))
    if len(parts) == 1 and not pieces[0].place.is_part:
        return parts[0][1]
    rows = [row for own, _ in parts for row in own]
    if sorted(rows) != list(range(len(rows))):
        raise ValueError(f"'{key}' is written whole, but its parts in names are not all of it")
    return np.concatenate([tensor for _, tensor in parts])[np.argsort(rows)]


def _check_saved(saved: set[str], adapted: set[str], known: set[str]) -> None:
    for module in sorted(saved):
        if module in adapted:
            raise ValueError(f"module '{module}' has an adapter and is trained whole; peft has one")
        for other in sorted(known - saved):
            if other.endswith(module):
                raise ValueError(
                    f"peft finds modules_to_save by the end of the name: '{module}' would be "
                    f"'{other}' too, which is not trained whole"
                )


def _may_be_turned(
    piece: _Piece, own: np.ndarray, tensor: np.ndarray, fields: Mapping[str, Any]
) -> bool:
    """Whether nothing tells the inputs of a dense layer from its outputs, and they may be first."""
    square = tensor.ndim == 2 and tensor.shape == tensor.shape[::-1] == own.shape
    if piece.layer is None or piece.layer.kind != "dense" or not square:
        return False
    if fields.get("fan_in_fan_out"):
        return True
    kernel, weight = own.astype(np.float32), tensor.astype(np.float32)
    # Training moves a weight less than half of the way to its transpose.
    return bool(2 * np.linalg.norm(weight - kernel) < np.linalg.norm(weight - kernel.T))


def _same(own: np.ndarray, other: np.ndarray) -> bool:
    if own.shape != other.shape:
        return False
    dtype = min(own.dtype, other.dtype, key=lambda d: jnp.finfo(d).nmant)
    return bool(np.array_equal(own.astype(dtype), other.astype(dtype)))
