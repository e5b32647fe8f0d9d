"""What each leaf of the parameters is: a matrix and along which axes, a vector, an embedding ...

The one place where this is decided, from the names on a leaf's path (`_names`), its shape, and
what its neighbours say (`_layouts`, `_stacks`). Where these leave it open the answer is "unknown",
which every rule leaves to its plain form: two layers taken for one matrix would be a mistake that
nobody sees.
"""

from __future__ import annotations

import collections
import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _names
from jaxopt_lab._layouts import Axes, MatrixAxes, Shape, matrix
from jaxopt_lab._names import Parts
from jaxopt_lab._stacks import Stacks

Kind = Literal["matrix", "vector", "depthwise", "embedding", "input", "head", "unknown"]


class Role(NamedTuple):
    """What a leaf is."""

    kind: Kind
    axes: MatrixAxes | None  # None for vectors and what is unknown
    reason: str
    has_kernel_name: bool = False


def roles(params: Any) -> tuple[Role, ...]:
    """Returns the role of each leaf, in the order of the leaves; only paths and shapes matter."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    names = names_without_boxes([path for path, _ in flat])
    shapes = tuple(jnp.shape(leaf) for _, leaf in flat)
    if _are_compact.get():
        return tuple(_compact(_names.parts_of(name), shape) for name, shape in zip(names, shapes))
    return _decide(names, shapes)


def on_compact(
    rule: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Returns `rule` for the selected parts of matrices, (matrices..., inputs, outputs) each.

    They have the paths of the parameters that they are parts of, but other axes.
    """

    def on(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            token = _are_compact.set(True)
            try:
                return function(*args, **kwargs)
            finally:
                _are_compact.reset(token)

        return inside

    return optax.GradientTransformationExtraArgs(on(rule.init), on(rule.update))


def names_without_boxes(paths: Sequence[Any]) -> tuple[str, ...]:
    """Returns paths as names; the `value` of a box such as `nnx.Variable` is not part of them."""
    value, index = jax.tree_util.GetAttrKey("value"), jax.tree_util.FlattenedIndexKey
    inside = collections.Counter(path[:-1] for path in paths)

    def plain(path: Any) -> Any:
        # Nodes registered without keys, such as Haliax's named arrays, count their leaves.
        is_box = len(path) > 1 and (path[-1] == value or isinstance(path[-1], index))
        return path[:-1] if is_box and inside[path[:-1]] == 1 else path

    return tuple(jax.tree_util.keystr(plain(path), simple=True, separator="/") for path in paths)


_are_compact = contextvars.ContextVar("are_compact", default=False)


def _compact(parts: Parts, shape: Shape) -> Role:
    rank = len(shape)
    if rank < 2:
        return Role("vector", None, _axes(shape))
    axes = MatrixAxes(tuple(range(rank - 2)), (rank - 2,), (rank - 1,))
    if _names.is_table(parts) or _names.is_input(parts) or _names.is_head(parts):
        return Role("head", axes, "embedding or output layer by its path")
    return Role("matrix", axes, "part of a matrix")


@functools.lru_cache(64)
def _decide(names: tuple[str, ...], shapes: tuple[Shape, ...]) -> tuple[Role, ...]:
    tree = _Tree([_names.parts_of(name) for name in names], shapes)
    return tree.with_last_layer([tree.role(index) for index in range(len(names))])


class _Tree(Stacks):
    """What each leaf of a tree is."""

    def role(self, i: int) -> Role:
        """Returns what one leaf is."""
        parts, shape = self.parts[i], self.shapes[i]
        if self.vectors[i]:
            return Role("vector", None, "vector by its name" if len(shape) > 1 else _axes(shape))
        if len(shape) < 2:
            return Role("vector", None, _axes(shape))
        stack = self.stack(i)
        window = _names.is_plain(parts) and len(shape) - len(stack or ()) > 3
        if _names.is_table(parts) or _names.is_input(parts, window):
            return self._end_of_a_model(i, stack)
        if self.is_thin(i, stack or ()):
            return Role("vector", None, "one axis longer than 1")
        axes, reason = self.axes(i, stack)
        named = _names.is_kernel(parts)
        if axes is None:
            kind: Kind = "vector" if reason.startswith("vector") else "unknown"
            return Role(kind, None, reason, named)
        siblings = self.children[self.module(i)[:-1]] if self.module(i) else ()
        # A kernel (heads, head size, out) is attention's even where it stands alone.
        heads = _names.is_out(parts) and len(axes.reduction) == 2
        if not heads and _names.is_head(parts, siblings, bool(stack)):
            return Role("head", axes, "embedding or output layer by its path", named)
        depthwise = self._depthwise(i, axes)
        if depthwise is not None:
            return Role("depthwise", depthwise, "one input a group", named)
        return Role("matrix", axes, reason, named)

    def with_last_layer(self, found: list[Role]) -> tuple[Role, ...]:
        """Finds an output layer that has no name: outside all others, to the size of a table."""
        tables = [self.shapes[i] for i, role in enumerate(found) if role.kind == "embedding"]
        matrices = [i for i, role in enumerate(found) if role.kind == "matrix"]
        count = collections.Counter(self.shapes[i] for i in matrices)
        depth = min((len(self.parts[i]) for i in matrices), default=0)
        for i in matrices:
            axes, shape = found[i].axes, self.shapes[i]
            if axes is None or len(shape) != 2 or len(self.parts[i]) > depth or count[shape] > 1:
                continue
            fan_in, fan_out = shape[axes.reduction[0]], shape[axes.output[0]]
            generic = set(_names.words(_names.own(self.parts[i]))) & {"linear", "dense"}
            if generic and fan_in < fan_out and (fan_out, fan_in) in tables:
                reason = "embedding or output layer by its size, that of a table"
                found[i] = found[i]._replace(kind="head", reason=reason)
        return tuple(found)

    def _end_of_a_model(self, i: int, stack: Axes | None) -> Role:
        shape, parts, stack = self.shapes[i], self.parts[i], stack or ()
        dense = bool(parts) and _names.words(parts[-1])[0] in ("kernel", "w")
        window = _names.is_plain(parts) and len(shape) - len(stack) != 2
        if _names.is_input(parts, window) or dense or window:
            axes, _ = self.axes(i, stack)
            rank = len(shape)
            if axes is None and rank > 3:
                last = (0,) if self.is_transposed(i) else (rank - 1,)
                axes = matrix(last, rank)
            return Role("input", axes, "embedding or output layer by its path")
        inputs = tuple(a for a in range(len(shape) - 1) if a not in stack)
        if not inputs:
            return Role("vector", None, "vector, one for each layer of a stack")
        axes = MatrixAxes(tuple(a for a in stack if a < len(shape) - 1), inputs, (len(shape) - 1,))
        return Role("embedding", axes, "embedding or output layer by its path")

    def _depthwise(self, i: int, axes: MatrixAxes) -> MatrixAxes | None:
        """Returns the axes of a convolution with one input a group, None for all else."""
        parts, shape = self.parts[i], self.shapes[i]
        if len(axes.output) != 1 or _names.is_out(parts):
            return None
        if len(axes.reduction) > 1:
            inputs = axes.reduction[0] if self.is_transposed(i) else axes.reduction[-1]
            return axes if shape[inputs] == 1 or _names.is_depthwise(parts) else None
        # With two axes it has a window and channels: that of a state space model.
        short, long = sorted(axes.reduction + axes.output, key=lambda axis: shape[axis])
        window = 2 * shape[short] <= shape[long] and shape[short] <= 8
        if window and _names.is_convolution(parts) and not _names.is_pointwise(parts):
            return axes._replace(reduction=(short,), output=(long,))
        return None


def _axes(shape: Shape) -> str:
    return "1 axis" if shape else "scalar"
