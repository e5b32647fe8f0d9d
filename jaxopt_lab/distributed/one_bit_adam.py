r"""1-bit Adam: after a warm-up, Adam's momentum travels as signs and its second moment is frozen.

    warm-up:   g = mean_i g_i,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    then:      m = OneBit_i(b1 m + (1 - b1) g_i),         v as it is
    update = m / (sqrt(v) + eps)

Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence
Speed", ICML 2021, arXiv:2102.02888, algorithm 1, and its authors' code in DeepSpeed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jaxopt_lab import _checks, _compat, _hyperparams, _tree
from jaxopt_lab.distributed import _axes, _flat, _weights, exchange


class ScaleByOneBitAdamState(NamedTuple):
    """State of `scale_by_one_bit_adam`: 12 + 4/N bytes a parameter in float32.

    Under `shard_map` the errors are each replica's own (a spec with the axis); all else is equal on
    all replicas.

    Attributes:
      count: steps taken; int32, shape ().
      mu: m; shapes of the parameters, at least float32.
      nu: v; as `mu`.
      worker_error: what the replica's signs have not yet said; as `mu`.
      server_error: the same of the part that it averages; shape (L/N,), L a multiple of 8N.
    """

    count: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    worker_error: optax.Updates
    server_error: jax.Array


def one_bit_mean(
    x: jax.Array,
    worker_error: jax.Array,
    server_error: jax.Array,
    present: jax.Array,
    axis_name: _axes.AxisName,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Averages vectors over replicas by their signs, with feedback of both errors.

    .. math::
      a_i &= x_i + e_i, \quad s_i = \|a_i\|_2 / \sqrt{n}, \quad
      e_i' = a_i - s_i \, \mathrm{sgn}(a_i) \\
      z_j &= \frac{1}{N} \sum_i s_i \, \mathrm{sgn}(a_i)_j + \delta_j, \quad
      t_j = \|z_j\|_2 / \sqrt{n_j}, \quad \delta_j' = z_j - t_j \, \mathrm{sgn}(z_j)

    and the mean is :math:`(t_1 \mathrm{sgn}(z_1), \dots, t_N \mathrm{sgn}(z_N))`, where replica j
    averages part j, n counts the entries that are present, and sgn(0) = 1. One bit an entry is sent
    twice: to the replica that averages it and from there to all.

    Args:
      x: the replica's vector, shape (L,), L a multiple of 8N, in at least float32.
      worker_error: :math:`e_i`, shape (L,).
      server_error: :math:`\delta_i` of the replica's part, shape (L/N,).
      present: booleans of shape (L,), equal on all replicas. Other entries, such as padding, are 0
        in all three results and have no part in the scales.
      axis_name: the mapped axis, or a tuple of several, which count as one.

    Returns:
      The mean, with the same bits on all replicas, and the two errors. On one replica the mean is
      `x` and no error changes.
    """
    replicas = _axes.size(axis_name)
    if replicas == 1 or not x.size:
        return jnp.where(present, _axes.pmean(x, axis_name), 0), worker_error, server_error
    mine = jnp.reshape(present, (replicas, -1))[lax.axis_index(axis_name)]

    a = jnp.where(present, x + worker_error, 0)
    scale = _root_mean_square(a, present)
    worker_error = jnp.where(present, a - scale * _sign(a), 0)
    parts = jnp.packbits(a >= 0).reshape(replicas, -1)
    received = lax.all_to_all(parts, axis_name, split_axis=0, concat_axis=0, tiled=True)
    scales = _axes.all_gather(scale, axis_name)

    z = jnp.sum(_unpack(received, scales), axis=0) / replicas
    z = jnp.where(mine, z + server_error, 0)
    scale = _root_mean_square(z, mine)
    server_error = jnp.where(mine, z - scale * _sign(z), 0)
    signs = _axes.all_gather(jnp.packbits(z >= 0), axis_name)
    scales = _axes.all_gather(scale, axis_name)
    mean = jnp.reshape(_unpack(signs, scales), -1)
    return jnp.where(present, mean, 0), worker_error, server_error


