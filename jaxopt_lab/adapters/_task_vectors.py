"""What the ways of merging share: differences of models, and the largest entries of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _checks, _hyperparams, _order, _tree

PyTree = Any


def check_models(base: PyTree, finetuned: Any) -> list[PyTree]:
    """Returns the models as a list; each must have the paths and shapes of `base`.

    Raises:
      ValueError: no model, or one that differs; the message has every path that does.
      TypeError: no list or tuple of models, or leaves that are complex, or floating in one of the
        two models only.
    """
    if not isinstance(finetuned, (list, tuple)):
        raise TypeError(f"finetuned must be a list of models, got {type(finetuned).__name__}")
    if not finetuned:
        raise ValueError("finetuned must have at least one model, got none")
    for index, model in enumerate((base, *finetuned)):
        _tree.check_arrays(f"finetuned[{index - 1}]" if index else "base", model)
    wanted = dict(_tree.leaves_with_names(base))
    for name, leaf in wanted.items():
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(f"base leaf '{name}' is complex, which cannot be merged")
    for index, model in enumerate(finetuned):
        found = dict(_tree.leaves_with_names(model))
        problems = [f"'{name}' is missing" for name in wanted if name not in found]
        problems += [f"'{name}' is not expected" for name in found if name not in wanted]
        problems += [
            f"'{name}' has shape {jnp.shape(found[name])}, expected {jnp.shape(leaf)}"
            for name, leaf in wanted.items()
            if name in found and jnp.shape(found[name]) != jnp.shape(leaf)
        ]
        if not problems and list(found) != list(wanted):
            problems = ["the leaves come in another order"]
        if problems:
            raise ValueError(f"finetuned[{index}] does not match base: {'; '.join(problems)}")
        for name, leaf in wanted.items():
            if is_floating(leaf) != is_floating(found[name]):
                raise TypeError(
                    f"finetuned[{index}] leaf '{name}' has dtype {jnp.result_type(found[name])}, "
                    f"expected one like {jnp.result_type(leaf)}"
                )
    return list(finetuned)


def check_weights(weights: Any, models: int) -> jax.Array:
    """Returns one weight for each model as an array, `(models,)`.

    Raises:
      ValueError: another number of weights, or one that is not finite or has axes.
      TypeError: a weight that is no real number.
    """
    found = (len(weights),) if isinstance(weights, (list, tuple)) else np.shape(weights)
    if found != (models,):
        raise ValueError(f"weights must have shape ({models},), one for each model, got {found}")
    for index, weight in enumerate(weights):
        _checks.check_scalar(**{f"weights[{index}]": weight})
        if _checks.is_number(weight) and not np.isfinite(weight):
            raise ValueError(f"weights must be finite, got {weight}")
    return jnp.stack([jnp.asarray(weight, jnp.result_type(float)) for weight in weights])


def check_scale(scale: _hyperparams.Scalar) -> None:
    """Refuses a scale that is no finite number.

    Raises:
      ValueError: infinite, NaN or an array with axes.
      TypeError: no real number.
    """
    _checks.check_scalar(scale=scale)
    if _checks.is_number(scale) and not np.isfinite(scale):
        raise ValueError(f"scale must be finite, got {scale}")


def is_floating(leaf: Any) -> bool:
    """Whether the leaf is merged; others are taken from the base."""
    return bool(jnp.issubdtype(jnp.result_type(leaf), jnp.floating))


def differences(base: Any, finetuned: Sequence[Any]) -> list[jax.Array]:
    """Returns `finetuned - base` of one leaf for each model, all in float32 or wider."""
    dtype = _tree.compute_dtype(*map(jnp.result_type, (base, *finetuned)))
    return [jnp.asarray(x).astype(dtype) - jnp.asarray(base).astype(dtype) for x in finetuned]


def weighted(vectors: jax.Array, weights: jax.Array) -> jax.Array:
    """Returns the vectors, `(models, ...)`, each times its weight."""
    shape = (-1,) + (1,) * (vectors.ndim - 1)
    return vectors * weights.astype(vectors.dtype).reshape(shape)


def merged(
    base: PyTree,
    models: Sequence[PyTree],
    merge: Callable[[list[str], list[jax.Array]], list[jax.Array]],
    scale: _hyperparams.Scalar = 1.0,
    weights: jax.Array | None = None,
) -> PyTree:
    """Adds `scale` times what `merge` makes of the task vectors to the floating leaves of `base`.

    What is not finite takes no part in a choice of entries or signs, which could leave it out: it
    is added to the merged entry, as in a weighted sum, and so is there for everybody to see.

    Args:
      base: the common model.
      models: fine-tuned ones, checked.
      merge: `merge(names, vectors)` of the floating leaves, each vector finite and with an axis of
        models in front, returns one array a leaf without that axis.
      scale: factor.
      weights: of the models, `(models,)`, where an entry is not finite; None for 1 each.

    Returns:
      A model with the structure, shapes and dtypes of `base`.
    """
    leaves = _tree.leaves_with_names(base)
    columns = list(zip(*(jax.tree.leaves(model) for model in models)))
    places = [place for place, (_, leaf) in enumerate(leaves) if is_floating(leaf)]
    vectors = [jnp.stack(differences(leaves[place][1], columns[place])) for place in places]
    finite = [jnp.where(jnp.isfinite(vector), vector, 0) for vector in vectors]
    broken = [jnp.where(jnp.isfinite(vector), 0, vector) for vector in vectors]
    if weights is not None:
        broken = [weighted(vector, weights) for vector in broken]
    results = [jnp.asarray(leaf) for _, leaf in leaves]
    updates = merge([leaves[place][0] for place in places], finite)
    for place, update, rest in zip(places, updates, broken):
        leaf, update = results[place], update + rest.sum(0)
        new = leaf.astype(update.dtype) + jnp.asarray(scale, update.dtype) * update
        results[place] = new.astype(leaf.dtype)
    return jax.tree.unflatten(jax.tree.structure(base), results)


def largest(
    magnitudes: Sequence[jax.Array], count: int, *, with_ties: bool = False
) -> list[jax.Array]:
    """Marks the `count` largest entries of all arrays together.

    Of equal ones those with a lower index come first, in the order of the arrays and of their
    flattened entries; `with_ties` marks all that equal the last one. The order statistic is exact.

    Raises:
      ValueError: 2**32 and more entries.
    """
    total = sum(x.size for x in magnitudes)
    if total >= 2**32:
        raise ValueError(f"trimming counts below 2**32 entries, got {total}")
    if count <= 0 or count >= total:
        return [jnp.full(x.shape, count > 0) for x in magnitudes]
    return _largest(list(magnitudes), jnp.uint32(count), with_ties)


@functools.partial(jax.jit, static_argnums=2)
def _largest(magnitudes: list[jax.Array], count: jax.Array, with_ties: bool) -> list[jax.Array]:
    patterns = _order.bit_patterns(magnitudes)
    last = _order.pattern_at(patterns, count - 1)
    if with_ties:
        return [x >= last for x in patterns]
    room = count - sum(jnp.sum(x > last, dtype=jnp.uint32) for x in patterns)
    marks, seen = [], jnp.zeros((), jnp.uint32)
    for x in patterns:
        tied = x == last
        place = seen + jnp.cumsum(tied.ravel(), dtype=jnp.uint32).reshape(x.shape)
        marks.append((x > last) | (tied & (place <= room)))
        seen += jnp.sum(tied, dtype=jnp.uint32)
    return marks
