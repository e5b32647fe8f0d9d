r"""Model breadcrumbs: task vectors without their largest outliers and without their small entries.

    of each row of tau_t: the floor(L gamma) largest magnitudes become 0,
    of the rest the floor(L beta) largest stay
    theta = theta_0 + alpha sum_t tau_t

Davari and Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks",
2023, arXiv:2312.06795.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks, _hyperparams
from jaxopt_lab.adapters import _task_vectors

Axis = Literal["in", "last"] | Callable[[str, jax.Array], int] | None


def breadcrumbs_merge(
    base: Any,
    finetuned: Any,
    keep: float = 0.15,
    remove: float = 0.006,
    scale: _hyperparams.Scalar = 0.2,
    *,
    remove_first: bool = True,
    scope: Literal["row", "layer"] = "row",
    axis: Axis = None,
) -> Any:
    r"""Adds the middle of each row of the task vectors to the base model.

    .. math::
      \theta = \theta_0 + \alpha \sum_t m_t \odot (\theta_t - \theta_0)

    where :math:`m_t` marks the entries of a row of length :math:`L` whose place among its
    magnitudes, the largest at 0, is in
    :math:`[\lfloor L\gamma \rfloor, \lfloor L\gamma \rfloor + \lfloor L\beta \rfloor)`, or with
    `remove_first=False` in :math:`[\lfloor L\gamma \rfloor, \lfloor L\beta \rfloor)`. Of equal
    magnitudes the one with the lower index is the larger.

    A row of the authors' program holds the weights of one output. In kernels laid out (in, out)
    that is a column: their rows run along the axis before the last. Vectors are one row; scalars
    are added whole. The paper speaks of layers instead, `scope="layer"`.

    Args:
      base: :math:`\theta_0`, a tree of arrays.
      finetuned: :math:`\theta_1 \dots \theta_T`, a list of trees with its paths and shapes.
      keep: :math:`\beta`, the fraction of a row that stays, in [0, 1].
      remove: :math:`\gamma`, the fraction of a row that is taken off the top, in [0, 1]. The
        defaults are those that the authors' search starts from.
      scale: :math:`\alpha`, a number or an array of shape `()`.
      remove_first: take off the top before the rest is chosen; else after, out of what was chosen.
      scope: `"row"`, or `"layer"`: all entries of a leaf are one row.
      axis: along which axis the rows of leaves with two or more axes run: `"in"`, the one before
        the last, except for leaves called `embedding`, which have the authors' layout and whose
        rows run along the last; `"last"`; or a function of the leaf's path, such as
        `layers/0/kernel`, and the leaf that returns an axis. None is `"in"`.

    Returns:
      A model with the structure, shapes and dtypes of `base`, computed in float32 or wider. Leaves
      that are not floating are those of `base`. NaN and infinity in a model are no outliers to be
      taken off: they are NaN or infinity in the same entry of the result, and change no other.

    Raises:
      ValueError: paths or shapes differ (the message lists them), no model, a fraction outside
        [0, 1], an unknown option, an axis that the leaf does not have, or an axis for layers.
      TypeError: models that are no list, complex leaves, leaves that are floating in one of two
        models only, or a fraction or a scale that is no real number.

    Examples:
      >>> import jax.numpy as jnp
      >>> base = {"bias": jnp.zeros(5)}
      >>> model = {"bias": jnp.array([9.0, -4.0, 3.0, 2.0, 1.0])}
      >>> breadcrumbs_merge(base, [model], keep=0.4, remove=0.2, scale=1.0)["bias"].tolist()
      [0.0, -4.0, 3.0, 0.0, 0.0]

    References:
      Davari and Belilovsky, `Model Breadcrumbs <https://arxiv.org/abs/2312.06795>`_, 2023.
    """
    models = _task_vectors.check_models(base, finetuned)
    for name, value in {"keep": keep, "remove": remove}.items():
        if not _checks.is_number(value):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    _checks.check_flag(remove_first=remove_first)
    _checks.check_fraction(keep=keep, remove=remove)
    _task_vectors.check_scale(scale)
    _checks.check_choice(("row", "layer"), scope=scope)
    if scope == "layer" and axis is not None:
        raise ValueError(f"axis must be None with scope layer, got {axis!r}")
    if not callable(axis) and axis is not None:
        _checks.check_choice(("in", "last"), axis=axis)

    def middle(row: jax.Array) -> jax.Array:
        top, kept = math.floor(row.size * remove), math.floor(row.size * keep)
        magnitudes = jnp.abs(row)
        (outer,) = _task_vectors.largest([magnitudes], top + kept if remove_first else kept)
        (inner,) = _task_vectors.largest([magnitudes], top)
        return jnp.where(outer & ~inner, row, 0)

    def merge(names: list[str], vectors: list[jax.Array]) -> list[jax.Array]:
        return [one(name, vector) for name, vector in zip(names, vectors)]

    def one(name: str, vector: jax.Array) -> jax.Array:
        if vector[0].size == 0 or vector.ndim == 1:
            return vector.sum(0)
        if scope == "layer":
            rows = vector.reshape(vector.shape[0], -1)
            return jax.vmap(middle)(rows).reshape(vector.shape).sum(0)
        along = 1 + _row_axis(axis, name, vector[0])
        rows = jnp.moveaxis(vector, along, -1)
        found = jax.vmap(middle)(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape)
        return jnp.moveaxis(found, -1, along).sum(0)

    return _task_vectors.merged(base, models, merge, scale)


def _row_axis(axis: Axis, name: str, leaf: jax.Array) -> int:
    if leaf.ndim == 1 or axis == "last":
        return leaf.ndim - 1
    if not callable(axis):
        return leaf.ndim - (1 if name.split("/")[-1] == "embedding" else 2)
    found = axis(name, leaf)
    if not isinstance(found, int) or not -leaf.ndim <= found < leaf.ndim:
        raise ValueError(f"axis must return an axis of '{name}', shape {leaf.shape}, got {found!r}")
    return found % leaf.ndim
