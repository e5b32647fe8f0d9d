r"""BAdam: Adam on one block of parameters at a time.

    active block: Adam(W), from a fresh state, for update_gap steps;    all others: frozen

Luo, Yu and Li, "BAdam: A Memory Efficient Full Parameter Optimization Method for Large Language
Models", NeurIPS 2024, arXiv:2404.02827.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _adam, _checks, _hyperparams, _tree
from jaxopt_lab.subspace._layers import Group
from jaxopt_lab.subspace.blocks import Order, blocks
from jaxopt_lab.subspace.frugal import FrugalState, frugal
from jaxopt_lab.subspace.treatments import AlwaysFull, treatments_of

# What the contract of `jaxopt_lab.testing` asks and this rule does not promise.
CONTRACT_EXCEPTIONS = {
    "nesting_invariance": "blocks take turns in the order of their names",
    "float32_gradient_1e+25_state": "the square of a gradient above 1.8e19 overflows float32",
}


def badam(
    learning_rate: optax.ScalarOrSchedule,
    update_gap: int = 50,
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    order: Order = "descending",
    group: Group = "layer",
    always_full: AlwaysFull = (),
    seed: int = 0,
) -> optax.GradientTransformation:
    """AdamW on one layer at a time, each for `update_gap` steps; the others do not move.

    The state begins anew, with its counter, when the block changes; so does the state of what is
    always active. It has room for one block: shapes are static under `jit`, so that arrays are
    shared between blocks where their shapes agree, as those of a transformer's layers do, and
    embeddings or an output layer add theirs. The gradients of frozen blocks are computed all the
    same: what is saved is their state.

    Args:
      learning_rate: step size or schedule.
      update_gap: K, steps on a block, a positive integer. The authors suggest the number of batches
        of an epoch divided by the number of blocks, but at least 50 and at most 100.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment; positive.
      weight_decay: decoupled decay of the active block, multiplied by the learning rate; a number
        or a schedule of the number of steps taken.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      order: of the blocks, which are sorted by name, numbers by value: "descending" (from the last
        on), "ascending", or "random", in a new order at every pass.
      group: which leaves are a block. "layer" looks at all paths and shapes: leaves are cut into
        layers where names repeat with different numbers, whatever they are nested in, and what is
        in no layer forms a block for each module. Or a function of a leaf's path, such as
        `blocks/3/up/kernel`, that returns the name of its block; None makes each leaf a block. A
        leaf in which a scan has stacked layers is a block, of which nothing smaller can be active:
        the state is that of the largest such leaf, and of a model with only one leaf all of
        AdamW's.
      always_full: what is always active: regular expressions, each of which must be found in the
        path of at least one parameter, a tree of booleans, or a function of the parameters that
        returns one.
      seed: integer, of the random order.

    Returns:
      A `GradientTransformation`; its update needs `params` if `weight_decay` is not 0.
      Updates have the wider of the gradient's dtype and the parameter's.

    Raises:
      ValueError: a number out of range; an unknown `order`; at init, a pattern that matches
        nothing; at update, gradients or a state that do not match.
      TypeError: an argument of a wrong kind; parameters or gradients that are not real floating
        point.

    Examples:
      >>> import jax.numpy as jnp, jaxopt_lab
      >>> params = {f"layer{i}": {"kernel": jnp.zeros((64, 64))} for i in range(8)}
      >>> tx = jaxopt_lab.badam(1e-3, update_gap=100)
      >>> f"{jaxopt_lab.state_bytes(tx, params).bytes_per_parameter:.2f}"  # 8 / 8
      '1.00'

    References:
      Luo, Yu and Li, `BAdam <https://arxiv.org/abs/2404.02827>`_, NeurIPS 2024, algorithm 1.
    """
    _checks.check_scalar_or_schedule(weight_decay=weight_decay)
    inner = frugal(
        _adam.scale_by_adam(b1, b2, eps),
        optax.set_to_zero(),
        blocks(order, group),
        lambda size: min(size, 1),
        update_gap,
        on_refresh="reset_all",
        always_full=always_full,
        seed=seed,
    )
    decays = not _checks.is_number(weight_decay) or weight_decay != 0

    def init_fn(params: optax.Params) -> optax.OptState:
        _tree.mask_leaves(mask, params)
        return inner.init(params)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        before = _tree.check_state(state, FrugalState)
        updates, state = inner.update(updates, before, params, **extra_args)
        if not decays:
            return updates, state
        rate = _hyperparams.value_at("weight_decay", weight_decay, before.count)
        params = _tree.require_params(params, "badam with weight_decay")
        chosen = list(zip(_tree.mask_leaves(mask, params), treatments_of(state.treatments)))

        def decay(u: jax.Array, theta: jax.Array, of: Any) -> tuple[jax.Array]:
            selected, treatment = of
            if not selected:
                return (u,)
            decayed = u + jnp.asarray(rate, u.dtype) * theta
            if treatment.kind == "split":
                decayed = jnp.where(treatment.selection != 0, decayed, u)
            return (decayed,)

        (updates,) = _tree.map_leaves(decay, updates, params=params, static=chosen)
        return updates, state

    rule = optax.GradientTransformationExtraArgs(init_fn, update_fn)
    return _hyperparams.ready_made(rule, learning_rate, method="badam")
