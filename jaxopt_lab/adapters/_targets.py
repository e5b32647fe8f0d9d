"""Which kernels get an adapter, chosen by name as `peft` does, and which of their axes are what."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _matrices
from jaxopt_lab.adapters import _kernels

Dims = optax.contrib.MuonDimensionNumbers

# What stands in a layer beside its kernel.
_NO_KERNEL = re.compile(r"bias|scale|mean|var|count")

FLAX_KERNELS: dict[str, Dims] = {
    r"query|key|value": Dims(reduction_axis=(0,), output_axis=(1, 2)),
    r"out": Dims(reduction_axis=(0, 1), output_axis=(2,)),
    r".*Conv.*|.*conv.*": Dims(reduction_axis=(-4, -3, -2), output_axis=(-1,)),
}
"""`kernel_axes` of Flax's attention (embed, heads, head size) and its convolutions over images."""


class Target(NamedTuple):
    """A kernel chosen, before its rank is known."""

    name: str
    shape: tuple[int, ...]
    axes: _matrices.MatrixAxes


class Choice(Protocol):
    """The fields of a config that say which kernels; see `LoraConfig`."""

    @property
    def target_modules(self) -> str | Sequence[str]: ...
    @property
    def exclude_modules(self) -> str | Sequence[str] | None: ...
    @property
    def layers_to_transform(self) -> int | Sequence[int] | None: ...
    @property
    def layers_pattern(self) -> str | Sequence[str] | None: ...
    @property
    def kernel_axes(self) -> Mapping[str, Any] | None: ...


def choose(params: Any, choice: Choice) -> tuple[Target, ...]:
    """Returns the kernels chosen, in the order of the tree.

    Raises:
      ValueError: a pattern that matches nothing, with the nearest paths; a kernel with more than
        two axes that `kernel_axes` does not name.
      TypeError: a kernel that is not real floating point.
    """
    kernels = candidates(params)
    chosen = _matching(kernels, choice.target_modules, "target_modules")
    if choice.exclude_modules is not None:
        chosen -= _matching(kernels, choice.exclude_modules, "exclude_modules")
    if choice.layers_to_transform is not None:
        wanted = _as_list(choice.layers_to_transform)
        chosen = {n for n in chosen if _layer(n, choice.layers_pattern) in wanted}
    if not chosen:
        raise ValueError(
            "no kernel is left: exclude_modules or layers_to_transform take away all that "
            f"target_modules={choice.target_modules!r} matches"
        )
    axes = choice.kernel_axes or {}
    own = {pattern: axes[pattern] for pattern in axes if pattern not in FLAX_KERNELS}
    check_patterns(kernels, own, "kernel_axes")
    return tuple(_target(n, leaf, axes) for n, (_, leaf) in kernels.items() if n in chosen)


def candidates(params: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the path and the leaf of everything with two axes or more that is no bias or norm."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    found = {}
    for path, leaf in flat:
        name = _kernels.leaf_name(path)
        if jnp.ndim(leaf) >= 2 and not _NO_KERNEL.fullmatch(name.split("/")[-1]):
            found[name] = (path, leaf)
    return found


def by_pattern(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Returns the value of the first pattern that matches a kernel's module or path.

    A pattern matches from the beginning or from a dot, to the end, as in `peft`.
    """
    for pattern, value in patterns.items():
        if any(re.fullmatch(rf"(.*\.)?({pattern})", known) for known in _names(name)):
            return value
    return default


def check_patterns(names: Iterable[str], patterns: Iterable[str], what: str) -> None:
    """Refuses patterns that match none of the kernels, with the nearest paths."""
    names = list(names)
    for pattern in patterns:
        if not any(by_pattern(name, {pattern: True}, False) for name in names):
            raise ValueError(_nothing_matches(pattern, names, what))


def _matching(candidates: Mapping[str, Any], wanted: str | Sequence[str], what: str) -> set[str]:
    if wanted == "all-linear":
        ends = _matrices.ends_of_a_model
        return {name for name, (path, _) in candidates.items() if not ends(path)}
    if isinstance(wanted, str):
        pattern = wanted.replace("/", r"\.")
        found = {n for n in candidates if any(re.fullmatch(pattern, k) for k in _names(n))}
        if not found:
            raise ValueError(_nothing_matches(wanted, candidates, what))
        return found
    found = set()
    for entry in wanted:
        dotted = entry.replace("/", ".")
        new = {
            name
            for name in candidates
            if any(k == dotted or k.endswith(f".{dotted}") for k in _names(name))
        }
        if not new:
            raise ValueError(_nothing_matches(entry, candidates, what))
        found |= new
    return found


def _names(name: str) -> tuple[str, str]:
    """The dotted names by which a kernel can be called: its module's and its own."""
    parts = name.split("/")
    return ".".join(parts[:-1]), ".".join(parts)


def _nothing_matches(pattern: str, names: Iterable[str], what: str) -> str:
    modules = sorted({known for name in names for known in _names(name) if known})
    plain = re.sub(r"[^\w./]", "", pattern).replace("/", ".")
    near = difflib.get_close_matches(plain, modules, n=3, cutoff=0.0)
    return f"{what}: {pattern!r} matches no kernel; the nearest are {', '.join(near) or 'none'}"


def _layer(name: str, layers_pattern: str | Sequence[str] | None) -> int | None:
    """Returns the number of the layer that a kernel is in, as `peft` finds it."""
    module = _names(name)[0]
    patterns = [] if layers_pattern is None else _as_list(layers_pattern)
    for pattern in [rf"(?:.*\.)?{p}\.(\d+)(?:\..*)?" for p in patterns] or [
        r"(?:.*\.)?[^.]*\.(\d+)(?:\..*)?"
    ]:
        match = re.fullmatch(pattern, module)
        if match:
            return int(match.group(1))
    return None


def _as_list(value: Any) -> list[Any]:
    return [value] if isinstance(value, (int, str)) else list(value)


def _target(name: str, leaf: Any, kernel_axes: Mapping[str, Any]) -> Target:
    dtype, ndim = jnp.result_type(leaf), jnp.ndim(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"kernel '{name}' has dtype {dtype}; expected real floating point")
    spec = by_pattern(name, kernel_axes, Dims() if ndim == 2 else None)
    if spec is None:
        raise ValueError(
            f"kernel '{name}' of shape {jnp.shape(leaf)} has {ndim} axes, and which of them are "
            f"inputs cannot be known: name them, as in kernel_axes={{'{_names(name)[0]}': "
            "optax.contrib.MuonDimensionNumbers((0,), (1, 2))}, or pass adapters.FLAX_KERNELS"
        )
    axes = _matrices.resolve(spec, name, ndim, "kernel_axes")
    assert axes is not None
    return Target(name, jnp.shape(leaf), axes)
