r"""AdamP: Adam whose step does not lengthen scale-invariant weights.

    m_t = b1 m_{t-1} + (1 - b1) g_t,  v_t = b2 v_{t-1} + (1 - b2) g_t^2
    p_t = m_t / (sqrt(v_t) / sqrt(1 - b2^t) + eps)
    update = projected(p_t) / (1 - b1^t) + rho_t * weight_decay * theta_{t-1}

where the projection takes out the part along the weights if the gradient is nearly orthogonal to
them, and then rho_t = wd_ratio, else 1 (see `_projection`).

Heo et al., "AdamP", ICLR 2021, arXiv:2006.08217, Algorithm 2; the authors' adamp.py.
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
    "float32_gradient_1e+25_state": "the square of a gradient above 1.8e19 overflows float32",
}


class ScaleByAdampState(NamedTuple):
    """State of `scale_by_adamp`: 8 bytes a parameter in float32.

    Attributes:
      count: steps taken; int32, shape ().
      mu: m; shapes of the parameters, dtype `mu_dtype` or the parameter's.
      nu: v; at least float32.
    """

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates


def scale_by_adamp(
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    delta: _hyperparams.Scalar = 0.1,
    wd_ratio: _hyperparams.Scalar = 0.1,
    nesterov: bool = False,
    dimension_numbers: _matrices.DimensionNumbers = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""Rescales the gradient by AdamP.

    .. math::
      p_t &= \frac{m_t}{\sqrt{v_t} / \sqrt{1 - \beta_2^t} + \epsilon} \\
      u_t &= \frac{\Pi(p_t)}{1 - \beta_1^t} + \rho_t \lambda \theta_{t-1}

    with Adam's moments. :math:`\Pi` looks at each kernel as one vector an output channel, then as
    a single vector: the first view of dimension :math:`D` in which the largest cosine between
    gradient and weights is below :math:`\delta / \sqrt D` has the direction's component along the
    weights removed, and :math:`\rho_t` is `wd_ratio`; if there is none, :math:`\Pi(p) = p` and
    :math:`\rho_t = 1`. The decay is part of the rule because :math:`\rho_t` is decided here.

    Inside a `shard_map` over an axis that splits a weight the rule sees the shard and takes it for
    the whole leaf: call it outside, under `jit` with sharded arrays, where all is right, or gather
    the gradient first.

    Args:
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment and to the norms; positive.
      weight_decay: decoupled decay rate :math:`\lambda`, a number or a schedule.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      delta: threshold of the cosine, times the root of the vector's dimension.
      wd_ratio: factor of the weight decay of projected weights, in [0, 1].
      nesterov: use :math:`\beta_1 m_t + (1 - \beta_1) g_t` in place of :math:`m_t`.
      dimension_numbers: which axes are inputs and outputs of a kernel, whose channels are its
        outputs; all other axes count matrices, each projected by itself: a tree of
        `optax.contrib.MuonDimensionNumbers` with None for what follows plain Adam, or a function of
        the parameters that returns one, or a mapping of patterns to them, each a regular expression
        for a path, or the path of a layer, from its beginning or from a "/" to its end, with all
        other leaves by default. By default names, shapes and neighbours decide, as
        `muon_dimension_numbers` describes; input, output and depthwise layers are projected too,
        and the rows of tables of embeddings. Biases, scales, norms, and kernels whose axes nothing
        tells follow plain Adam; `jaxopt_lab.treatments` shows which.
      mu_dtype: dtype of the first moment; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs `params`.

    Raises:
      ValueError: a hyper-parameter out of range, axes that a parameter does not have, missing
        `params`, or gradients that do not match.
      TypeError: parameters or gradients that are not real floating point.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = scale_by_adamp()
      >>> params = jnp.array([[3.0], [4.0]])  # one output channel
      >>> gradient = jnp.array([[4.0], [-3.0]])  # at right angles to it
      >>> updates, _ = tx.update(gradient, tx.init(params), params)
      >>> f"{jnp.vdot(updates, params):.3f}"  # Adam's direction (1, -1) would give -1
      '0.000'

    References:
      Heo et al., `AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant
      Weights <https://arxiv.org/abs/2006.08217>`_, ICLR 2021, Algorithm 2.
    """
    _checks.check_decay(b1=b1, b2=b2)
    _checks.check_positive(eps=eps)
    _checks.check_scalar_or_schedule(weight_decay=weight_decay)
    _checks.check_per_leaf(mask=mask)
    _matrices.check(dimension_numbers)
    _checks.check_non_negative(delta=delta)
    _checks.check_fraction(wd_ratio=wd_ratio)
    _checks.check_flag(nesterov=nesterov)
    mu_dtype = _checks.canonical_mu_dtype(mu_dtype)

    def static(params: Any) -> list[tuple[_matrices.MatrixAxes | None, bool]]:
        axes = _matrices.matrix_axes(dimension_numbers, params, default=_projection.channel_axes)
        decays = _tree.mask_leaves(_hyperparams.mask_of(weight_decay, mask), params)
        return list(zip(axes, decays))

    def init_fn(params: optax.Params) -> ScaleByAdampState:
        static(params)
        found = _matrices.choices(dimension_numbers, params, default=_projection.channel_axes)
        _treatments.report_choices("adamp", found, matrix="adamp", other="adam")
        return ScaleByAdampState(
            count=jnp.zeros((), jnp.int32),
            mu=_tree.zeros_like(params, mu_dtype),
            nu=_tree.zeros_like(params, at_least_float32=True),
        )

    def update_fn(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ScaleByAdampState]:
        state = _tree.check_state(state, ScaleByAdampState)
        params = _tree.require_params(params, "adamp")
        count = _hyperparams.increment(state.count)

        def direction(
            g: jax.Array, m: jax.Array, v: jax.Array, c2: jax.Array
        ) -> tuple[jax.Array, ...]:
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            momentum = b1 * m + (1 - b1) * g if nesterov else m
            return momentum / (_hyperparams.sqrt(v) / jnp.sqrt(c2) + eps), m, v

        def sums(
            g: jax.Array, m: jax.Array, v: jax.Array, theta: jax.Array, of: Any, shared: Any
        ) -> tuple[Any, ...]:
            axes, _ = of
            if axes is None or theta.size == 0:
                return g, m, v, ()
            _, c2, _ = shared
            p, *_ = direction(g, m, v, c2)
            operands = _projection.apart(direction, p, theta, g, m, v, c2)
            return g, m, v, _projection.channel_sums(*operands, axes)

        def rule(
            g: jax.Array,
            m: jax.Array,
            v: jax.Array,
            theta: jax.Array,
            of: Any,
            radial: _projection.Radial | None,
            shared: Any,
        ) -> tuple[jax.Array, ...]:
            _, decays = of
            c1, c2, rate = shared
            p, m, v = direction(g, m, v, c2)
            rho = 1.0
            if radial is not None:
                p = p - radial.factor * theta
                rho = jnp.where(radial.projects, wd_ratio, 1.0)
            u = p / c1
            return (u + rate * rho * theta if decays else u), m, v

        def scalars(dtype: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            rate = _hyperparams.value_at("weight_decay", weight_decay, state.count)
            corrections = _hyperparams.bias_corrections(b1, b2, count)
            return *corrections(dtype), jnp.asarray(rate, dtype)

        updates, mu, nu = _projection.map_projected(
            sums,
            rule,
            updates,
            state.mu,
            state.nu,
            params=params,
            static=static(params),
            shared=scalars,
            delta=delta,
            eps=eps,
        )
        return updates, ScaleByAdampState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: _tree.Mask = None,
    *,
    delta: _hyperparams.Scalar = 0.1,
    wd_ratio: _hyperparams.Scalar = 0.1,
    nesterov: bool = False,
    dimension_numbers: _matrices.DimensionNumbers = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformation:
    r"""AdamP with decoupled weight decay.

    Inside a `shard_map` over an axis that splits a weight the rule sees the shard and takes it for
    the whole leaf: call it outside, under `jit` with sharded arrays, where all is right, or gather
    the gradient first.

    Args:
      learning_rate: step size or schedule.
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment and to the norms; positive.
      weight_decay: decoupled decay, a number or a schedule, multiplied by the learning rate, and by
        `wd_ratio` where the weights look scale-invariant.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      delta: threshold of the cosine, times the root of the vector's dimension.
      wd_ratio: factor of the weight decay of projected weights, in [0, 1].
      nesterov: use :math:`\beta_1 m_t + (1 - \beta_1) g_t` in place of :math:`m_t`.
      dimension_numbers: which axes are inputs and outputs of a kernel, whose channels are its
        outputs; all other axes count matrices, each projected by itself: a tree of
        `optax.contrib.MuonDimensionNumbers` with None for what follows plain Adam, or a function of
        the parameters that returns one, or a mapping of patterns to them, each a regular expression
        for a path, or the path of a layer, from its beginning or from a "/" to its end, with all
        other leaves by default. By default names, shapes and neighbours decide, as
        `muon_dimension_numbers` describes; input, output and depthwise layers are projected too,
        and the rows of tables of embeddings. Biases, scales, norms, and kernels whose axes nothing
        tells follow plain Adam; `jaxopt_lab.treatments` shows which.
      mu_dtype: dtype of the first moment; by default the parameter's.

    Returns:
      A `GradientTransformation`; its update needs `params`, and
      ignores extra arguments. Updates are computed in float32 at least and rounded once, to the
      wider of the gradient's and the parameter's dtype; where weights of 16 bits are rounded
      stochastically, float32 gradients keep what that needs.

    Raises:
      ValueError: a hyper-parameter out of range, axes that a parameter does not have, missing
        `params`, or gradients that do not match; also a negative `learning_rate`.
      TypeError: parameters or gradients that are not real floating point, and what is no number, no
        schedule or no flag where one is expected; the message has the argument's name.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> tx = adamp(0.1, weight_decay=1e-2)
      >>> params = {"kernel": jnp.eye(3), "bias": jnp.zeros(3)}
      >>> grads = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> f"{optax.apply_updates(params, updates)['kernel'][0, 0]:.3f}"
      '0.899'

    See Also:
      `scale_by_adamp` for the bare rule and the source.
    """
    rule = scale_by_adamp(
        b1,
        b2,
        eps,
        weight_decay,
        mask,
        delta=delta,
        wd_ratio=wd_ratio,
        nesterov=nesterov,
        dimension_numbers=dimension_numbers,
        mu_dtype=mu_dtype,
    )
    return _hyperparams.ready_made(rule, learning_rate, method="adamp")
