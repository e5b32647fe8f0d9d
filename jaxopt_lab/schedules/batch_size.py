r"""How a learning rate goes over to another batch size.

    SGD:   eta(B') = eta(B) B' / B          up to a batch where noise no longer limits the step
    Adam:  eta(B') = eta(B) sqrt(B' / B)

Granziol et al., "Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to
Neural Network Training", 2020, arXiv:2006.09092.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import jax.numpy as jnp
import optax

from jaxopt_lab import _checks
from jaxopt_lab.schedules import _phases

Rule = Literal["linear", "sqrt"]
_POWERS: dict[Rule, float] = {"linear": 1.0, "sqrt": 0.5}


def scale_learning_rate(
    rate: optax.ScalarOrSchedule,
    batch_size: int,
    new_batch_size: int,
    rule: Rule,
    saturation: int | None = None,
) -> Any:
    r"""Scales a learning rate, or a whole schedule, from one batch size to another.

    .. math::
      \eta(B') = \eta(B) \left(\frac{\min(B', S)}{\min(B, S)}\right)^{a},
      \quad a = 1 \;\text{(linear)} \;\text{or}\; \tfrac{1}{2} \;\text{(sqrt)}

    The noise of a batch adds to the largest eigenvalue of its Hessian, and less so for larger
    batches: SGD may step longer in proportion, Adam, whose denominator already grows with the
    noise, by the root. A schedule keeps its steps: that an epoch has fewer updates is not known
    here.

    Args:
      rate: :math:`\eta(B)`, a number, an array of shape `()` or a schedule.
      batch_size: :math:`B`, examples in a batch for which `rate` is right.
      new_batch_size: :math:`B'`, examples in a batch of the new run.
      rule: `"linear"` for SGD, `"sqrt"` for Adam and its kin.
      saturation: :math:`S`, examples in the batch from which on the rate no longer grows; None for
        no such bound.

    Returns:
      The new rate, of the kind of `rate`: a number, an array or a schedule.

    Raises:
      ValueError: unknown `rule`, sizes below 1, or a rate that is negative, not finite or an array
        with axes.
      TypeError: sizes that are no integers, or a rate that is no real number.

    Examples:
      >>> scale_learning_rate(0.1, 256, 1024, "linear")
      0.4
      >>> scale_learning_rate(0.1, 256, 1024, "sqrt")
      0.2
      >>> scale_learning_rate(0.1, 256, 1024, "linear", saturation=512)
      0.2

    References:
      Granziol et al., `Learning Rates as a Function of Batch Size
      <https://arxiv.org/abs/2006.09092>`_, 2020.
    """
    _checks.check_choice(get_args(Rule), rule=rule)
    old = _phases.as_steps("batch_size", batch_size, 1)
    new = _phases.as_steps("new_batch_size", new_batch_size, 1)
    bound = math.inf if saturation is None else _phases.as_steps("saturation", saturation, 1)
    factor = (min(new, bound) / min(old, bound)) ** _POWERS[rule]
    if callable(rate):
        return lambda step: jnp.asarray(rate(_phases.as_count(step))) * factor
    _phases.check_rate(rate=rate)
    return rate * factor
