r"""TIES: trim the task vectors, elect a sign for each entry, average what agrees with it.

    tau_t <- the largest `density` of |tau_t|, 0 elsewhere
    s = sign(sum_t tau_t)
    theta = theta_0 + scale (mean of the tau_t with sign s)

Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023, arXiv:2306.01708.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks, _hyperparams
from jaxopt_lab.adapters import _task_vectors


def ties_merge(
    base: Any,
    finetuned: Any,
    density: float = 0.2,
    weights: Any = None,
    scale: _hyperparams.Scalar = 1.0,
    *,
    scope: Literal["global", "tensor"] = "global",
    elect: Literal["mass", "frequency"] = "mass",
    zero_sign: Literal["majority", "positive"] = "majority",
    keep: Literal["exact", "authors"] = "exact",
) -> Any:
    r"""Merges fine-tuned models entry by entry, by the sign that most of their change has.

    .. math::
      \hat\tau_t &= \tau_t \odot [\,|\tau_t| \text{ among the } \lfloor K d \rfloor
        \text{ largest}\,], \quad \tau_t = \theta_t - \theta_0 \\
      s &= \mathrm{sign} \sum_t \hat\tau_t, \quad A = \{t : \mathrm{sign}\,\hat\tau_t = s\} \\
      \theta &= \theta_0 + \lambda \frac{1}{|A|} \sum_{t \in A} w_t \hat\tau_t

    with 0 where no task agrees. The weights count after the election, as in peft; the authors have
    none. The authors' program is `keep="authors"`; peft's is `scope="tensor"` and
    `zero_sign="positive"`.

    Args:
      base: :math:`\theta_0`, a tree of arrays.
      finetuned: :math:`\theta_1 \dots \theta_T`, a list of trees with its paths and shapes.
      density: :math:`K`, the fraction of entries that is kept, in (0, 1]; 1 trims nothing.
      weights: :math:`w_1 \dots w_T`, `(T,)`, a list of numbers or an array, of either sign; None
        for 1 each. They count after the election.
      scale: :math:`\lambda`, a number or an array of shape `()`.
      scope: among which entries the largest are kept and zero signs decided: `"global"`, all of a
        model together; or `"tensor"`, each leaf for itself.
      elect: `"mass"`, the sign of the sum as above; or `"frequency"`, that of the sum of signs.
      zero_sign: the sign elected where the sum is zero: `"majority"`, the one that most entries of
        the scope have (none if there is no majority); or `"positive"`.
      keep: `"exact"`, of equal magnitudes those with the lower index; or `"authors"`, one more and
        everything equal to it.

    Returns:
      A model with the structure, shapes and dtypes of `base`, computed in float32 or wider. Leaves
      that are not floating are those of `base`. NaN and infinity in a model are neither trimmed nor
      outvoted: they are NaN or infinity in the same entry of the result, and change no other.

    Raises:
      ValueError: paths or shapes differ (the message lists them), no model, `density` outside
        (0, 1], another number of weights, or an unknown option.
      TypeError: models that are no list, complex leaves, leaves that are floating in one of two
        models only, or a scale or weights that are no real numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> base = {"kernel": jnp.zeros(4)}
      >>> models = [{"kernel": jnp.array(x)} for x in ([4.0, 0.1, 3.0, 0.2], [2.0, 5.0, -1.0, 0.0])]
      >>> ties_merge(base, models, density=0.75)["kernel"].tolist()
      [3.0, 5.0, 3.0, 0.20000000298023224]

    References:
      Yadav et al., `TIES-Merging <https://arxiv.org/abs/2306.01708>`_, 2023.
    """
    models = _task_vectors.check_models(base, finetuned)
    if not _checks.is_number(density) or not 0 < density <= 1:
        raise ValueError(f"density must be a number in (0, 1], got {density}")
    _checks.check_choice(("global", "tensor"), scope=scope)
    _checks.check_choice(("mass", "frequency"), elect=elect)
    _checks.check_choice(("majority", "positive"), zero_sign=zero_sign)
    _checks.check_choice(("exact", "authors"), keep=keep)
    _task_vectors.check_scale(scale)
    if weights is not None:
        weights = _task_vectors.check_weights(weights, len(models))

    def merge_group(vectors: list[jax.Array]) -> list[jax.Array]:
        count = math.floor(density * sum(x[0].size for x in vectors)) + (keep == "authors")

        def trim(task: list[jax.Array]) -> list[jax.Array]:
            marks = _task_vectors.largest(
                [jnp.abs(x) for x in task], count, with_ties=keep == "authors"
            )
            return [jnp.where(mark, x, 0) for mark, x in zip(marks, task)]

        trimmed = jax.vmap(trim)(vectors)
        votes = trimmed if elect == "mass" else [jnp.sign(x) for x in trimmed]
        signs = [jnp.sign(x.sum(0, keepdims=True)) for x in votes]
        winner = jnp.ones((), jnp.int32)
        if zero_sign == "majority":
            counts = (jnp.sum(sign.astype(jnp.int32), dtype=jnp.int32) for sign in signs)
            winner = jnp.sign(sum(counts, start=jnp.zeros((), jnp.int32)))
        signs = [jnp.where(sign == 0, winner.astype(sign.dtype), sign) for sign in signs]
        return [_mean_of_agreeing(x, sign, weights) for x, sign in zip(trimmed, signs)]

    def merge(names: list[str], vectors: list[jax.Array]) -> list[jax.Array]:
        del names
        if scope == "global":
            return merge_group(vectors)
        return [merge_group([vector])[0] for vector in vectors]

    return _task_vectors.merged(base, models, merge, scale, weights)


def _mean_of_agreeing(trimmed: jax.Array, sign: jax.Array, weights: Any) -> jax.Array:
    """Returns the mean over the models whose entry has the elected sign, 0 if there is none."""
    agrees = (jnp.sign(trimmed) == sign) & (trimmed != 0)
    values = trimmed if weights is None else _task_vectors.weighted(trimmed, weights)
    total = jnp.sum(jnp.where(agrees, values, 0), axis=0)
    return total / jnp.maximum(jnp.sum(agrees, axis=0), 1).astype(total.dtype)
