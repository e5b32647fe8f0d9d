r"""EF21: each replica sends what its gradient has that the others' picture of it has not.

    c_i = C(g_i / (N w_i) - h_i),   h_i = h_i + c_i,   h = h + sum_i w_i c_i,   update = h

with w_i = 1/N (EF21), or proportional to the replicas' smoothness constants (EF21-W).

Richtarik, Sokolov, Fatkhullin, "EF21: A New, Simpler, Theoretically Better, and Practically Faster
Error Feedback", NeurIPS 2021, arXiv:2106.05203; Richtarik, Gasanov, Burlachenko, "Error Feedback
Reloaded", ICLR 2024, arXiv:2402.10774.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jaxopt_lab import _checks, _compat, _hyperparams, _tree
from jaxopt_lab.distributed import _axes, _flat, exchange
from jaxopt_lab.distributed.compressors import Compressor, check_compressor

_INITS = ("zero", "gradient")


class EF21State(NamedTuple):
    """State of `ef21`: 8 bytes a parameter in float32, 12 with momentum.

    Under `shard_map` `estimate` and `momentum` are each replica's own (a spec with the axis).

    Attributes:
      count: steps taken; int32, shape (); with the seed it gives the step's random key.
      estimate: h_i; shapes of the parameters, at least float32.
      mean_estimate: h, equal on all replicas; as `estimate`.
      momentum: moving average of the replica's gradients, if any; as `estimate`.
    """

    count: jax.Array
    estimate: optax.Updates
    mean_estimate: optax.Updates
    momentum: Any


def ef21(
    compressor: Compressor,
    axis_name: _axes.AxisName,
    *,
    init: Literal["zero", "gradient"] = "zero",
    weights: Sequence[float] | None = None,
    momentum: _hyperparams.Scalar | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages estimates of the replicas' gradients, which compressed differences keep up to date.

    .. math::
      c_i = C\Big(\frac{g_i}{N w_i} - h_i\Big), \quad h_i' = h_i + c_i, \quad
      h' = h + \sum_i w_i c_i

    The update is h'. For gradients that settle the estimates become exact, whatever the replicas'
    differences: gradient descent of constant step converges where `error_feedback` stops early.
    With `top_k` a constant gradient is exact after d / k steps. Noise in the gradients stays in the
    estimates; `momentum` averages it out before. A step whose mean has a NaN or infinity leaves
    estimates and momentum as they were.

    Args:
      compressor: C, what each replica makes of its vector before it is sent, such as `top_k(0.01)`,
        `stochastic_int8()` or any `Compressor`; it has to be contractive.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      init: the estimates of the first step: "zero", or "gradient" for an uncompressed first
        exchange.
      weights: N positive numbers, the smoothness constants of the replicas' losses, to which
        :math:`w_i` are proportional (EF21-W); equal by default.
      momentum: b in [0, 1): :math:`b v_i + (1 - b) g_i` takes the gradient's place (EF21-SGDM). It
        starts as the estimates do.
      seed: of the compressor's random numbers.

    Returns:
      A `GradientTransformationExtraArgs`; call `init` under the mapped axis. Its update takes
      `weight` as `sync_gradients` does.

    Raises:
      ValueError: an unknown `init`, weights that are not positive, `momentum` outside [0, 1); at
        init, a number of weights that is not the number of replicas, a compressor whose errors
        would grow or an axis that is not bound; at update, gradients that do not match or that
        `jax.grad` has already summed (see `vary`).
      TypeError: `compressor` no `Compressor`, a seed that is no integer; parameters or gradients
        that are not real floating point.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab.distributed.compressors import top_k
      >>> from jaxopt_lab.distributed.ef21 import ef21
      >>> tx = ef21(top_k(count=1), "replica")
      >>> def two_steps(g):
      ...     first, state = tx.update(g, tx.init(g))
      ...     second, _ = tx.update(g, state)
      ...     return first, second
      >>> first, second = jax.vmap(two_steps, axis_name="replica")(jnp.array([[4.0, 3.0]]))
      >>> first, second
      (Array([[4., 0.]], dtype=float32), Array([[4., 3.]], dtype=float32))

    References:
      Richtarik et al., `EF21 <https://arxiv.org/abs/2106.05203>`_, NeurIPS 2021; Richtarik et al.,
      `Error Feedback Reloaded <https://arxiv.org/abs/2402.10774>`_, ICLR 2024; Fatkhullin et al.,
      `Momentum Provably Improves Error Feedback! <https://arxiv.org/abs/2305.15155>`_,
      NeurIPS 2023.
    """
    check_compressor(compressor)
    _checks.check_seed(seed)
    axis_name = _axes.canonical(axis_name)
    _checks.check_choice(_INITS, init=init)
    if momentum is not None:
        _checks.check_decay(momentum=momentum)
    relative = None if weights is None else _relative(weights)

    def init_fn(params: optax.Params) -> EF21State:
        replicas = _axes.size(axis_name)
        if relative is not None and relative.size != replicas:
            raise ValueError(
                f"weights must be one for each of the {replicas} replicas, got {relative.size}"
            )
        exchange.check_contractive(compressor, _flat.size(params), "ef21")
        own, mean, trace = (_tree.zeros_like(params, at_least_float32=True) for _ in range(3))
        return EF21State(
            count=jnp.zeros((), jnp.int32),
            estimate=_axes.vary(own, axis_name),
            mean_estimate=mean,
            momentum=optax.MaskedNode() if momentum is None else _axes.vary(trace, axis_name),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        weight: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EF21State]:
        del params, extra_args
        state = _tree.check_state(state, EF21State)
        g = exchange.message(updates, state.estimate, axis_name, "ef21", weight)
        is_first = state.count == 0
        before = _flat.ravel(state.momentum).astype(g.dtype)
        if momentum is not None:
            averaged = momentum * before + (1 - momentum) * g
            g = jnp.where(is_first, g, averaged) if init == "gradient" else averaged
        target = g
        if relative is not None:
            target = g / jnp.asarray(relative, g.dtype)[lax.axis_index(axis_name)]
        h_own = _flat.ravel(state.estimate).astype(g.dtype)
        h = _flat.ravel(state.mean_estimate).astype(g.dtype)
        key = exchange.round_key(seed, state.count)

        def compressed() -> tuple[jax.Array, jax.Array]:
            mean, own = exchange.average(compressor, target - h_own, key, axis_name, relative)
            return h_own + own, h + mean

        def uncompressed() -> tuple[jax.Array, jax.Array]:
            return target, _axes.pmean(g, axis_name)

        if init == "gradient":
            new_own, new = _compat.cond(is_first, uncompressed, compressed)
        else:
            new_own, new = compressed()
        kept = functools.partial(exchange.remembered, new)
        trace = (
            state.momentum if momentum is None else _flat.unravel(kept(g, before), state.momentum)
        )
        return _flat.unravel(new, updates), EF21State(
            count=_hyperparams.increment(state.count),
            estimate=_flat.unravel(kept(new_own, h_own), state.estimate),
            mean_estimate=_flat.unravel(kept(new, h), state.mean_estimate),
            momentum=trace,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _relative(weights: Sequence[float]) -> np.ndarray:
    """Returns N w_i, the weights with mean 1."""
    found = _checks.as_numbers("weights", weights)
    if found.ndim != 1 or not found.size or not np.all((found > 0) & np.isfinite(found)):
        raise ValueError(f"weights must be a sequence of positive numbers, got {weights}")
    return found / found.mean()
