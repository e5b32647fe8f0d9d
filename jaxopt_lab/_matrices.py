"""Which axes of a parameter make a matrix, for rules that act on matrices.

A kernel is a stack of matrices: its *reduction* axes are summed over when the layer is applied
(the inputs), its *output* axes are the layer's features, and all others count the matrices of the
stack. Flax's dense kernels are (in, out), its convolutions (height, width, in, out).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxopt_lab import _tree

DimensionNumbers = Any | Callable[[optax.Params], Any] | None


_ENDS = re.compile(r"(un)?embed(ding)?|(lm_)?head|logits|output")


class MatrixAxes(NamedTuple):
    """The axes of one parameter, each non-negative, in the order of the parameter."""

    batch: tuple[int, ...]
    reduction: tuple[int, ...]
    output: tuple[int, ...]


def matrix_axes(
    dimension_numbers: DimensionNumbers,
    params: optax.Params,
    default: Callable[[optax.Params], Any],
) -> list[MatrixAxes | None]:
    """Returns the axes of each leaf, None for a leaf that is no matrix.

    Args:
      dimension_numbers: tree of `optax.contrib.MuonDimensionNumbers` or None (a prefix of `params`
        will do), or a function of the parameters that returns one, or None for the default.
      params: the parameters, or anything of their structure and shapes.
      default: the function to use for None.

    Raises:
      ValueError: the tree does not match, or the axes do not fit a leaf; the message has its path.
    """
    if dimension_numbers is None:
        dimension_numbers = default
    if callable(dimension_numbers):
        dimension_numbers = dimension_numbers(params)
    specs = _tree.broadcast_prefix(
        dimension_numbers, params, "dimension_numbers", is_leaf=_is_specification
    )
    named = _tree.leaves_with_names(params)
    return [resolve(spec, name, jnp.ndim(leaf)) for spec, (name, leaf) in zip(specs, named)]


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
        axes = (given,) if isinstance(given, int) else tuple(given)
        if not axes or any(not -ndim <= a < ndim for a in axes):
            raise ValueError(
                f"{what} of '{name}' name the axes {axes}, which a parameter with "
                f"{ndim} axes does not have"
            )
        groups.append(tuple(a % ndim for a in axes))
    reduction, output = groups
    if len({*reduction, *output}) < len(reduction) + len(output):
        raise ValueError(
            f"{what} of '{name}' use an axis twice: reduction {reduction}, output {output}"
        )
    batch = tuple(a for a in range(ndim) if a not in reduction + output)
    return MatrixAxes(batch, reduction, output)


def ends_of_a_model(path: Any) -> bool:
    """Whether a part of the path names an embedding or the output layer."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return any(_ENDS.fullmatch(name) for name in names)


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


def _is_specification(x: Any) -> bool:
    return x is None or isinstance(x, optax.contrib.MuonDimensionNumbers)
