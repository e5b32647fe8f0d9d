r"""Task arithmetic: weighted sums of what fine-tuning changed.

    tau_t = theta_t - theta_0,   theta = theta_0 + sum_t w_t tau_t

Ilharco et al., "Editing Models with Task Arithmetic", 2023, arXiv:2212.04089.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_lab.adapters import _task_vectors


def task_vector(base: Any, finetuned: Any) -> Any:
    r"""What fine-tuning changed.

    .. math::
      \tau = \theta - \theta_0

    Args:
      base: :math:`\theta_0`, a tree of arrays.
      finetuned: :math:`\theta`, a tree with the same paths and shapes.

    Returns:
      A tree like `base` in float32 (float64 for float64 leaves), with zeros for leaves that are not
      floating, in their own dtype.

    Raises:
      ValueError: paths or shapes differ; the message lists them.
      TypeError: complex leaves, or leaves that are floating in one of the two models only.

    Examples:
      >>> import jax.numpy as jnp
      >>> base = {"kernel": jnp.array([1.0, 2.0]), "step": jnp.array(3)}
      >>> tau = task_vector(base, {"kernel": jnp.array([1.5, 2.0]), "step": jnp.array(9)})
      >>> tau["kernel"].tolist(), tau["step"].tolist()
      ([0.5, 0.0], 0)

    References:
      Ilharco et al., `Editing Models with Task Arithmetic
      <https://arxiv.org/abs/2212.04089>`_, 2023.
    """
    (finetuned,) = _task_vectors.check_models(base, [finetuned])

    def one(before: Any, after: Any) -> jax.Array:
        if not _task_vectors.is_floating(before):
            return jnp.zeros_like(before)
        (vector,) = _task_vectors.differences(before, [after])
        return vector

    leaves = [one(*pair) for pair in zip(jax.tree.leaves(base), jax.tree.leaves(finetuned))]
    return jax.tree.unflatten(jax.tree.structure(base), leaves)


def task_arithmetic(base: Any, finetuned: Any, weights: Any) -> Any:
    r"""Adds a weighted sum of task vectors to the base model.

    .. math::
      \theta = \theta_0 + \sum_t w_t (\theta_t - \theta_0)

    Weights of :math:`1 / T` average the models; a negative one takes a task away.

    Args:
      base: :math:`\theta_0`, a tree of arrays.
      finetuned: :math:`\theta_1 \dots \theta_T`, a list of trees with its paths and shapes.
      weights: :math:`w_1 \dots w_T`, `(T,)`; a list of numbers or an array, of either sign.

    Returns:
      A model with the structure, shapes and dtypes of `base`, computed in float32 or wider. Leaves
      that are not floating are those of `base`. NaN and infinity in a model are NaN or infinity
      in the same entry of the result, and change no other.

    Raises:
      ValueError: paths or shapes differ (the message lists them), no model, another number of
        weights, or one that is not finite.
      TypeError: models that are no list, complex leaves, leaves that are floating in one of two
        models only, or weights that are no real numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> base = {"kernel": jnp.array([1.0, 1.0])}
      >>> models = [{"kernel": jnp.array([3.0, 1.0])}, {"kernel": jnp.array([1.0, 5.0])}]
      >>> task_arithmetic(base, models, [0.5, -0.5])["kernel"].tolist()
      [2.0, -1.0]

    References:
      Ilharco et al., `Editing Models with Task Arithmetic
      <https://arxiv.org/abs/2212.04089>`_, 2023.
    """
    models = _task_vectors.check_models(base, finetuned)
    weights = _task_vectors.check_weights(weights, len(models))

    def merge(names: list[str], vectors: list[jax.Array]) -> list[jax.Array]:
        del names
        # Sums of products rather than a contraction, which an accelerator would round to bfloat16.
        return [_task_vectors.weighted(vector, weights).sum(0) for vector in vectors]

    return _task_vectors.merged(base, models, merge, weights=weights)
