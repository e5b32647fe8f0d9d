r"""Parameters in bfloat16 that do not lose small updates: stochastic rounding, or compensation.

bfloat16 has 8 significant bits. Weights of standard deviation 0.02 are about 1e-4 apart, and with
rounding to nearest most of them do not move at all under a step of 3e-5.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxopt_lab import _tree

# From here on (without sign) rounding up would reach infinity: the cell above the largest finite
# bfloat16, then infinity and NaN.
_LARGEST = 0x7F7F0000


def stochastic_round(x: jax.Array, key: jax.Array) -> jax.Array:
    r"""Rounds to bfloat16 up or down at random, so that the mean is `x`.

    .. math::
      \Pr[\text{up}] = \frac{x - \lfloor x \rfloor}{\lceil x \rceil - \lfloor x \rfloor}

    with the neighbours of `x` in bfloat16: 16 random bits are added to the bits of the float32
    number, and the low 16 are cut off. What bfloat16 can represent stays exactly, signed zeros,
    infinity and NaN included. Beyond its largest finite number rounding is to nearest, because a
    mean of finite and infinite values is none. Derivatives pass as through the identity.

    Args:
      x: real floating array of any shape. float64 is first rounded to nearest in float32.
      key: one random key, typed or an old-style array of uint32.

    Returns:
      A bfloat16 array of the shape of `x`.

    Raises:
      ValueError: `key` is not one key.
      TypeError: `x` is not real floating point.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.full(4096, 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
      >>> rounded = stochastic_round(x, jax.random.key(0))
      >>> f"{(rounded > 1).mean():.2f}"
      '0.25'

    References:
      Gupta et al., `Deep Learning with Limited Numerical Precision
      <https://arxiv.org/abs/1502.02551>`_, 2015, section 3.
    """
    key = _one_key(key)
    _tree.check_arrays("x", x)
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"x has dtype {x.dtype}; expected real floating point")
    return round_seeded(x, noise_seeds(key))


def noise_seeds(key: jax.Array) -> jax.Array:
    """Returns what `stochastic_round` draws from its key: two numbers, uint32, shape (2,)."""
    return jax.random.bits(key, (2,), jnp.uint32)


def round_seeded(x: jax.Array, seeds: jax.Array) -> jax.Array:
    """Does what `stochastic_round` does, given the seeds of its key."""
    if x.dtype == jnp.bfloat16:
        return x
    return _round(x.astype(jnp.float32), _noise(seeds, x.shape))


def _noise(seeds: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Returns 16 random bits an entry: a hash of its position, seeded by two numbers.

    It fuses with what uses it. On a CPU `jax.random.bits` would take ten times longer than the
    whole step of Adam, and several arrays of this size.
    """
    noise = jnp.full(shape, seeds[0])
    for axis in range(len(shape)):
        noise = _mix(noise ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis))
        noise = noise ^ (noise >> 16)
    return _mix(noise ^ seeds[1]) >> 16


def _mix(x: jax.Array) -> jax.Array:
    # The finaliser of MurmurHash3, but for its last line, `x ^ (x >> 16)`, which leaves the high
    # bits as they are: each input bit flips each output bit with probability 1/2.
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    return (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)


