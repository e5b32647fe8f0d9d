"""From the pairs of a file's modules to the factors of a kernel that stands for several."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _matrices, _tree
from jaxopt_lab.adapters import _kernels, _targets, dora, lora
from jaxopt_lab.adapters._kernels import Factors, Kernel
from jaxopt_lab.adapters.adapt import AdapterBase
from jaxopt_lab.adapters.files import _places, _torch_layers
from jaxopt_lab.adapters.files._places import Names, Place
from jaxopt_lab.adapters.files._torch_layers import Layer
from jaxopt_lab.adapters.lora import LoraConfig

Tensors = dict[str, np.ndarray]


class Pair(NamedTuple):
    """What a file says of one matrix: its change is scaling * a @ b."""

    a: np.ndarray  # (inputs, r)
    b: np.ndarray  # (r, outputs)
    scaling: float
    magnitude: np.ndarray | None = None  # (outputs,)


class Named(NamedTuple):
    """A kernel that the file has something for, and where."""

    layer: Layer
    places: list[Place]

    @property
    def each(self) -> int:
        """Number of matrices that a place stands for: experts, or one."""
        return self.layer.kernel.count // len(self.places)

    def rows(self, place: Place) -> range | None:
        """Which outputs of its module, or None for all."""
        kernel = self.layer.kernel
        if not place.is_part:
            return None
        return place.rows(kernel.matrix[1], kernel.name)


def named(
    params: Any, names: Names, modules: Iterable[str], kernel_axes: Any, where: str
) -> list[Named]:
    """Returns the kernels that modules are named after, in the order of the tree.

    Args:
      params: the parameters.
      names: the name map.
      modules: all modules of the file.
      kernel_axes: see `LoraConfig`.
      where: the file, for messages.

    Raises:
      ValueError: a module that no kernel is named after, with the nearest; a name used twice.
    """
    modules, candidates = set(modules), _targets.candidates(params)
    own_axes = [pattern for pattern in kernel_axes or {} if pattern not in _targets.FLAX_KERNELS]
    _targets.check_patterns(candidates, own_axes, "kernel_axes")
    found, known = [], set()
    for name, candidate in candidates.items():
        own = _places.places(names, name)
        known |= {place.module for place in own}
        if not modules & {place.module for place in own}:
            continue
        one = layer(name, candidate, kernel_axes)
        found.append(Named(one, _places.of_kernel(names, name, one.kernel.count)))
    for module in sorted(modules - known):
        raise ValueError(
            f"{where}: no kernel is named after module '{module}'; the nearest names are "
            f"{_matrices.nearest(module, known)}"
        )
    _places.check_apart(claims(found))
    return found


def layer(name: str, candidate: _targets.Candidate, kernel_axes: Any) -> Layer:
    """Returns a kernel whose rank is not known yet."""
    axes = _targets.FLAX_KERNELS if kernel_axes is None else kernel_axes
    target = _targets.target(name, candidate, axes)
    kernel = Kernel(target.name, target.shape, target.axes, 1, 1.0)
    return _torch_layers.layer(kernel, candidate.role.kind)


def claims(found: Iterable[Named]) -> list[tuple[str, Place, range]]:
    """Returns what `check_apart` takes."""
    return [
        (kernel.name, place, place.rows(kernel.matrix[1], kernel.name))
        for one in found
        for kernel in (one.layer.kernel,)
        for place in one.places
    ]


def check_covered(
    found: Iterable[Named],
    modules: Mapping[str, Tensors],
    changes: Callable[[Tensors], np.ndarray],
    where: str,
) -> None:
    """Refuses a module that changes outputs which no kernel is named after.

    Args:
      found: the kernels.
      modules: the tensors of each module of the file.
      changes: which outputs the tensors of a module change, bool (outputs,).
      where: the file, for messages.

    Raises:
      ValueError: there are such outputs.
    """
    parts: dict[str, set[int]] = collections.defaultdict(set)
    for _, place, rows in claims(found):
        if place.is_part and place.module in modules:
            parts[place.module] |= set(rows)
    for module, rows in parts.items():
        rest = set(np.flatnonzero(changes(modules[module])).tolist()) - rows
        if rest:
            raise ValueError(
                f"{where}: module '{module}' changes its outputs {min(rest)} to {max(rest)}, of "
                f"which {len(rest)} are named after no kernel; names needs all parts of a module"
            )


def outputs_of(b: np.ndarray, axis: int, every: bool) -> np.ndarray:
    """Returns which outputs a factor changes, along `axis`; `every` one, where lengths do too."""
    moved = np.moveaxis(b != 0, axis, 0)
    return moved.reshape(len(moved), -1).any(axis=1) | every


def joined(
    kernel: Kernel, pairs: Sequence[Pair | None], leaf: Any, use_dora: bool
) -> tuple[Kernel, Factors]:
    """Returns a kernel with its rank and scaling, and its factors.

    A kernel has one rank and one scaling. Pairs of a lower rank are filled with zeros, and so are
    matrices without a pair, which stay as they are; a pair with another scaling has it in `b`.

    Args:
      kernel: the kernel.
      pairs: one a matrix; None for a matrix that the file does not change.
      leaf: the kernel's own values.
      use_dora: whether there are magnitudes.
    """
    there = [pair for pair in pairs if pair is not None]
    counted = collections.Counter(pair.scaling for pair in there)
    r, scaling = max(pair.a.shape[1] for pair in there), counted.most_common(1)[0][0]
    fan_in, fan_out = kernel.matrix
    a = np.zeros((kernel.count, fan_in, r), jnp.result_type(*(pair.a.dtype for pair in there)))
    b = np.zeros((kernel.count, r, fan_out), dtype_of_b(there, scaling))
    for index, pair in enumerate(pairs):
        if pair is not None:
            own = pair.a.shape[1]
            a[index, :, :own] = pair.a
            b[index, :own] = scaled_b(pair, scaling)
    kernel = kernel._replace(r=r, scaling=scaling)
    factors = kernel.pair(jnp.asarray(a), jnp.asarray(b))
    if use_dora:
        whole = jnp.asarray(leaf).astype(_tree.compute_dtype(jnp.result_type(leaf)))
        lengths = kernel.outputs(dora.lengths(kernel, whole))
        rows = np.array(lengths).reshape(kernel.count, fan_out)
        kept = {pair.magnitude.dtype for pair in there if pair.magnitude is not None}
        for index, pair in enumerate(pairs):
            if pair is not None and pair.magnitude is not None:
                rows[index] = pair.magnitude
        magnitude = rows.astype(kept.pop()) if len(kept) == 1 else rows
        factors["lora_magnitude"] = jnp.asarray(magnitude).reshape(lengths.shape)
    return kernel, factors


def dtype_of_b(pairs: Sequence[Pair], scaling: float) -> Any:
    """Returns the dtype for `scaled_b` of all: at least float32 where values are changed."""
    changed = [jnp.dtype(jnp.float32) for pair in pairs if pair.scaling != scaling]
    return jnp.result_type(*(pair.b.dtype for pair in pairs), *changed[:1])


def scaled_b(pair: Pair, scaling: float) -> np.ndarray:
    """Returns b of a pair under another scaling."""
    if pair.scaling == scaling:
        return pair.b
    return pair.b.astype(np.float64) * (pair.scaling / scaling)


def load(
    params: Any,
    names: Names,
    modules: Mapping[str, Tensors],
    pairs_of: Callable[[Named, Place, Tensors], list[Pair]],
    changes: Callable[[Tensors], np.ndarray],
    where: str,
    **options: Any,
) -> tuple[AdapterBase, dict[str, Any]]:
    """Returns a base and adapters of a file's modules.

    Args:
      params: the parameters.
      names: the name map.
      modules: the tensors of each module of the file.
      pairs_of: what these are for a place.
      changes: see `check_covered`.
      where: the file, for messages.
      **options: fields of the `LoraConfig` beside those that say which kernels, rank and alpha.
    """
    found = named(params, names, modules, options["kernel_axes"], where)
    leaves, kernels, adapters = _kernels.named_leaves(params), [], {}
    for one in found:
        pairs: list[Pair | None] = []
        for place in one.places:
            own = modules.get(place.module)
            pairs += [None] * one.each if own is None else pairs_of(one, place, own)
        leaf = leaves[one.layer.kernel.name]
        kernel, factors = joined(one.layer.kernel, pairs, leaf, options.get("use_dora", False))
        kernels.append(kernel)
        _kernels.insert(adapters, kernel.name, factors)
    check_covered(found, modules, changes, where)
    config = LoraConfig(target_modules="", **options)
    ranks = {kernel.name: kernel.r for kernel in kernels}
    alphas = {k.name: alpha(k.r, k.scaling, config.use_rslora) for k in kernels}
    config = lora.of_kernels(config, ranks, alphas)
    return AdapterBase(params, {}, config, tuple(kernels)), adapters


def alpha(r: int, scaling: float, use_rslora: bool) -> float:
    """Returns lora_alpha; one that was a whole number is it again."""
    value = scaling * (math.sqrt(r) if use_rslora else r)
    return round(value) if abs(value - round(value)) < 1e-9 * abs(value) else value
