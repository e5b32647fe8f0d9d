r"""FRUGAL with Adam inside the subspace and sign descent outside of it.

    direction = Adam(P(g)) put back in place + free_scale sign(g - P^-1(P(g)))

Zmushko et al., "FRUGAL: Memory-Efficient Optimization by Reducing State Overhead for Scalable
Training", ICML 2025, arXiv:2411.07837.
"""

from __future__ import annotations

import optax

from jaxopt_lab import _adam, _hyperparams, _matrices, _tree
from jaxopt_lab.subspace.frugal import OnRefresh, frugal
from jaxopt_lab.subspace.projections import Density, Projection
from jaxopt_lab.subspace.treatments import AlwaysFull

# What the contract of `jaxopt_lab.testing` asks and this rule does not promise.
CONTRACT_EXCEPTIONS = {
    "float32_gradient_1e+25_state": "the square of a gradient above 1.8e19 overflows float32",
    "inject_hyperparams": "list it in static_args",
    "inject_hyperparams_bfloat16": "list it in static_args",
}


def frugal_adamw(
    learning_rate: optax.ScalarOrSchedule,
    density: Density = 0.25,
    update_gap: int = 200,
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    projection: Projection | None = None,
    free: optax.GradientTransformation | None = None,
    projected_scale: _hyperparams.Scalar = 1.0,
    free_scale: _hyperparams.Scalar = 1.0,
    on_refresh: OnRefresh = "reset",
    always_full: AlwaysFull = None,
    dimension_numbers: _matrices.DimensionNumbers = None,
    stagger: int = 1,
    seed: int = 0,
) -> optax.GradientTransformation:
    """AdamW with state for a fraction of each hidden matrix; the rest moves by its sign.

    The defaults are those of the authors' pre-training; for fine-tuning they scale the remainder
    by `free_scale=0.1`. A step of the remainder has the size of the learning rate whatever the
    gradient's, so that clipping gradients does not bound it.

    Inside a `shard_map` over an axis that splits a weight the rule sees the shard and takes it for
    the whole leaf: call it outside, under `jit` with sharded arrays, where all is right, or gather
    the gradient first.

    Args:
      learning_rate: step size or schedule.
      density: the fraction of each hidden matrix that has state, in [0, 1], at least one column
        unless it is 0; or a function that returns the number selected of a given number.
      update_gap: number of steps between changes of that part.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment; positive.
      weight_decay: decoupled decay, multiplied by the learning rate alone; a number or a schedule.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      projection: random columns by default; the authors also use `blocks()` and `svd()`.
      free: transformation without state of the remainder: by default `optax.scale_by_sign()`;
        `optax.identity()` for gradient descent, `optax.set_to_zero()` to drop it.
      projected_scale: non-negative factor of all updates but those of what is always full.
      free_scale: non-negative, the learning rate of the remainder relative to the selected part's.
      on_refresh: what happens to the moments at a refresh: "reset" begins anew, "keep" leaves them
        in their slots, "project" expresses them in the new selection, "reset_all" also begins anew
        with what is always full.
      always_full: what is never split: regular expressions, each of which must be found in the path
        of at least one parameter, a tree of booleans, or a function of the parameters that returns
        one; by default everything but hidden matrices.
      dimension_numbers: tree of `optax.contrib.MuonDimensionNumbers` with None for what is no
        matrix, or a function of the parameters that returns one: which axes are inputs and outputs
        of a kernel. All other axes count matrices, each of which has its own selection.
      stagger: number of groups of leaves that are refreshed at different steps, at most
        `update_gap`, so that no step but the first pays for all.
      seed: integer, of random selections; leaves draw apart from one another.

    Returns:
      A `GradientTransformation`; its update needs `params` if `weight_decay` is not 0.

    Raises:
      ValueError: a number out of range; at init, a projection that cannot serve a leaf or a pattern
        that matches nothing; at update, gradients or a state that do not match.
      TypeError: an argument of a wrong kind; parameters or gradients that are not real floating
        point.

    Examples:
      >>> import jax.numpy as jnp, jaxopt_lab
      >>> params = {"up": jnp.zeros((1024, 512)), "norm": jnp.zeros(512)}
      >>> for density in (1.0, 0.25, 0.0):  # bytes of state a parameter
      ...     tx = jaxopt_lab.frugal_adamw(1e-3, density)
      ...     print(f"{jaxopt_lab.state_bytes(tx, params).bytes_per_parameter:.2f}")
      8.00
      2.01
      0.01

    References:
      Zmushko et al., `FRUGAL <https://arxiv.org/abs/2411.07837>`_, ICML 2025, algorithm 1.

    See Also:
      `frugal` for any other pair of rules.
    """
    split = frugal(
        _adam.scale_by_adam(b1, b2, eps),
        free,
        projection,
        density,
        update_gap,
        projected_scale=projected_scale,
        free_scale=free_scale,
        on_refresh=on_refresh,
        always_full=always_full,
        dimension_numbers=dimension_numbers,
        stagger=stagger,
        seed=seed,
    )
    return _hyperparams.ready_made(split, learning_rate, weight_decay, mask, method="frugal_adamw")