@jax.custom_jvp
def _round(x: jax.Array, noise: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    high = ((bits + noise) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(high, jnp.bfloat16)
    return jnp.where((bits & 0x7FFFFFFF) < _LARGEST, rounded, x.astype(jnp.bfloat16))


@_round.defjvp
def _round_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[jax.Array, jax.Array]:
    return _round(*primals), tangents[0].astype(jnp.bfloat16)


def apply_updates_stochastic(
    params: _tree.PyTree, updates: _tree.PyTree, key: jax.Array
) -> _tree.PyTree:
    """Adds the updates; bfloat16 parameters are summed in float32 and rounded stochastically.

    The step of a bfloat16 parameter then equals its update in the mean. Parameters of other dtypes
    are treated as by `optax.apply_updates`.

    Give the optimizer float32 gradients, `jax.tree.map(lambda g: g.astype("float32"), grads)`: a
    rule may return updates in the dtype of the gradients, and an update of 16 bits has been rounded
    to nearest before anything here can help.

    Args:
      params: the parameters, floating arrays of any shapes.
      updates: a tree like `params` with the same shapes, in float32.
      key: one random key, typed or an old-style array of uint32, a new one for each step. Each
        leaf rounds with its own, folded in by the leaf's index.

    Returns:
      The new parameters, with the dtypes of `params`.

    Raises:
      ValueError: `key` is not one key, or `updates` does not match `params`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"w": jnp.ones(4096, jnp.bfloat16)}
      >>> updates = {"w": jnp.full(4096, 2.0**-9)}
      >>> float(optax.apply_updates(params, updates)["w"].mean())
      1.0
      >>> moved = apply_updates_stochastic(params, updates, jax.random.key(0))["w"]
      >>> f"{moved.astype(jnp.float32).mean():.3f}"
      '1.002'

    See Also:
      `apply_updates_compensated`, which needs no key but 2 more bytes a parameter.
    """
    key = _one_key(key)
    _tree.check_updates(updates, params, "params")
    leaves, structure = jax.tree.flatten(params)
    results = []
    for index, (p, u) in enumerate(zip(leaves, jax.tree.leaves(updates))):
        if _is_bfloat16(p):
            total = jnp.asarray(p).astype(jnp.float32) + jnp.asarray(u).astype(jnp.float32)
            results.append(stochastic_round(total, jax.random.fold_in(key, index)))
        else:
            results.append(optax.apply_updates(p, u))
    return structure.unflatten(results)


def init_compensation(params: _tree.PyTree) -> Any:
    """Returns the state of `apply_updates_compensated`.

    Args:
      params: the parameters.

    Returns:
      A tree like `params`: zeros for bfloat16 leaves (2 bytes a parameter), None for the others.

    Raises:
      TypeError: a leaf is not real floating point.

    Examples:
      >>> import jax.numpy as jnp
      >>> init_compensation({"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)})
      {'b': None, 'w': Array([0, 0], dtype=bfloat16)}
    """
    _tree.check_params(params)
    return jax.tree.map(lambda p: _tree.zeros_like(p) if _is_bfloat16(p) else None, params)


def apply_updates_compensated(
    params: _tree.PyTree, updates: _tree.PyTree, compensation: Any
) -> tuple[_tree.PyTree, Any]:
    r"""Adds the updates and carries what rounding took from bfloat16 parameters to the next step.

    .. math::
      y_t &= u_t + c_{t-1} \\
      \theta_t &= \mathrm{bf16}(\theta_{t-1} + y_t) \\
      c_t &= \mathrm{bf16}((\theta_{t-1} - \theta_t) + y_t)

    Computed in float32. What is lost is the rounding of :math:`c_t`, at most :math:`2^{-18}` of the
    parameter a step, where plain bfloat16 loses up to :math:`2^{-9}`.

    Args:
      params: the parameters, floating arrays of any shapes.
      updates: a tree like `params` with the same shapes, in float32: a 16-bit update has been
        rounded before this begins to carry what rounding takes.
      compensation: :math:`c_{t-1}`, first from `init_compensation`.

    Returns:
      The new parameters and the new compensation, with the dtypes of the old. Parameters that are
      not bfloat16 are treated as by `optax.apply_updates`.

    Raises:
      ValueError: `updates` or `compensation` does not match `params`.

    Examples:
      >>> import jax.numpy as jnp
      >>> params, updates = jnp.ones((), jnp.bfloat16), jnp.full((), 2.0**-10)
      >>> compensation = init_compensation(params)
      >>> for _ in range(8):  # each step an eighth of the distance to the next bfloat16
      ...     params, compensation = apply_updates_compensated(params, updates, compensation)
      >>> float(params)
      1.0078125

    References:
      Kahan, "Further remarks on reducing truncation errors", 1965; Zamirai et al., `Revisiting
      BFloat16 Training <https://arxiv.org/abs/2010.06192>`_, 2020, algorithm 1.
    """
    _tree.check_updates(updates, params, "params")
    leaves, structure = jax.tree.flatten(params)
    kept = jax.tree.leaves(compensation)
    expected = [p for p in leaves if _is_bfloat16(p)]
    if [jnp.shape(c) for c in kept] != [jnp.shape(p) for p in expected]:
        raise ValueError(
            f"compensation has leaves of shapes {[jnp.shape(c) for c in kept]}, expected those of "
            f"the bfloat16 parameters, {[jnp.shape(p) for p in expected]}; see init_compensation"
        )
    pending = iter(kept)
    results = [
        _compensated(p, u, next(pending)) if _is_bfloat16(p) else (optax.apply_updates(p, u), None)
        for p, u in zip(leaves, jax.tree.leaves(updates))
    ]
    return (
        structure.unflatten([p for p, _ in results]),
        structure.unflatten([c for _, c in results]),
    )


def _compensated(p: Any, u: Any, c: Any) -> tuple[jax.Array, jax.Array]:
    p, u, c = (jnp.asarray(x).astype(jnp.float32) for x in (p, u, c))
    y = u + c
    # XLA may drop a conversion to bfloat16 and back as excess precision; this it must keep.
    new = jax.lax.reduce_precision(p + y, exponent_bits=8, mantissa_bits=7)
    lost = jnp.where(jnp.isfinite(new), (p - new) + y, 0)
    return new.astype(jnp.bfloat16), lost.astype(jnp.bfloat16)


def _is_bfloat16(leaf: Any) -> bool:
    return jnp.result_type(leaf) == jnp.bfloat16


def _one_key(key: Any) -> jax.Array:
    found = getattr(key, "dtype", None)
    if found is None or not jnp.issubdtype(found, jax.dtypes.prng_key):
        try:
            key = jax.random.wrap_key_data(key)
        except (TypeError, ValueError) as error:
            raise ValueError(_not_a_key(key)) from error
    if key.shape != ():
        raise ValueError(_not_a_key(key))
    return key


def _not_a_key(key: Any) -> str:
    found = f"{getattr(key, 'dtype', type(key).__name__)} of shape {jnp.shape(key)}"
    return f"key must be one random key (jax.random.key or jax.random.PRNGKey), got {found}"
