"""Which kernels get an adapter, chosen by name as `peft` does, and which of their axes are what."""

from __future__ import annotations

import collections
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import _checks, _matrices, _roles
from jaxopt_lab.adapters import _kernels, _whole

Dims = optax.contrib.MuonDimensionNumbers

_CONVOLUTION = Dims(reduction_axis=(-4, -3, -2), output_axis=(-1,))
FLAX_KERNELS: dict[str, Dims] = {
    r"query|key|value": Dims(reduction_axis=(-3,), output_axis=(-2, -1)),
    r"out": Dims(reduction_axis=(-3, -2), output_axis=(-1,)),
    r".*Conv.*|.*conv.*": _CONVOLUTION,
}
"""`kernel_axes` of Flax's attention (embed, heads, head size) and convolutions (window, in, out).

These are known without it; it serves kernels of which neither neighbours nor shapes say whether
they are stacks of layers. A convolution is over a line, an image or a volume by its number of axes.
"""


class Target(NamedTuple):
    """A kernel chosen, before its rank is known."""

    name: str
    shape: tuple[int, ...]
    axes: _matrices.MatrixAxes


class Candidate(NamedTuple):
    """A leaf that may get an adapter."""

    leaf: Any
    role: _roles.Role


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
    def modules_to_save(self) -> Sequence[str] | None: ...
    @property
    def kernel_axes(self) -> Mapping[str, Any] | None: ...


def check(choice: Choice) -> None:
    """Refuses what is no choice of layers, by the name of the field.

    Raises:
      TypeError: no text or list of texts, no number of a layer or list of them, or no dict.
    """
    _checks.check_names(target_modules=choice.target_modules)
    for name in ("exclude_modules", "layers_pattern"):
        if getattr(choice, name) is not None:
            _checks.check_names(**{name: getattr(choice, name)})
    layers = choice.layers_to_transform
    if layers is not None:
        entries = layers if isinstance(layers, (list, tuple, range)) else [layers]
        if any(isinstance(x, bool) or not isinstance(x, (int, np.integer)) for x in entries):
            raise TypeError(
                f"layers_to_transform must be the number of a layer or a list of them, got "
                f"{layers!r}"
            )
    check_axes(choice.kernel_axes)


def check_axes(kernel_axes: Any) -> None:
    """Refuses what is no dict of axes.

    Raises:
      TypeError: the message says what was given.
    """
    if kernel_axes is not None:
        kind = "of optax.contrib.MuonDimensionNumbers by pattern"
        _checks.check_mapping(kind, kernel_axes=kernel_axes)


def check_config(config: Any) -> None:
    """Refuses what `init_adapters` can make nothing of.

    Raises:
      TypeError: the message says what was given.
    """
    kind = "a LoraConfig, PerpConfig or MissConfig"
    _checks.check_interface(kind, ("kernels", "start"), config=config)


def choose(params: Any, choice: Choice) -> tuple[Target, ...]:
    """Returns the kernels chosen, in the order of the tree.

    Raises:
      ValueError: a pattern that matches nothing, with the nearest paths; a kernel whose axes
        nothing tells and that `kernel_axes` does not name.
      TypeError: a kernel that is not real floating point.
    """
    kernels = candidates(params)
    if not kernels:
        raise ValueError(
            "params has nothing to adapt, no leaf with two axes or more that is no bias or norm; "
            f"got {_kernels.shown(params)}"
        )
    chosen = _matching(kernels, choice.target_modules, "target_modules")
    if choice.exclude_modules is not None:
        chosen -= _matching(kernels, choice.exclude_modules, "exclude_modules")
    if choice.layers_to_transform is not None:
        wanted = _as_list(choice.layers_to_transform)
        chosen = {n for n in chosen if _layer(n, choice.layers_pattern) in wanted}
    # What is trained whole needs no factors; a saved module may be without a kernel.
    chosen -= _whole.saved(_kernels.named_leaves(params), choice.modules_to_save)
    if not chosen:
        raise ValueError(
            "no kernel is left: exclude_modules, layers_to_transform or modules_to_save take away "
            f"all that target_modules={choice.target_modules!r} matches"
        )
    axes = choice.kernel_axes or {}
    own = [pattern for pattern in axes if pattern not in FLAX_KERNELS]
    check_patterns(kernels, own, "kernel_axes")
    return tuple(target(n, kernel, axes) for n, kernel in kernels.items() if n in chosen)


def candidates(params: Any) -> dict[str, Candidate]:
    """Returns by path everything with two axes or more that is no bias or norm."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {
        _kernels.leaf_name(path): Candidate(leaf, role)
        for (path, leaf), role in zip(flat, _roles.roles(params))
        if jnp.ndim(leaf) >= 2 and role.kind != "vector"
    }


def by_pattern(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Returns the value of the first pattern that matches a kernel's module or path.

    A pattern matches from the beginning or from a dot, to the end, as in `peft`.
    """
    for pattern, value in patterns.items():
        if any(re.fullmatch(rf"(.*\.)?({pattern})", known) for known in _names(name)):
            return value
    return default


def exactly(name: str) -> str:
    """Returns a pattern for one kernel or layer alone: "head" is not to mean "model.head" too."""
    return "^" + re.escape(name.replace("/", "."))


def patterns(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the commonest value, and the others by patterns for one kernel or layer alone."""
    default = collections.Counter(values.values()).most_common(1)[0][0]
    return default, {exactly(n): value for n, value in values.items() if value != default}


def check_patterns(names: Iterable[str], patterns: Iterable[str], what: str) -> None:
    """Refuses patterns that match none of the kernels, with the nearest paths."""
    names = list(names)
    for pattern in patterns:
        if not any(by_pattern(name, {pattern: True}, False) for name in names):
            raise ValueError(_nothing_matches(pattern, names, what))


def _matching(
    candidates: Mapping[str, Candidate], wanted: str | Sequence[str], what: str
) -> set[str]:
    if wanted == "all-linear":
        # Of what is unknown the axes must be named, rather than its layer left out.
        hidden = ("matrix", "unknown")
        return {name for name, (_, role) in candidates.items() if role.kind in hidden}
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
    return [value] if isinstance(value, (int, np.integer, str)) else list(value)


def target(name: str, kernel: Candidate, kernel_axes: Mapping[str, Any]) -> Target:
    """Returns one kernel with its axes; see `choose`."""
    leaf, role = kernel
    dtype, ndim = jnp.result_type(leaf), jnp.ndim(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"kernel '{name}' has dtype {dtype}; expected real floating point")
    named = {p: spec for p, spec in kernel_axes.items() if FLAX_KERNELS.get(p) != spec}
    spec = by_pattern(name, named, _matrices.specification(role.axes))
    spec = by_pattern(name, kernel_axes, None) if spec is None else spec
    if spec is _CONVOLUTION and ndim in (3, 5):
        spec = Dims(tuple(range(-ndim, -1)), (-1,))
    if spec is None:
        raise ValueError(
            f"kernel '{name}' of shape {jnp.shape(leaf)} has {ndim} axes, and which of them are "
            f"inputs cannot be known: name them, as in kernel_axes={{'{_names(name)[0]}': "
            "optax.contrib.MuonDimensionNumbers((0,), (1, 2))}, or pass adapters.FLAX_KERNELS"
        )
    axes = _matrices.resolve(spec, name, ndim, "kernel_axes")
    assert axes is not None
    return Target(name, jnp.shape(leaf), axes)
