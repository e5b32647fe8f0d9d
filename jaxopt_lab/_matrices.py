"""Which axes of a parameter make a matrix, for rules that act on matrices, and its reshaping.

A kernel is a stack of matrices: its *reduction* axes are summed over when the layer is applied
(the inputs), its *output* axes are the layer's features, and all others count the matrices of the
stack. Users say which are which by `dimension_numbers`; for all else `_roles` decides.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import _checks, _roles, _tree
from jaxopt_lab._roles import MatrixAxes, Role

DimensionNumbers = Any | Mapping[str, Any] | Callable[[optax.Params], Any] | None


class Choice(NamedTuple):
    """What was decided of one leaf."""

    name: str
    shape: tuple[int, ...]
    axes: MatrixAxes | None
    reason: str
    role: Role | None  # None where the user has decided


def choices(
    dimension_numbers: DimensionNumbers,
    params: optax.Params,
    default: Callable[[Role], MatrixAxes | None],
) -> list[Choice]:
    """Returns what each leaf is, in the order of the leaves.

    Args:
      dimension_numbers: tree of `optax.contrib.MuonDimensionNumbers` or None (a prefix of `params`
        will do), or a function of the parameters that returns one; or a mapping of patterns of
        paths to them, see `by_patterns`; or None for the default.
      params: the parameters, or anything of their structure and shapes.
      default: the axes that a leaf of a role has, None for none.

    Raises:
      ValueError: the tree does not match, a pattern matches nothing, or the axes do not fit a
        leaf; the message has its path.
    """
    roles = _roles.roles(params)
    names = [name for name, _ in _tree.leaves_with_names(params)]
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    specs = _specifications(dimension_numbers, params, roles)
    found = []
    for name, shape, role, spec in zip(names, shapes, roles, specs):
        if spec is _BY_DEFAULT:
            axes = default(role)
            reason = role.reason if axes is None else _shown(axes, shape)
            found.append(Choice(name, shape, axes, reason, role))
        else:
            axes = resolve(spec, name, len(shape))
            reason = "by dimension_numbers" if axes is None else _shown(axes, shape)
            found.append(Choice(name, shape, axes, reason, None))
    return found


def matrix_axes(
    dimension_numbers: DimensionNumbers,
    params: optax.Params,
    default: Callable[[Role], MatrixAxes | None],
) -> list[MatrixAxes | None]:
    """Returns the axes of each leaf, None for a leaf that is no matrix; see `choices`."""
    return [choice.axes for choice in choices(dimension_numbers, params, default)]


def hidden(role: Role) -> MatrixAxes | None:
    """Returns the axes of hidden matrices alone: neither embedding nor head, nor depthwise."""
    return role.axes if role.kind == "matrix" else None


def any_matrix(role: Role) -> MatrixAxes | None:
    """Returns the axes of every leaf whose axes are known."""
    return role.axes


def specification(axes: MatrixAxes | None) -> optax.contrib.MuonDimensionNumbers | None:
    """Returns axes as optax spells them."""
    if axes is None:
        return None
    output = axes.output[0] if len(axes.output) == 1 else axes.output
    return optax.contrib.MuonDimensionNumbers(axes.reduction, output)


def check(dimension_numbers: DimensionNumbers) -> None:
    """Refuses what says nothing of axes: a number or text in the place of a tree.

    Raises:
      TypeError: the message says what was given.
    """
    kinds = "optax.contrib.MuonDimensionNumbers (or a dict of them by pattern)"
    _checks.check_per_leaf(kinds, dimension_numbers=dimension_numbers)


def resolve(spec: Any, name: str, ndim: int, what: str = "dimension_numbers") -> MatrixAxes | None:
    """Returns the axes that `spec` names, of a parameter with `ndim` axes, or None for None.

    Raises:
      ValueError: the axes do not fit; the message begins with `what` and has the path.
    """
    if spec is None:
        return None
    if not isinstance(spec, optax.contrib.MuonDimensionNumbers):
        raise ValueError(
            f"{what} of '{name}' must be optax.contrib.MuonDimensionNumbers or None, got {spec!r}"
        )
    groups = []
    for given in spec:
        axes = (given,) if isinstance(given, (int, np.integer)) else tuple(given)
        if not axes or any(not -ndim <= a < ndim for a in axes):
            raise ValueError(
                f"{what} of '{name}' name the axes {axes}, which a parameter with "
                f"{ndim} axes does not have"
            )
        groups.append(tuple(int(a) % ndim for a in axes))
    reduction, output = groups
    if len({*reduction, *output}) < len(reduction) + len(output):
        raise ValueError(
            f"{what} of '{name}' use an axis twice: reduction {reduction}, output {output}"
        )
    batch = tuple(a for a in range(ndim) if a not in reduction + output)
    return MatrixAxes(batch, reduction, output)


def spellings(name: str) -> tuple[str, ...]:
    """Returns what a pattern may call a leaf: its path, with and without the `value` of a box."""
    return (name, name.removesuffix("/value")) if name.endswith("/value") else (name,)


def by_patterns(
    patterns: Mapping[str, Any], names: Sequence[str], is_layer: Sequence[bool], default: Any
) -> list[Any]:
    """Returns for each leaf the value of the first pattern that matches it.

    A pattern matches from the beginning of a path or from a "/", to its end, or to the end of the
    layer's path, which stands for what is no vector in it.

    Raises:
      ValueError: a pattern that is none, or that matches nothing, with the nearest paths.
    """
    compiled = {}
    for pattern in patterns:
        try:
            compiled[pattern] = re.compile(rf"(.*/)?(?:{pattern})")
        except re.error as error:
            raise ValueError(f"dimension_numbers: {pattern!r} is no pattern: {error}") from None
    matched, found = set(), []
    for name, layer in zip(names, is_layer):
        known = list(spellings(name))
        known += [known[-1].rpartition("/")[0]] if layer and "/" in known[-1] else []
        hits = [p for p, regex in compiled.items() if any(map(regex.fullmatch, known))]
        matched.update(hits)
        found.append(patterns[hits[0]] if hits else default)
    for pattern in patterns:
        # A tree without leaves is what optax.tree.map_params asks with.
        if names and pattern not in matched:
            raise ValueError(
                "dimension_numbers does not match the parameters: the pattern "
                f"{pattern!r} matches none; the nearest are {nearest(pattern, names)}"
            )
    return found


def nearest(pattern: str, names: Iterable[str]) -> str:
    """Returns the names that look most like a pattern, as a text."""
    plain = re.sub(r"[^\w./]", "", pattern)
    known = sorted({spellings(name)[-1] for name in names})
    return ", ".join(difflib.get_close_matches(plain, known, n=3, cutoff=0.0)) or "none"


def to_matrices(x: jax.Array, axes: MatrixAxes) -> jax.Array:
    """Reshapes `x` to (matrices, inputs, outputs)."""
    sizes = [
        int(np.prod([x.shape[a] for a in group], dtype=np.int64))
        for group in (axes.batch, axes.reduction, axes.output)
    ]
    return jnp.transpose(x, sum(axes, ())).reshape(sizes)


def from_matrices(x: jax.Array, axes: MatrixAxes, shape: tuple[int, ...]) -> jax.Array:
    """Undoes `to_matrices` for a parameter of shape `shape`."""
    order = sum(axes, ())
    return jnp.transpose(x.reshape([shape[a] for a in order]), [int(a) for a in np.argsort(order)])


_BY_DEFAULT = object()


def _specifications(
    dimension_numbers: DimensionNumbers, params: optax.Params, roles: Sequence[Role]
) -> list[Any]:
    """Returns what the user says of each leaf, `_BY_DEFAULT` where that is nothing."""
    if dimension_numbers is None:
        return [_BY_DEFAULT] * len(roles)
    if _tree.is_function(dimension_numbers):
        dimension_numbers = dimension_numbers(params)
    try:
        return _tree.broadcast_prefix(
            dimension_numbers, params, "dimension_numbers", is_leaf=_is_specification
        )
    except ValueError:
        if not isinstance(dimension_numbers, Mapping) or not _are_patterns(dimension_numbers):
            raise
    names = [name for name, _ in _tree.leaves_with_names(params)]
    is_layer = [role.kind != "vector" for role in roles]
    return by_patterns(dimension_numbers, names, is_layer, _BY_DEFAULT)


def _are_patterns(given: Mapping[Any, Any]) -> bool:
    return all(isinstance(key, str) and _is_specification(x) for key, x in given.items())


def _is_specification(x: Any) -> bool:
    """Whether this is meant for one leaf; plain tuples of axes too, so as to be refused by name."""
    return x is None or _is_given(x) or _are_axes(x)


def _is_given(x: Any) -> bool:
    return isinstance(x, optax.contrib.MuonDimensionNumbers)


def _are_axes(x: Any) -> bool:
    leaves = jax.tree.leaves(x, is_leaf=_is_given) if isinstance(x, (tuple, list)) else []
    return any(isinstance(leaf, (int, np.integer)) for leaf in leaves)


def _shown(axes: MatrixAxes, shape: tuple[int, ...]) -> str:
    """Returns a text such as "12 matrices, inputs 1, outputs 2 3"."""
    if axes == ((), (0,), (1,)):
        return "matrix"
    count = int(np.prod([shape[a] for a in axes.batch], dtype=np.int64))
    what = f"{count} matrices" if axes.batch else "matrix"
    inputs, outputs = (" ".join(map(str, group)) for group in axes[1:])
    return f"{what}, inputs {inputs}, outputs {outputs}"
