r"""GaLore: Adam in the space of the leading singular directions of the gradient.

    a = B^T g,   direction = scale B (sqrt(c2) / c1) m / (sqrt(v) + eps),   m, v of a
    theta <- (1 - lr weight_decay) (theta - lr direction)

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection", ICML 2024,
arXiv:2403.03507.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _adam, _checks, _hyperparams, _matrices, _tree
from jaxopt_lab.subspace import _arguments
from jaxopt_lab.subspace.frugal import OnRefresh, frugal
from jaxopt_lab.subspace.projections import Projection
from jaxopt_lab.subspace.svd import svd
from jaxopt_lab.subspace.treatments import AlwaysFull

# What the contract of `jaxopt_lab.testing` asks and this rule does not promise.
CONTRACT_EXCEPTIONS = {
    "float32_gradient_1e+19": "a projection sums over a side, and the square of the sum overflows",
    "float32_gradient_1e+25_state": "the square of a gradient above 1.8e19 overflows float32",
}


def galore_adamw(
    learning_rate: optax.ScalarOrSchedule,
    rank: int = 128,
    update_gap: int = 200,
    scale: _hyperparams.Scalar = 0.25,
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-6,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    projection: Projection | None = None,
    on_refresh: OnRefresh = "keep",
    always_full: AlwaysFull = None,
    dimension_numbers: _matrices.DimensionNumbers = None,
    stagger: int = 1,
    seed: int = 0,
) -> optax.GradientTransformation:
    r"""AdamW on the projection of each hidden matrix's gradient; the remainder is dropped.

    .. math::
      a_t &= B^\top g_t \text{ or } g_t B, \qquad
      m_t, v_t \text{: Adam's moments of } a_t \\
      \theta_t &= (1 - \eta \lambda) \Bigl(\theta_{t-1} - \eta \alpha \frac{\sqrt{1 - \beta_2^t}}
      {1 - \beta_1^t} B \frac{m_t}{\sqrt{v_t} + \epsilon}\Bigr)

    Moments survive a change of basis. `optax.contrib.galore` differs: it projects the larger side,
    adds epsilon after the bias correction, decays the old weights, and scales by 1.

    Inside a `shard_map` over an axis that splits a weight the rule sees the shard and takes it for
    the whole leaf: call it outside, under `jit` with sharded arrays, where all is right, or gather
    the gradient first.

    Args:
      learning_rate: step size or schedule; that of hidden matrices is `scale` times it.
      rank: number of directions, at most the size of the projected side.
      update_gap: number of steps between decompositions.
      scale: :math:`\alpha`, of the hidden matrices.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment before the bias correction; positive.
      weight_decay: decoupled decay of the new weights; a number or a schedule.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      projection: by default `svd()`; `svd(method="gram")` and `svd(method="randomized")` take
        less time.
      on_refresh: what happens to the moments at a refresh: "reset" begins anew, "keep" leaves them
        in their slots, "project" expresses them in the new selection, "reset_all" also begins anew
        with what is always full. The authors' is "keep".
      always_full: what is never split: regular expressions, each of which must be found in the path
        of at least one parameter, a tree of booleans, or a function of the parameters that returns
        one; by default everything but hidden matrices.
      dimension_numbers: tree of `optax.contrib.MuonDimensionNumbers` with None for what is no
        matrix, or a function of the parameters that returns one: which axes are inputs and outputs
        of a kernel. All other axes count matrices, each of which has its own selection.
      stagger: number of groups of leaves that are refreshed at different steps, at most
        `update_gap`, so that no step but the first pays for all.
      seed: integer; only a randomised decomposition draws.

    Returns:
      A `GradientTransformation`; its update needs `params` if `weight_decay` is not 0.

    Raises:
      ValueError: a number out of range; at init, a projection that cannot serve a leaf or a pattern
        that matches nothing; at update, gradients or a state that do not match.
      TypeError: an argument of a wrong kind; parameters or gradients that are not real floating
        point.

    Examples:
      >>> import jax.numpy as jnp, jaxopt_lab
      >>> tx = jaxopt_lab.galore_adamw(1e-2, rank=2)
      >>> state = tx.init({"up": jnp.zeros((4, 6))})
      >>> state[0].selected[0].mu["up"].shape
      (2, 6)

    References:
      Zhao et al., `GaLore <https://arxiv.org/abs/2403.03507>`_, ICML 2024, algorithm 2.
    """
    _arguments.check_static(rank=rank, stagger=stagger)
    _checks.check_positive_integer(rank=rank)
    _checks.check_scalar_or_schedule(learning_rate=learning_rate, weight_decay=weight_decay)
    split = frugal(
        _adam.scale_by_adam(b1, b2, eps, eps_in_root=False),
        optax.set_to_zero(),
        svd() if projection is None else projection,
        lambda size: min(rank, size),
        update_gap,
        projected_scale=scale,
        on_refresh=on_refresh,
        always_full=always_full,
        dimension_numbers=dimension_numbers,
        stagger=stagger,
        seed=seed,
    )
    last = _step_and_decay(learning_rate, weight_decay, mask)
    chain = optax.chain(split, last)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        _hyperparams.check_links(state, ("splitting", "step"), "galore_adamw")
        return chain.update(updates, state, params, **extra_args)

    return _hyperparams.in_full_precision(
        optax.GradientTransformationExtraArgs(chain.init, update_fn)
    )


def _step_and_decay(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: _tree.Mask,
) -> optax.GradientTransformation:
    """Takes the step, and decays the weights as they are after it."""

    def init_fn(params: optax.Params) -> optax.OptState:
        _tree.mask_leaves(mask, params)
        # One count for both: whoever asks for the learning rate finds one.
        if callable(learning_rate) or callable(weight_decay):
            return optax.ScaleByScheduleState(count=jnp.zeros((), jnp.int32))
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        count: Any = None
        if callable(learning_rate) or callable(weight_decay):
            count = _tree.check_state(state, optax.ScaleByScheduleState).count
            state = optax.ScaleByScheduleState(count=_hyperparams.increment(count))
        rate = _hyperparams.value_at("learning_rate", learning_rate, count)
        decay = _hyperparams.value_at("weight_decay", weight_decay, count)

        def rates(dtype: Any) -> tuple[jax.Array, jax.Array]:
            return jnp.asarray(rate, dtype), jnp.asarray(decay, dtype)

        if _checks.is_number(decay) and decay == 0:

            def step(u: jax.Array, shared: Any) -> tuple[jax.Array]:
                return (-shared[0] * u,)

            (updates,) = _tree.map_leaves(step, updates, shared=rates)
            return updates, state
        params = _tree.require_params(params, "galore_adamw with weight_decay")

        def decayed(
            u: jax.Array, theta: jax.Array, selected: bool, shared: Any
        ) -> tuple[jax.Array]:
            rate, decay = shared
            u = -rate * u
            return (u - rate * decay * (theta + u) if selected else u,)

        selected = _tree.mask_leaves(mask, params)
        (updates,) = _tree.map_leaves(
            decayed, updates, params=params, static=selected, shared=rates
        )
        return updates, state

    return optax.GradientTransformation(init_fn, update_fn)
