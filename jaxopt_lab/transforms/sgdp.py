r"""SGDP: momentum SGD whose step does not lengthen scale-invariant weights.

    b_t = momentum * b_{t-1} + (1 - dampening) g_t
    d_t = g_t + momentum * b_t with Nesterov, else b_t
    update = projected(d_t) + rho_t * weight_decay / (1 - momentum) * theta_{t-1}

where the projection takes out the part along the weights if the gradient is nearly orthogonal to
them, and then rho_t = wd_ratio, else 1 (see `_projection`).

Heo et al., "AdamP", ICLR 2021, arXiv:2006.08217, Algorithm 1; the authors' sgdp.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _checks, _hyperparams, _matrices, _treatments, _tree
from jaxopt_lab.transforms import _projection

# What the contract of `jaxopt_lab.testing` asks and this rule does not promise.
CONTRACT_EXCEPTIONS = {
    "float32_gradient_1e+25_updates": "a step as large as its gradient takes the weights to where "
    "their norm overflows",
}


class ScaleBySgdpState(NamedTuple):
    """State of `scale_by_sgdp`: 4 bytes a parameter in float32.

    Attributes:
      mu: b; shapes of the parameters, dtype `mu_dtype` or the parameter's.
      count: steps taken; int32, shape (), or None unless the decay is a schedule.
    """

    mu: optax.Updates
    count: Any = None


def scale_by_sgdp(
    momentum: _hyperparams.Scalar = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    dampening: _hyperparams.Scalar = 0.0,
    nesterov: bool = False,
    eps: _hyperparams.Scalar = 1e-8,
    delta: _hyperparams.Scalar = 0.1,
    wd_ratio: _hyperparams.Scalar = 0.1,
    project_momentum: bool = False,
    dimension_numbers: _matrices.DimensionNumbers = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Turns the gradient into SGDP's direction.

    .. math::
      b_t &= \mu b_{t-1} + (1 - \tau) g_t \\
      u_t &= \Pi(d_t) + \rho_t \frac{\lambda}{1 - \mu} \theta_{t-1}, \quad
      d_t = g_t + \mu b_t \text{ (Nesterov) or } b_t

    with the projection :math:`\Pi` and the factor :math:`\rho_t` of `scale_by_adamp`. The first
    step is dampened too, unlike in PyTorch's SGD.

    Inside a `shard_map` over an axis that splits a weight the rule sees the shard and takes it for
    the whole leaf: call it outside, under `jit` with sharded arrays, where all is right, or gather
    the gradient first.

    Args:
      momentum: :math:`\mu`, in [0, 1).
      weight_decay: decay rate :math:`\lambda`, a number or a schedule, applied divided by `1 -
        momentum`.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      dampening: :math:`\tau`, in [0, 1].
      nesterov: step along the gradient plus `momentum` times the new buffer.
      eps: added to the norms; positive.
      delta: threshold of the cosine, times the root of the vector's dimension.
      wd_ratio: factor of the weight decay of projected weights, in [0, 1].
      project_momentum: keep the projected direction as the buffer, as the published code does
        without Nesterov, where both are one array written in place; the paper projects only the
        applied step. Not with `nesterov`.
      dimension_numbers: which axes are inputs and outputs of a kernel, whose channels are its
        outputs; all other axes count matrices, each projected by itself: a tree of
        `optax.contrib.MuonDimensionNumbers` with None for what follows plain SGD, or a function of
        the parameters that returns one, or a mapping of patterns to them, each a regular expression
        for a path, or the path of a layer, from its beginning or from a "/" to its end, with all
        other leaves by default. By default names, shapes and neighbours decide, as
        `muon_dimension_numbers` describes; input, output and depthwise layers are projected too,
        and the rows of tables of embeddings. Biases, scales, norms, and kernels whose axes nothing
        tells follow plain SGD; `jaxopt_lab.treatments` shows which.
      mu_dtype: dtype of the buffer; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs `params`.

    Raises:
      ValueError: a hyper-parameter out of range, `project_momentum` with `nesterov`, axes that a
        parameter does not have, missing `params`, or gradients that do not match.
      TypeError: parameters or gradients that are not real floating point.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = scale_by_sgdp(momentum=0.9, nesterov=True)
      >>> params = jnp.array([[3.0], [4.0]])  # one output channel
      >>> updates, _ = tx.update(jnp.array([[4.0], [-3.0]]), tx.init(params), params)
      >>> [f"{u:.1f}" for u in updates[:, 0]]  # orthogonal already: 1.9 times the gradient
      ['7.6', '-5.7']

    References:
      Heo et al., `AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
      Weights <https://arxiv.org/abs/2006.08217>`_, ICLR 2021, Algorithm 1.
    """
    _checks.check_decay(momentum=momentum)
    _checks.check_positive(eps=eps)
    _checks.check_scalar_or_schedule(weight_decay=weight_decay)
    _checks.check_per_leaf(mask=mask)
    _matrices.check(dimension_numbers)
    _checks.check_non_negative(delta=delta)
    _checks.check_fraction(dampening=dampening, wd_ratio=wd_ratio)
    _checks.check_flag(nesterov=nesterov, project_momentum=project_momentum)
    mu_dtype = _checks.canonical_mu_dtype(mu_dtype)
    if project_momentum and nesterov:
        raise ValueError("project_momentum=True needs nesterov=False")

    def static(params: Any) -> list[tuple[_matrices.MatrixAxes | None, bool]]:
        axes = _matrices.matrix_axes(dimension_numbers, params, default=_projection.channel_axes)
        decays = _tree.mask_leaves(_hyperparams.mask_of(weight_decay, mask), params)
        return list(zip(axes, decays))

    def init_fn(params: optax.Params) -> ScaleBySgdpState:
        static(params)
        found = _matrices.choices(dimension_numbers, params, default=_projection.channel_axes)
        _treatments.report_choices("sgdp", found, matrix="sgdp", other="sgd")
        count = jnp.zeros((), jnp.int32) if callable(weight_decay) else None
        return ScaleBySgdpState(_tree.zeros_like(params, mu_dtype), count)

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleBySgdpState]:
        state = _tree.check_state(state, ScaleBySgdpState)
        params = _tree.require_params(params, "sgdp")

        def direction(g: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
            b = momentum * b + (1 - dampening) * g
            return (g + momentum * b if nesterov else b), b

        def sums(
            g: jax.Array, b: jax.Array, theta: jax.Array, of: Any, rate: jax.Array
        ) -> tuple[Any, ...]:
            del rate
            axes, _ = of
            if axes is None or theta.size == 0:
                return g, b, ()
            d, _ = direction(g, b)
            operands = _projection.apart(direction, d, theta, g, b)
            return g, b, _projection.channel_sums(*operands, axes)

        def rule(
            g: jax.Array,
            b: jax.Array,
            theta: jax.Array,
            of: Any,
            radial: _projection.Radial | None,
            rate: jax.Array,
        ) -> tuple[jax.Array, jax.Array]:
            _, decays = of
            d, b_new = direction(g, b)
            rho = 1.0
            if radial is not None:
                d = d - radial.factor * theta
                rho = jnp.where(radial.projects, wd_ratio, 1.0)
            u = d + rate * rho / (1 - momentum) * theta if decays else d
            return u, d if project_momentum else b_new

        rate = _hyperparams.value_at("weight_decay", weight_decay, state.count)
        updates, mu = _projection.map_projected(
            sums,
            rule,
            updates,
            state.mu,
            params=params,
            static=static(params),
            shared=lambda dtype: jnp.asarray(rate, dtype),
            delta=delta,
            eps=eps,
        )
        count = None if state.count is None else _hyperparams.increment(state.count)
        return updates, ScaleBySgdpState(mu, count)

    return optax.GradientTransformation(init_fn, update_fn)


def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: _hyperparams.Scalar = 0.0,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    dampening: _hyperparams.Scalar = 0.0,
    nesterov: bool = False,
    eps: _hyperparams.Scalar = 1e-8,
    delta: _hyperparams.Scalar = 0.1,
    wd_ratio: _hyperparams.Scalar = 0.1,
    project_momentum: bool = False,
    dimension_numbers: _matrices.DimensionNumbers = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""SGDP with its weight decay.

    The authors' example is `sgdp(0.1, momentum=0.9, weight_decay=1e-5, nesterov=True)`.

    Inside a `shard_map` over an axis that splits a weight the rule sees the shard and takes it for
    the whole leaf: call it outside, under `jit` with sharded arrays, where all is right, or gather
    the gradient first.

    Args:
      learning_rate: step size or schedule.
      momentum: :math:`\mu`, in [0, 1).
      weight_decay: decay, a number or a schedule, multiplied by the learning rate and divided by `1
        - momentum`, and scaled by `wd_ratio` where the weights look scale-invariant.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      dampening: :math:`\tau`, in [0, 1].
      nesterov: step along the gradient plus `momentum` times the new buffer.
      eps: added to the norms; positive.
      delta: threshold of the cosine, times the root of the vector's dimension.
      wd_ratio: factor of the weight decay of projected weights, in [0, 1].
      project_momentum: keep the projected direction as the buffer, as the published code does
        without Nesterov, where both are one array written in place; the paper projects only the
        applied step. Not with `nesterov`.
      dimension_numbers: which axes are inputs and outputs of a kernel, whose channels are its
        outputs; all other axes count matrices, each projected by itself: a tree of
        `optax.contrib.MuonDimensionNumbers` with None for what follows plain SGD, or a function of
        the parameters that returns one, or a mapping of patterns to them, each a regular expression
        for a path, or the path of a layer, from its beginning or from a "/" to its end, with all
        other leaves by default. By default names, shapes and neighbours decide, as
        `muon_dimension_numbers` describes; input, output and depthwise layers are projected too,
        and the rows of tables of embeddings. Biases, scales, norms, and kernels whose axes nothing
        tells follow plain SGD; `jaxopt_lab.treatments` shows which.
      mu_dtype: dtype of the buffer; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs `params`, and
      ignores extra arguments. Updates are computed in float32 at least and rounded once, to the
      wider of the gradient's and the parameter's dtype; where weights of 16 bits are rounded
      stochastically, float32 gradients keep what that needs.

    Raises:
      ValueError: a hyper-parameter out of range, `project_momentum` with `nesterov`, axes that a
        parameter does not have, missing `params`, or gradients that do not match; also a negative
        `learning_rate`.
      TypeError: parameters or gradients that are not real floating point, and what is no number, no
        schedule or no flag where one is expected; the message has the argument's name.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = sgdp(0.1, momentum=0.9)
      >>> params = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
      >>> grads = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> f"{optax.apply_updates(params, updates)['kernel'][0, 0]:.3f}"
      '0.900'

    See Also:
      `scale_by_sgdp` for the bare rule and the source.
    """
    rule = scale_by_sgdp(
        momentum,
        weight_decay,
        mask,
        dampening=dampening,
        nesterov=nesterov,
        eps=eps,
        delta=delta,
        wd_ratio=wd_ratio,
        project_momentum=project_momentum,
        dimension_numbers=dimension_numbers,
        mu_dtype=mu_dtype,
    )
    return _hyperparams.ready_made(rule, learning_rate, method="sgdp")
