r"""EControl: EF21's differences with a controlled share of the classical error.

    d_i = C(eta e_i + g_i - h_i),   e_i = e_i + g_i - h_i - d_i,   h_i = h_i + d_i
    h = h + mean_i d_i,             update = h

Gao, Islamov, Stich, "EControl: Fast Distributed Optimization with Compression and Error Control",
ICLR 2024, arXiv:2311.05645.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _hyperparams, _tree
from jaxopt_lab.distributed import _axes, _flat, exchange
from jaxopt_lab.distributed.compressors import Compressor, check_compressor


class EControlState(NamedTuple):
    """State of `econtrol`: 12 bytes a parameter in float32.

    Under `shard_map` `error` and `estimate` are each replica's own (a spec with the axis).

    Attributes:
      count: steps taken; int32, shape (); with the seed it gives the step's random key.
      error: e_i; shapes of the parameters, at least float32.
      estimate: h_i; as `error`.
      mean_estimate: h, equal on all replicas; as `error`.
    """

    count: jax.Array
    error: optax.Updates
    estimate: optax.Updates
    mean_estimate: optax.Updates


def econtrol(
    compressor: Compressor,
    axis_name: _axes.AxisName,
    *,
    feedback: _hyperparams.Scalar | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages estimates of the replicas' gradients, with feedback of a share of the error.

    .. math::
      d_i &= C(\eta e_i + g_i - h_i), \quad e_i' = e_i + g_i - h_i - d_i \\
      h_i' &= h_i + d_i, \quad h' = h + \frac{1}{N} \sum_i d_i

    The update is h'. With :math:`\eta = 0` this is `ef21`; a small :math:`\eta` keeps its exact
    limit and averages noise in the gradients out, a large one diverges. Always
    :math:`h_i' + e_i' = e_i + g_i`. A step whose mean has a NaN or infinity leaves all three as
    they were.

    Args:
      compressor: C, what each replica makes of its vector before it is sent, such as `top_k(0.01)`,
        `stochastic_int8()` or any `Compressor`; it has to be contractive.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      feedback: :math:`\eta` in [0, 1]; by default the compressor's contraction constant.
      seed: of the compressor's random numbers.

    Returns:
      A `GradientTransformationExtraArgs`; call `init` under the mapped axis. Its update takes
      `weight` as `sync_gradients` does.

    Raises:
      ValueError: `feedback` outside [0, 1]; at init, a compressor whose errors would grow or, with
        no `feedback` given, without a contraction constant, or an axis that is not bound; at
        update, gradients that do not match or that `jax.grad` has already summed (see `vary`).
      TypeError: `compressor` no `Compressor`, a seed that is no integer; parameters or gradients
        that are not real floating point.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab.distributed.compressors import top_k
      >>> from jaxopt_lab.distributed.econtrol import econtrol
      >>> tx = econtrol(top_k(count=1), "replica", feedback=0.5)
      >>> def two_steps(g):
      ...     first, state = tx.update(g, tx.init(g))
      ...     second, _ = tx.update(g, state)
      ...     return first, second
      >>> first, second = jax.vmap(two_steps, axis_name="replica")(jnp.array([[4.0, 3.0]]))
      >>> first, second
      (Array([[4., 0.]], dtype=float32), Array([[4. , 4.5]], dtype=float32))

    References:
      Gao, Islamov, Stich, `EControl <https://arxiv.org/abs/2311.05645>`_, ICLR 2024.
    """
    check_compressor(compressor)
    _checks.check_seed(seed)
    axis_name = _axes.canonical(axis_name)
    if feedback is not None:
        _checks.check_fraction(feedback=feedback)

    def strength(size: int) -> _hyperparams.Scalar:
        found = compressor.contraction(size) if feedback is None else feedback
        if found is None:
            raise ValueError(f"{compressor} has no contraction constant; give econtrol a feedback")
        return found

    def init_fn(params: optax.Params) -> EControlState:
        _axes.size(axis_name)
        exchange.check_contractive(compressor, _flat.size(params), "econtrol")
        strength(_flat.size(params))
        error, own, mean = (_tree.zeros_like(params, at_least_float32=True) for _ in range(3))
        return EControlState(
            count=jnp.zeros((), jnp.int32),
            error=_axes.vary(error, axis_name),
            estimate=_axes.vary(own, axis_name),
            mean_estimate=mean,
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        weight: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EControlState]:
        del params, extra_args
        state = _tree.check_state(state, EControlState)
        g = exchange.message(updates, state.error, axis_name, "econtrol", weight)
        e, h_own, h = (
            _flat.ravel(tree).astype(g.dtype)
            for tree in (state.error, state.estimate, state.mean_estimate)
        )
        difference = g - h_own
        key = exchange.round_key(seed, state.count)
        mean, own = exchange.average(compressor, strength(g.size) * e + difference, key, axis_name)
        new = h + mean
        kept = functools.partial(exchange.remembered, new)
        return _flat.unravel(new, updates), EControlState(
            count=_hyperparams.increment(state.count),
            error=_flat.unravel(kept(e + (difference - own), e), state.error),
            estimate=_flat.unravel(kept(h_own + own, h_own), state.estimate),
            mean_estimate=_flat.unravel(kept(new, h), state.mean_estimate),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
