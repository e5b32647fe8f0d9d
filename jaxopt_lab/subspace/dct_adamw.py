r"""DCT-AdamW: Adam on the columns of a cosine basis that align best with the gradient.

    a = (g + e) Q_I,   direction = Adam(a) Q_I^T,   e <- g + e - a Q_I^T with error feedback

Modoranu et al., "SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models",
2025, arXiv:2505.17967.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax

from jaxopt_lab import _adam, _checks, _hyperparams, _matrices, _tree
from jaxopt_lab.subspace import _arguments
from jaxopt_lab.subspace.dct import dct
from jaxopt_lab.subspace.frugal import frugal
from jaxopt_lab.subspace.projections import Projection
from jaxopt_lab.subspace.treatments import AlwaysFull

# What the contract of `jaxopt_lab.testing` asks and this rule does not promise.
CONTRACT_EXCEPTIONS = {
    "float32_gradient_1e+19": "a projection sums over a side, and the square of the sum overflows",
    "float32_gradient_1e+25_state": "the square of a gradient above 1.8e19 overflows float32",
}


def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_gap: int = 1,
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    projection: Projection | None = None,
    rotate: bool = True,
    error_feedback: bool = False,
    always_full: AlwaysFull = None,
    dimension_numbers: _matrices.DimensionNumbers = None,
    stagger: int = 1,
) -> optax.GradientTransformation:
    """AdamW on a few columns of a fixed cosine basis, chosen anew every `update_gap` steps.

    Differences from the authors' code, all deliberate: a basis for each size, not one for all; the
    rotation of the moments matches indices exactly, and is on by default, because without it slots
    inherit moments of other columns; the remainder that error feedback keeps is exact (wrap in
    `jaxopt_lab.quantize_state` to keep it in 8 bits); kernels with more than two axes are kept
    full unless `dimension_numbers` makes them matrices.

    Inside a `shard_map` over an axis that splits a weight the rule sees the shard and takes it for
    the whole leaf: call it outside, under `jit` with sharded arrays, where all is right, or gather
    the gradient first.

    Args:
      learning_rate: step size or schedule.
      rank: number of columns, at most the smaller side.
      update_gap: T; columns are chosen at the steps 1, T, 2T, ...
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment; positive.
      weight_decay: decoupled decay, multiplied by the learning rate; a number or a schedule.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      projection: what is selected, by default `dct()`.
      rotate: moments follow their columns when the selection changes, and begin at zero for new
        columns; otherwise they stay in their slots, as in the authors' default.
      error_feedback: what is not selected is added to the next gradient, instead of being dropped;
        4 bytes a parameter in float32.
      always_full: what is never split: regular expressions, each of which must be found in the path
        of at least one parameter, a tree of booleans, or a function of the parameters that returns
        one; by default everything but hidden matrices.
      dimension_numbers: tree of `optax.contrib.MuonDimensionNumbers` with None for what is no
        matrix, or a function of the parameters that returns one: which axes are inputs and outputs
        of a kernel. All other axes count matrices, each of which has its own selection.
      stagger: number of groups of leaves that are refreshed at different steps, at most
        `update_gap`, so that no step but the first pays for all.

    Returns:
      A `GradientTransformation`; its update needs `params` if `weight_decay` is not 0.

    Raises:
      ValueError: a number out of range; at init, a projection that cannot serve a leaf or a pattern
        that matches nothing; at update, gradients or a state that do not match.
      TypeError: an argument of a wrong kind; parameters or gradients that are not real floating
        point.

    Examples:
      >>> import jax.numpy as jnp, jaxopt_lab
      >>> params = {"up": jnp.zeros((512, 1024))}
      >>> tx = jaxopt_lab.dct_adamw(1e-3, rank=64)
      >>> f"{jaxopt_lab.state_bytes(tx, params).bytes_per_parameter:.2f}"  # 8 * 64 / 512
      '1.00'

    References:
      Modoranu et al., `SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models
      <https://arxiv.org/abs/2505.17967>`_, 2025, algorithm 1.
    """
    _arguments.check_static(
        rank=rank, rotate=rotate, error_feedback=error_feedback, stagger=stagger
    )
    _checks.check_positive_integer(rank=rank)
    _checks.check_flag(rotate=rotate, error_feedback=error_feedback)
    _checks.check_positive_integer(update_gap=update_gap)
    gap: Any = update_gap
    first_gap: Any = (max if isinstance(gap, int) else jnp.maximum)(gap - 1, 1)
    split = frugal(
        _adam.scale_by_adam(b1, b2, eps),
        None if error_feedback else optax.set_to_zero(),
        dct() if projection is None else projection,
        lambda size: min(rank, size),
        update_gap,
        on_refresh="project" if rotate else "keep",
        error_feedback=error_feedback,
        always_full=always_full,
        dimension_numbers=dimension_numbers,
        first_gap=first_gap,
        stagger=stagger,
    )
    return _hyperparams.ready_made(split, learning_rate, weight_decay, mask, method="dct_adamw")
