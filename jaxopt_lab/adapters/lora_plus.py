r"""LoRA+: the factor on the output side learns faster.

    eta_a = eta,      eta_b = lambda eta

Hayou, Ghosh and Yu, "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024,
arXiv:2402.12354, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _hyperparams, _names
from jaxopt_lab.adapters import _kernels


def lora_plus_labels(adapters: Any) -> Any:
    """Labels adapters for `optax.partition`: "b" for what learns faster, "a" for the rest.

    As in the authors' code "b" is `lora_b` and everything that is a vector (DoRA's magnitudes, and
    biases and norms that are trained whole, those of heads and stacks too); kernels and embeddings
    that are trained whole are "a".

    Args:
      adapters: from `init_adapters`, or any tree.

    Returns:
      A tree of the same structure with the labels.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1)
      >>> _, lora = adapters.init_adapters({"w": jnp.eye(2)}, config, jax.random.key(0))
      >>> adapters.lora_plus_labels(lora)
      {'w': {'lora_a': 'a', 'lora_b': 'b'}}
    """

    def label(path: tuple[Any, ...], leaf: Any) -> str:
        name = _kernels.leaf_name(path)
        if name.split("/")[-1] in ("lora_b", "lora_magnitude") or jnp.ndim(leaf) == 1:
            return "b"
        return "b" if _names.is_vector(_names.parts_of(name)) else "a"

    return jax.tree_util.tree_map_with_path(label, adapters)


def lora_plus(
    optimizer: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation],
    learning_rate: optax.ScalarOrSchedule,
    ratio: _hyperparams.Scalar,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains adapters with a larger learning rate for `lora_b`.

    .. math::
      \eta_a = \eta, \quad \eta_b = \lambda \eta

    Since `b` starts at zero and grows to the size of a change of the kernel, its best rate is
    larger by a power of the width; the authors advise half of LoRA's rate for `a` and a ratio that
    is larger for harder tasks (their example: 20).

    Args:
      optimizer: learning rate -> optax transformation, such as `optax.adamw`.
      learning_rate: :math:`\eta`, a number or a schedule.
      ratio: :math:`\lambda`, at least 1.

    Returns:
      A transformation of the adapters.

    Raises:
      ValueError: a ratio below 1, a rate below 0, or one of them not finite or an array with axes.
      TypeError: a ratio that is no number, a rate that is neither a number nor a schedule, or an
        `optimizer` that makes no transformation, such as one that is made already.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import adapters
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1)
      >>> _, lora = adapters.init_adapters({"w": jnp.eye(2)}, config, jax.random.key(0))
      >>> tx = adapters.lora_plus(optax.sgd, 0.5, ratio=4)
      >>> updates, _ = tx.update(jax.tree.map(jnp.ones_like, lora), tx.init(lora))
      >>> updates["w"]["lora_b"]
      Array([[-2., -2.]], dtype=float32)

    References:
      Hayou, Ghosh and Yu, `LoRA+ <https://arxiv.org/abs/2402.12354>`_, ICML 2024.
    """
    if not callable(optimizer):
        raise TypeError(
            "optimizer must be a function of the learning rate, such as optax.adamw, got "
            f"{type(optimizer).__name__}"
        )
    _checks.check_scalar_or_schedule(learning_rate=learning_rate)
    _checks.check_finite(ratio=ratio)
    if _checks.is_number(ratio) and not ratio >= 1:
        raise ValueError(f"ratio must be at least 1, got {ratio}")

    def faster(count: Any) -> Any:
        return ratio * learning_rate(count)  # type: ignore[operator]

    rate = faster if callable(learning_rate) else ratio * learning_rate
    transforms: dict[Hashable, optax.GradientTransformation] = {
        "a": optimizer(learning_rate),
        "b": optimizer(rate),
    }
    _checks.check_transformation(**{"what optimizer returns": transforms["b"]})
    return optax.with_extra_args_support(optax.partition(transforms, lora_plus_labels))