def scale_by_one_bit_adam(
    freeze_step: int | jax.Array,
    axis_name: _axes.AxisName,
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-8,
    *,
    bias_correction: bool = False,
    momentum_mask: _tree.Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Rescales by Adam's moments, of which after a warm-up only the first is renewed, by signs.

    .. math::
      t \le T: \quad m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
      v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2, \quad g_t = \tfrac{1}{N} \sum_i g_{t,i} \\
      t > T: \quad m_t &= \text{OneBit}_i(\beta_1 m_{t-1} + (1 - \beta_1) g_{t,i}), \quad
      v_t = v_T \\
      d_t &= m_t / (\sqrt{v_t} + \epsilon)

    with `one_bit_mean` for OneBit, of all parameters as one vector. A step sends 8 bytes a
    parameter in the warm-up and 1/4 byte then. Give each replica its own
    gradient: in the second stage it never needs to be averaged.

    A sign cannot say zero. Entries whose second moment is zero, which had no gradient in the
    warm-up, would move by scale / eps; they are left out of the exchange like padding, and their
    momentum and direction are zero. What has hardly any gradient until later should be named in
    `momentum_mask`. A NaN or infinity in any leaf reaches all of them, in the second stage, through
    the scales; the errors then stay as they were. The moments take it up, as Adam's: see
    `apply_if_finite`.

    Args:
      freeze_step: T, the number of warm-up steps: 15 to 25 % of all, says the documentation of the
        authors' code. The second moment should have settled.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      b1: decay rate of the momentum, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root.
      bias_correction: divides the moments by :math:`1 - \beta_1^t` and
        :math:`1 - \beta_2^{\min(t, T)}`, as Adam. The authors' code does not.
      momentum_mask: tree of booleans, or of boolean arrays that broadcast to the parameters, or a
        function of the parameters that returns one: entries with False are left out in the second
        stage, as above.

    Returns:
      A `GradientTransformationExtraArgs`; call `init` under the mapped axis. Its update takes
      `weight` as `sync_gradients` does.

    Raises:
      ValueError: a rate outside [0, 1), `eps` not positive, `freeze_step` below 1; at init, an axis
        that is not bound or a mask that does not match; at update, gradients that do not match or
        that `jax.grad` has already summed (see `vary`).
      TypeError: a `freeze_step` that is no integer, a mask that is not boolean, or parameters or
        gradients that are not real floating point.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab.distributed.one_bit_adam import scale_by_one_bit_adam
      >>> tx = scale_by_one_bit_adam(1, "replica", b1=0.5, b2=0.75)
      >>> def two_steps(g):
      ...     warm, state = tx.update(g, tx.init(g))
      ...     compressed, _ = tx.update(g, state)
      ...     return warm, compressed
      >>> grads = jnp.array([[1.0, -3.0], [3.0, -1.0]])
      >>> warm, compressed = jax.vmap(two_steps, axis_name="replica")(grads)
      >>> compressed
      Array([[ 1.5811388, -1.5811388],
             [ 1.5811388, -1.5811388]], dtype=float32)

    References:
      Tang et al., `1-bit Adam <https://arxiv.org/abs/2102.02888>`_, ICML 2021, algorithm 1; moments
      without correction and the scales as in the authors' code in DeepSpeed.
    """
    _checks.check_decay(b1=b1, b2=b2)
    _checks.check_positive(eps=eps)
    _checks.check_positive_integer(freeze_step=freeze_step)
    _checks.check_flag(bias_correction=bias_correction)
    _checks.check_per_leaf(momentum_mask=momentum_mask)
    axis_name = _axes.canonical(axis_name)

    def init_fn(params: optax.Params) -> ScaleByOneBitAdamState:
        replicas = _axes.size(axis_name)
        mu, nu, error = (_tree.zeros_like(params, at_least_float32=True) for _ in range(3))
        _masked(nu, momentum_mask, params)
        vector = _flat.padded(_flat.ravel(error), 8 * replicas)
        return ScaleByOneBitAdamState(
            count=jnp.zeros((), jnp.int32),
            mu=mu,
            nu=nu,
            worker_error=_axes.vary(error, axis_name),
            server_error=_axes.vary(vector[: vector.size // replicas], axis_name),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        weight: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByOneBitAdamState]:
        del extra_args
        state = _tree.check_state(state, ScaleByOneBitAdamState)
        _axes.require_own(updates, axis_name, "scale_by_one_bit_adam")
        _tree.check_updates(updates, state.mu)
        updates = _weights.for_mean(updates, weight, axis_name)
        count = _hyperparams.increment(state.count)

        def momentum(g: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array]:
            return g, b1 * m + (1 - b1) * g

        def second_moment(g: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            return g, b2 * v + (1 - b2) * jnp.square(g)

        def warm_up() -> tuple[Any, ...]:
            mean = _axes.pmean(_flat.ravel(updates), axis_name)
            grads = _flat.unravel(mean, state.mu)
            _, mu = _tree.map_leaves(momentum, grads, state.mu)
            _, nu = _tree.map_leaves(second_moment, grads, state.nu)
            return mu, nu, state.worker_error, state.server_error

        def compressed() -> tuple[Any, ...]:
            def vector(tree: Any) -> jax.Array:
                return _flat.padded(_flat.ravel(tree), 8 * _axes.size(axis_name))

            _, own = _tree.map_leaves(momentum, updates, state.mu)
            present = vector(_masked(state.nu, momentum_mask, state.mu)) != 0
            worker, server = vector(state.worker_error), state.server_error
            exchange.check_server_error(server, worker.size // _axes.size(axis_name), axis_name)
            mean, *errors = one_bit_mean(vector(own), worker, server, present, axis_name)
            worker_error = exchange.remembered(mean, errors[0], worker)
            server_error = exchange.remembered(mean, errors[1], server)
            mu = _flat.unravel(mean, state.mu)
            worker_error = _flat.unravel(worker_error, state.worker_error)
            return mu, state.nu, worker_error, server_error

        mu, nu, worker_error, server_error = _compat.cond(
            state.count < freeze_step, warm_up, compressed
        )

        def rule(g: jax.Array, m: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
            if bias_correction:
                m_hat = m / _hyperparams.one_minus_power(b1, count, g.dtype)
                averaged = jnp.minimum(count, freeze_step)
                v_hat = v / _hyperparams.one_minus_power(b2, averaged, g.dtype)
                return m_hat / (_hyperparams.sqrt(v_hat) + eps), m, v
            return m / (_hyperparams.sqrt(v) + eps), m, v

        # The moments are in float32, whatever the parameters are in.
        like = updates if params is None else params
        updates, mu, nu = _tree.map_leaves(rule, updates, mu, nu, like=like)
        return updates, ScaleByOneBitAdamState(count, mu, nu, worker_error, server_error)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    freeze_step: int | jax.Array,
    axis_name: _axes.AxisName,
    b1: _hyperparams.Scalar = 0.9,
    b2: _hyperparams.Scalar = 0.999,
    eps: _hyperparams.Scalar = 1e-8,
    weight_decay: _hyperparams.Scalar = 0.0,
    mask: _tree.Mask = None,
    *,
    bias_correction: bool = False,
    momentum_mask: _tree.Mask = None,
) -> optax.GradientTransformationExtraArgs:
    r"""1-bit Adam with decoupled weight decay.

    .. math::
      \theta_t = \theta_{t-1} - \eta_t \, (m_t / (\sqrt{v_t} + \epsilon) + \lambda \theta_{t-1})

    with the moments of `scale_by_one_bit_adam`: of the mean gradient in the first T steps, then the
    first by its signs and the second as it is.

    Args:
      learning_rate: step size or schedule.
      freeze_step: T, the number of warm-up steps: 15 to 25 % of all, says the documentation of the
        authors' code. The second moment should have settled.
      axis_name: the mapped axis, or a tuple of several, which count as one.
      b1: decay rate of the momentum, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root.
      weight_decay: decoupled decay, multiplied by the learning rate.
      mask: tree of booleans, or a function of the parameters that returns one: what decays.
      bias_correction: divides the moments by :math:`1 - \beta_1^t` and
        :math:`1 - \beta_2^{\min(t, T)}`, as Adam. The authors' code does not.
      momentum_mask: tree of booleans, or of boolean arrays that broadcast to the parameters, or a
        function of the parameters that returns one: entries with False are left out in the second
        stage, as above.

    Returns:
      A `GradientTransformationExtraArgs`; its update needs `params` if `weight_decay` is not 0.

    Raises:
      ValueError: a rate outside [0, 1), `eps` not positive, `freeze_step` below 1, a negative
        `learning_rate` or `weight_decay`; at init, an axis that is not bound or a mask that does
        not match; at update, gradients that do not match or that `jax.grad` has already summed (see
        `vary`).
      TypeError: a `freeze_step` that is no integer, a mask that is not boolean, `axis_name` no
        name, or parameters or gradients that are not real floating point.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab.distributed.one_bit_adam import one_bit_adam
      >>> tx = one_bit_adam(0.1, 10, "replica", b1=0.0, b2=0.75)
      >>> def step(params, g):
      ...     updates, _ = tx.update(g, tx.init(params), params)
      ...     return optax.apply_updates(params, updates)
      >>> grads = jnp.array([[1.0, -3.0], [3.0, -1.0]])
      >>> jax.vmap(step, (None, 0), axis_name="replica")(jnp.zeros(2), grads)[0]
      Array([-0.2,  0.2], dtype=float32)

    See Also:
      `scale_by_one_bit_adam` for the bare rule and the source.
    """
    rule = scale_by_one_bit_adam(
        freeze_step,
        axis_name,
        b1,
        b2,
        eps,
        bias_correction=bias_correction,
        momentum_mask=momentum_mask,
    )
    chain = _hyperparams.ready_made(
        rule, learning_rate, weight_decay, mask, method="one_bit_adam", lifts_gradients=False
    )
    return optax.with_extra_args_support(chain)


def _sign(x: jax.Array) -> jax.Array:
    return jnp.where(x >= 0, jnp.ones_like(x), -jnp.ones_like(x))


def _root_mean_square(x: jax.Array, present: jax.Array) -> jax.Array:
    """Returns the root of the mean square of the entries present, or 0 if there are none."""
    entries = jnp.maximum(jnp.sum(present, dtype=jnp.int32), 1).astype(x.dtype)
    return jnp.sqrt(jnp.sum(jnp.square(x)) / entries)


def _unpack(bits: jax.Array, scales: jax.Array) -> jax.Array:
    """Returns scale times sign, shape (rows, 8 n), of bits of shape (rows, n)."""
    positive = jnp.unpackbits(bits, axis=-1) != 0
    return jnp.where(positive, scales[:, None], -scales[:, None])


def _entries(mask: _tree.Mask, params: Any) -> list[Any]:
    """Returns, for each leaf, a boolean or an array of them, one an entry."""
    if mask is None:
        return [True] * len(jax.tree.leaves(params))
    given = mask(params) if _tree.is_function(mask) else mask
    return _tree.broadcast_prefix(given, params, "momentum_mask")


def _masked(nu: Any, mask: _tree.Mask, params: Any) -> Any:
    """Returns `nu` with zeros where the mask, made for `params`, has False."""
    leaves, structure = jax.tree.flatten(nu)
    found = []
    for (name, _), leaf, keep in zip(_tree.leaves_with_names(nu), leaves, _entries(mask, params)):
        if not jnp.issubdtype(jnp.result_type(keep), jnp.bool_):
            raise TypeError(
                f"momentum_mask of '{name}' must be boolean, got {jnp.result_type(keep)}"
            )
        try:
            jnp.broadcast_to(keep, leaf.shape)
        except ValueError as error:
            raise ValueError(
                f"momentum_mask of '{name}' has shape {jnp.shape(keep)}, which does not broadcast "
                f"to {leaf.shape}"
            ) from error
        found.append(leaf if keep is True else jnp.where(keep, leaf, jnp.zeros_like(leaf)))
    return structure.unflatten(found)
