r"""The mean of compressed gradients, with or without a memory of what was lost.

    compressed_mean:  mean_i C(g_i)
    error_feedback:   u_i = lambda e_i + g_i,   e_i = u_i - C(u_i),   mean_i C(u_i)

Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed
Training of Speech DNNs", Interspeech 2014.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _hyperparams, _tree
from jaxopt_lab.distributed import _axes, _flat, exchange
from jaxopt_lab.distributed.compressors import Compressor, check_compressor


class CompressedMeanState(NamedTuple):
    """State of `compressed_mean`.

    Attributes:
      count: steps taken; int32, shape (); with the seed it gives the step's random key.
    """

    count: jax.Array


class ErrorFeedbackState(NamedTuple):
    """State of `error_feedback`: 4 bytes a parameter in float32, and 4/N with two phases.

    Under `shard_map` the errors are each replica's own (a spec with the axis).

    Attributes:
      count: steps taken; int32, shape (); with the seed it gives the step's random key.
      error: what was not sent; shapes of the parameters, at least float32.
      server_error: the same of the replica's part of the mean, shape (ceil(d / N),), if any.
    """

    count: jax.Array
    error: optax.Updates
    server_error: Any


def compressed_mean(
    compressor: Compressor, axis_name: _axes.AxisName, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    r"""Averages compressed gradients and forgets what compression lost.

    .. math::
      \frac{1}{N} \sum_{i=1}^{N} C(g_i)

    For unbiased compressors (`stochastic_int8`, `random_k(..., unbiased=True)`), whose errors
    average out. With a biased one such as `top_k` gradient descent may diverge; see
    `error_feedback`.

    Args:
      compressor: C, what each replica makes of its vector before it is sent, such as `top_k(0.01)`,
        `stochastic_int8()` or any `Compressor`.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      seed: of the compressor's random numbers.

    Returns:
      A `GradientTransformationExtraArgs`; call `init` under the mapped axis. Its update takes
      `weight` as `sync_gradients` does.

    Raises:
      ValueError: an axis that is not bound; gradients that `jax.grad` has already summed (see
        `vary`).
      TypeError: `compressor` no `Compressor`, a seed that is no integer; parameters or gradients
        that are not real floating point.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab.distributed.compressed_mean import compressed_mean
      >>> from jaxopt_lab.distributed.compressors import top_k
      >>> tx = compressed_mean(top_k(count=1), "replica")
      >>> grads = jnp.array([[4.0, 1.0], [0.0, -2.0]])
      >>> jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="replica")(grads)[0]
      Array([ 2., -1.], dtype=float32)
    """
    check_compressor(compressor)
    _checks.check_seed(seed)
    axis_name = _axes.canonical(axis_name)

    def init_fn(params: optax.Params) -> CompressedMeanState:
        _axes.size(axis_name)
        _tree.check_params(params)
        return CompressedMeanState(jnp.zeros((), jnp.int32))

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        weight: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, CompressedMeanState]:
        del params, extra_args
        state = _tree.check_state(state, CompressedMeanState)
        g = exchange.message(updates, None, axis_name, "compressed_mean", weight)
        key = exchange.round_key(seed, state.count)
        mean, _ = exchange.average(compressor, g, key, axis_name)
        count = _hyperparams.increment(state.count)
        return _flat.unravel(mean, updates), CompressedMeanState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def error_feedback(
    compressor: Compressor,
    axis_name: _axes.AxisName,
    *,
    error_decay: _hyperparams.Scalar = 1.0,
    two_phase: bool = False,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Averages compressed gradients, and adds what was lost to the next ones.

    .. math::
      u_i = \lambda e_i + g_i, \quad e_i' = u_i - C(u_i), \quad
      \frac{1}{N} \sum_{i=1}^{N} C(u_i)

    With :math:`\lambda = 1` nothing is lost: all means sent so far and the mean error add up to all
    mean gradients so far. Where the replicas' gradients differ at the optimum, gradient descent of
    constant step stops at a distance proportional to the step; `ef21` and `econtrol` do not.

    A step whose mean has a NaN or infinity leaves the errors as they were.

    The error is kept in units of the gradient: put the transformation first in the chain.

    Args:
      compressor: C, what each replica makes of its vector before it is sent, such as `top_k(0.01)`,
        `stochastic_int8()` or any `Compressor`; it has to be contractive. `sign("l2")` is not,
        but often does.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      error_decay: :math:`\lambda` in (0, 1].
      two_phase: each replica averages a part of all vectors and compresses the mean again, with an
        error of its own: 2 (N - 1) / N payloads sent instead of N - 1. For `sign` and the
        quantizers; the compressor then sees the N parts. See `two_phase_average`.
      seed: of the compressor's random numbers.

    Returns:
      A `GradientTransformationExtraArgs`; call `init` under the mapped axis. Its update takes
      `weight` as `sync_gradients` does.

    Raises:
      ValueError: `error_decay` outside (0, 1]; at init, a compressor whose errors would grow or an
        axis that is not bound; at update, gradients that do not match or that `jax.grad` has
        already summed (see `vary`).
      TypeError: `compressor` no `Compressor`, a seed that is no integer; parameters or gradients
        that are not real floating point.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab.distributed.compressed_mean import error_feedback
      >>> from jaxopt_lab.distributed.compressors import top_k
      >>> tx = error_feedback(top_k(count=1), "replica")
      >>> def two_steps(g):
      ...     first, state = tx.update(g, tx.init(g))
      ...     second, _ = tx.update(g, state)
      ...     return first, second
      >>> first, second = jax.vmap(two_steps, axis_name="replica")(jnp.array([[4.0, 3.0]]))
      >>> first, second
      (Array([[4., 0.]], dtype=float32), Array([[0., 6.]], dtype=float32))

    References:
      Seide et al., `1-Bit Stochastic Gradient Descent
      <https://www.isca-archive.org/interspeech_2014/seide14_interspeech.html>`_, Interspeech 2014.
    """
    check_compressor(compressor)
    _checks.check_seed(seed)
    axis_name = _axes.canonical(axis_name)
    _checks.check_scalar(error_decay=error_decay)
    _checks.check_flag(two_phase=two_phase)
    if _checks.is_number(error_decay) and not 0.0 < error_decay <= 1.0:
        raise ValueError(f"error_decay must be in (0, 1], got {error_decay}")

    def init_fn(params: optax.Params) -> ErrorFeedbackState:
        replicas = _axes.size(axis_name)
        error = _axes.vary(_tree.zeros_like(params, at_least_float32=True), axis_name)
        size = _flat.size(params)
        part = -(-size // replicas)
        exchange.check_contractive(compressor, part if two_phase else size, "error_feedback")
        server_error = _flat.padded(_flat.ravel(error), replicas)[:part]
        return ErrorFeedbackState(
            count=jnp.zeros((), jnp.int32),
            error=error,
            server_error=server_error if two_phase else optax.MaskedNode(),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        weight: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ErrorFeedbackState]:
        del params, extra_args
        state = _tree.check_state(state, ErrorFeedbackState)
        g = exchange.message(updates, state.error, axis_name, "error_feedback", weight)
        key = exchange.round_key(seed, state.count)
        error = _flat.ravel(state.error).astype(g.dtype)
        u = error_decay * error + g
        server_error = state.server_error
        if two_phase:
            exchange.check_server_error(
                server_error, -(-g.size // _axes.size(axis_name)), axis_name
            )
            mean, own, kept = exchange.two_phase_average(
                compressor, u, server_error, key, axis_name
            )
            server_error = exchange.remembered(mean, kept, server_error)
        else:
            mean, own = exchange.average(compressor, u, key, axis_name)
        count = _hyperparams.increment(state.count)
        error = _flat.unravel(exchange.remembered(mean, u - own, error), state.error)
        return _flat.unravel(mean, updates), ErrorFeedbackState(count, error, server_error)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
