"""For each check of the contract a transformation that breaks its promise."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

import jaxopt_lab
from tests.testing.reference import MomentumState, healthy


def stateless(rule: Callable[..., Any]) -> optax.GradientTransformation:
    """`rule(gradients, params)` gives the updates."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return rule(updates, params), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def leafwise(rule: Callable[[jax.Array], Any]) -> optax.GradientTransformation:
    return stateless(lambda gradients, params: jax.tree.map(rule, gradients))


def stateful(init: Callable[..., Any], next_state: Callable[..., Any]) -> Any:
    """Passes gradients through; `next_state(gradients, state)` follows `init(params)`."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return updates, next_state(updates, state)

    return optax.GradientTransformation(init, update)


def counts_traces() -> optax.GradientTransformation:
    """The number of traces so far, hidden in the closure, scales the updates."""
    inner, calls = healthy(), [0]

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        calls[0] += 1
        updates, state = inner.update(updates, state, params)
        return jax.tree.map(lambda u: (u * calls[0]).astype(u.dtype), updates), state

    return optax.GradientTransformation(inner.init, update)


def two_leaves_only() -> optax.GradientTransformation:
    inner = healthy()

    def init(params: Any) -> Any:
        if len(jax.tree.leaves(params)) != 2:
            raise ValueError("expected two leaves")
        return inner.init(params)

    return optax.GradientTransformation(init, inner.update)


def moving_state() -> optax.GradientTransformation:
    """The momentum is in float16 from the first update on."""
    return stateful(
        lambda params: optax.tree.zeros_like(params),
        lambda gradients, state: optax.tree.cast(gradients, jnp.float16),
    )


def momentum_of(dtype_of: Callable[[Any, Any], Any]) -> optax.GradientTransformation:
    return stateful(
        lambda params: optax.tree.zeros_like(params),
        lambda gradients, state: jax.tree.map(
            lambda g, m: g.astype(dtype_of(g, m)), gradients, state
        ),
    )


def zips_leaves() -> optax.GradientTransformation:
    return stateful(
        lambda params: [jnp.zeros_like(leaf) for leaf in jax.tree.leaves(params)],
        lambda gradients, state: [
            g + m for g, m in zip(jax.tree.leaves(gradients), state, strict=False)
        ],
    )


def loops_until_small() -> optax.GradientTransformation:
    def halve(leaf: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: jnp.max(jnp.abs(x)) > 1, lambda x: x / 2, leaf)

    return leafwise(halve)


def with_eager_raise() -> optax.GradientTransformation:
    def rule(gradients: Any, params: Any) -> Any:
        for leaf in jax.tree.leaves(gradients):
            if not isinstance(leaf, Tracer) and not np.isfinite(leaf).all():
                raise FloatingPointError("gradient is not finite")
        return gradients

    return stateless(rule)


def no_extra_arguments() -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, *, value: Any = None) -> Any:
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def shared_buffer() -> optax.GradientTransformation:
    def init(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"mu": zeros, "nu": zeros}

    return stateful(init, lambda gradients, state: jax.tree.map(jnp.copy, state))


def float_rate(learning_rate: Any) -> optax.GradientTransformation:
    return optax.sgd(float(learning_rate))


def negated_rate(learning_rate: Any) -> optax.GradientTransformation:
    return leafwise(lambda g: -learning_rate * g)


def needs_params(gradients: Any, params: Any) -> Any:
    return jax.tree.map(lambda g, p: g + p.astype(g.dtype), gradients, params)


def normalised_by_all(gradients: Any, params: Any) -> Any:
    norm = optax.tree.norm(gradients)
    return jax.tree.map(lambda g: (g / norm).astype(g.dtype), gradients)


def unpacked_state() -> optax.GradientTransformation:
    def next_state(gradients: Any, state: Any) -> Any:
        count, moments = state
        return MomentumState(count, moments)

    return stateful(healthy().init, next_state)


def _stacked_maximum(gradients: Any, params: Any) -> Any:
    largest = jnp.max(jnp.stack([jnp.max(leaf) for leaf in jax.tree.leaves(gradients)]))
    return jax.tree.map(lambda leaf: leaf + 0 * largest, gradients)


def _with_none(gradients: Any, params: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf * 1, gradients, is_leaf=lambda leaf: leaf is None)


def _by_position(gradients: Any, params: Any) -> Any:
    leaves, structure = jax.tree.flatten(gradients)
    return structure.unflatten([leaf * (index + 1) for index, leaf in enumerate(leaves)])


def _one_dtype(gradients: Any, params: Any) -> Any:
    return optax.tree.cast(gradients, jax.tree.leaves(gradients)[0].dtype)


def _as_dict(gradients: Any, params: Any) -> Any:
    return {str(index): leaf for index, leaf in enumerate(jax.tree.leaves(gradients))}


def cast_updates(dtype: str) -> Callable[[], optax.GradientTransformation]:
    def make() -> optax.GradientTransformation:
        return leafwise(lambda g: g.astype(dtype))

    return make


def _half_power(power: int) -> Callable[[], optax.GradientTransformation]:
    """Computes in float16 whatever comes in."""
    return lambda: leafwise(lambda g: (g.astype(jnp.float16) ** power).astype(g.dtype))


def _unguarded_root() -> optax.GradientTransformation:
    def rule(g: jax.Array) -> jax.Array:
        return g / jnp.sqrt(jnp.square(g.astype(jnp.float16))).astype(g.dtype)

    return leafwise(rule)


def _pole_at_one() -> optax.GradientTransformation:
    return leafwise(lambda g: 1 / (1 - g))


def _slope_of_root() -> optax.GradientTransformation:
    return leafwise(lambda g: g / (jnp.sqrt(g * g) + 1e-8))


def _cubed_state() -> optax.GradientTransformation:
    return stateful(
        optax.tree.zeros_like, lambda gradients, state: jax.tree.map(lambda g: g**3, gradients)
    )


def _trust_ratio(gradients: Any, params: Any) -> Any:
    return jax.tree.map(lambda g, p: g * jnp.linalg.norm(p) / jnp.linalg.norm(g), gradients, params)


def _wrapping_counter() -> optax.GradientTransformation:
    return stateful(lambda params: jnp.zeros((), jnp.int32), lambda gradients, state: state + 1)


def _key_in_state() -> optax.GradientTransformation:
    return stateful(lambda params: jax.random.key(0), lambda gradients, state: state)


def _fixed_state() -> optax.GradientTransformation:
    return stateful(lambda params: jnp.zeros((4, 5)), lambda gradients, state: state)


def _fresh_zeros() -> optax.GradientTransformation:
    return stateful(
        lambda params: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params),
        lambda gradients, state: state,
    )


def _init_by(function: Callable[[Any], Any]) -> Callable[[], optax.GradientTransformation]:
    return lambda: stateful(
        lambda params: jax.tree.map(function, params), lambda gradients, state: state
    )


def _real_part() -> optax.GradientTransformation:
    return leafwise(jnp.real)


def _rate(rule: Callable[..., jax.Array]) -> Callable[..., optax.GradientTransformation]:
    """A constructor with a learning rate and a decay, of `rule(g, p, learning_rate, decay)`."""

    def make(learning_rate: float, weight_decay: float = 0.0) -> optax.GradientTransformation:
        return stateless(
            lambda gradients, params: jax.tree.map(
                lambda g, p: rule(g, p, learning_rate, weight_decay).astype(p.dtype),
                gradients,
                params,
            )
        )

    return functools.partial(make, 0.1)


def _rounded_to_the_gradients(gradients: Any, params: Any) -> Any:
    """Float32 that is no wider than the gradient's dtype inside."""
    return jax.tree.map(lambda g, p: (g * g).astype(p.dtype), gradients, params)


def _rate_in_the_gradients_dtype(g: Any, p: Any, rate: float, decay: float) -> jax.Array:
    return -jnp.asarray(rate, g.dtype) * g


def _decay_in_the_gradients_dtype(g: Any, p: Any, rate: float, decay: float) -> jax.Array:
    return -rate * (g + jnp.asarray(decay, g.dtype) * p.astype(g.dtype)).astype(p.dtype)


def _climbs(g: Any, p: Any, rate: float, decay: float) -> jax.Array:
    return rate * g


def calls_its_mask(mask: Any) -> optax.GradientTransformation:
    """Takes whatever can be called for a function."""

    def rule(gradients: Any, params: Any) -> Any:
        return jax.tree.map(jnp.multiply, mask(params) if callable(mask) else mask, gradients)

    return stateless(rule)


def decay_only_if_not_zero(weight_decay: Any) -> optax.GradientTransformation:
    links = [optax.trace(0.9)]
    if not isinstance(weight_decay, float) or weight_decay != 0:
        links.append(optax.add_decayed_weights(weight_decay))
    return optax.chain(*links)


def hidden_count(learning_rate: Any) -> optax.GradientTransformation:
    """Counts its steps in an array without a name."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        (count,) = state
        rate: Any = learning_rate(count) if callable(learning_rate) else learning_rate
        return jax.tree.map(lambda g: -rate * g, updates), (count + 1,)

    return optax.GradientTransformation(lambda params: (jnp.zeros((), jnp.int32),), update)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["momentum"], meta_fields=[])
@dataclasses.dataclass
class _Opaque:
    """A node that only JAX knows."""

    momentum: Any


def _opaque_state() -> optax.GradientTransformation:
    return stateful(lambda params: _Opaque(params), lambda gradients, state: state)


def _loop_from_a_constant() -> optax.GradientTransformation:
    def rule(g: jax.Array) -> jax.Array:
        largest = jnp.max(jnp.abs(g))
        return g + jax.lax.fori_loop(0, 3, lambda _, x: x / 2 + largest, 0.0)

    return leafwise(rule)


def _loop_over_a_number() -> optax.GradientTransformation:
    return leafwise(lambda g: g * jax.lax.fori_loop(0, 3, lambda _, x: x + 1, 0).astype(g.dtype))


def _sums_over_the_first_axis() -> optax.GradientTransformation:
    """In a box of two names there is then an array of one axis."""
    return stateful(
        lambda params: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[:1]), params),
        lambda gradients, state: state,
    )


def _size_by_the_tree() -> optax.GradientTransformation:
    return stateful(
        lambda params: jnp.zeros(len(str(jax.tree.structure(params)))),
        lambda gradients, state: state,
    )


def _type_by_the_tracer() -> optax.GradientTransformation:
    def init(params: Any) -> Any:
        traced = any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(params))
        return jnp.zeros((), jnp.int32 if traced else jnp.float32)

    return stateful(init, lambda gradients, state: state)


def _treats_dictionaries_alone() -> optax.GradientTransformation:
    return jaxopt_lab.frugal_adamw(
        0.1,
        always_full=lambda params: jax.tree.map(
            lambda leaf: isinstance(params, dict) or leaf.ndim < 2, params
        ),
    )


def _each(names: str, make: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return dict.fromkeys(names.split(), make)


# The name of a check, and a constructor of something that breaks its promise.
BROKEN: dict[str, Callable[..., Any]] = {
    **_each(
        "dict_tree list_tree tuple_tree namedtuple_tree dataclass_tree ordered_dict_tree "
        "nested_tree bare_array",
        lambda: stateless(_as_dict),
    ),
    "empty_tree": lambda: stateless(_stacked_maximum),
    "none_leaf": lambda: stateless(_with_none),
    "scalar_leaf": lambda: leafwise(lambda g: g / g.shape[0]),
    "length_one_leaf": lambda: leafwise(lambda g: g / jnp.sqrt(jnp.sum((g - jnp.mean(g)) ** 2))),
    **_each(
        "empty_leaf empty_matrix_leaf empty_leaves", lambda: leafwise(lambda g: g / jnp.max(g))
    ),
    **_each("three_axes_leaf four_axes_leaf", lambda: leafwise(lambda g: g if g.ndim < 3 else g.T)),
    "nesting_invariance": lambda: stateless(_by_position),
    **_each("numpy_leaves python_float_leaves", optax.identity),
    "callable_trees": functools.partial(calls_its_mask, True),
    "random_trees": cast_updates("float32"),
    "float32_updates": cast_updates("float16"),
    **_each("bfloat16_updates float16_updates float64_updates", cast_updates("float32")),
    "mixed_dtypes": lambda: stateless(_one_dtype),
    **_each(
        "float32_gradients_bfloat16_weights float32_gradients_float16_weights "
        "float32_gradients_float64_weights",
        lambda: momentum_of(lambda g, m: g.dtype),
    ),
    "bfloat16_gradients_float32_weights": optax.identity,
    "float16_gradients_float32_weights": lambda: stateless(_rounded_to_the_gradients),
    "small_rate_with_narrow_gradients": _rate(_rate_in_the_gradients_dtype),
    "weight_decay_with_narrow_gradients": _rate(_decay_in_the_gradients_dtype),
    **_each(
        "strict_dtype_promotion_float32 strict_dtype_promotion_bfloat16 "
        "strict_dtype_promotion_mixed",
        lambda: leafwise(lambda g: g * jnp.ones((), jnp.int32)),
    ),
    "strict_rank_promotion": lambda: leafwise(lambda g: g * jnp.ones(g.shape[-1:])),
    **_each(
        "float16_gradient_0 float16_gradient_1e-08 float16_gradient_1e-05 bfloat16_gradient_0 "
        "bfloat16_gradient_1e-08 bfloat16_gradient_1e-05 float32_gradient_0 "
        "float32_gradient_1e-45 float32_gradient_1e-30",
        _unguarded_root,
    ),
    **_each("float16_gradient_1 bfloat16_gradient_1", _pole_at_one),
    **_each(
        "float16_gradient_60000 bfloat16_gradient_60000 float32_gradient_1e+19 "
        "float32_gradient_1e+25_updates",
        _half_power(3),
    ),
    "float32_gradient_1e+25_state": _cubed_state,
    "zero_weights": lambda: stateless(_trust_ratio),
    "counter_at_maximum": _wrapping_counter,
    "nan_stays_in_its_leaf": lambda: stateless(normalised_by_all),
    "nan_propagates": lambda: leafwise(jnp.nan_to_num),
    "descends": _rate(_climbs),
    "nonfinite_gradients_accepted": with_eager_raise,
    "differentiable": loops_until_small,
    "differentiable_at_zero_gradient": _slope_of_root,
    "resume_bit_exact": _key_in_state,
    "extra_arguments": no_extra_arguments,
    "extra_arguments_ready_made": functools.partial(negated_rate, 0.1),
    "state_tree_at_zero": functools.partial(decay_only_if_not_zero, 0.0),
    **_each("masked partition multi_transform freeze partition_empty_label", two_leaves_only),
    **_each("chain multi_steps_float32 multi_steps_bfloat16", counts_traces),
    "inject_hyperparams": functools.partial(float_rate, 0.1),
    "inject_hyperparams_bfloat16": functools.partial(optax.sgd, 0.1),
    "inject_hyperparams_rounded": functools.partial(optax.adam, 0.1),
    "learning_rate_schedule": functools.partial(negated_rate, 0.1),
    "apply_if_finite": moving_state,
    "tree_map_params": _fixed_state,
    "donation_after_eager_init": shared_buffer,
    **_each(
        "jit_equals_eager donation_after_jitted_init vmap scan_carry lowering_deterministic",
        counts_traces,
    ),
    **_each("cond_branches compiles_once compiles_once_with_schedule", moving_state),
    "init_on_shape_structs": _init_by(lambda leaf: 0 * leaf),
    "init_under_eval_shape": _init_by(np.zeros_like),
    **_each(
        "shard_map shard_map_unchecked pmap sharded_rows sharded_columns sharded_replicated "
        "explicit_axes nnx_optimizer nnx_optimizer_restored",
        counts_traces,
    ),
    **_each("shard_map_varying_gradients shard_map_varying_state", _loop_from_a_constant),
    "disable_jit": _loop_over_a_number,
    "x64": lambda: leafwise(lambda g: g + jnp.zeros(())),
    "debug_nans": lambda: leafwise(lambda g: jnp.where(g > 0, jnp.sqrt(g), g)),
    "debug_infs": lambda: leafwise(lambda g: jnp.where(g == 0, g, 1 / g)),
    **_each("flax_serialization linen_train_state", _opaque_state),
    **_each("linen_partitioned linen_partitioned_sharded", _sums_over_the_first_axis),
    "nnx_current_learning_rate": functools.partial(hidden_count, 0.1),
    "nnx_state_bytes": _size_by_the_tree,
    "nnx_treatments": _treats_dictionaries_alone,
    "nnx_init_sharded": _type_by_the_tracer,
    **_each("sharded_state_eager_init sharded_state_jitted_init", _fresh_zeros),
    "gradient_shape_refused": functools.partial(optax.trace, 0.9),
    **_each("missing_leaf_refused extra_leaf_refused", zips_leaves),
    **_each(
        "integer_gradient_refused integer_weights_refused bool_weights_refused",
        functools.partial(optax.trace, 0.9),
    ),
    "complex_weights": _real_part,
    "missing_params": lambda: stateless(needs_params),
    "foreign_state_refused": unpacked_state,
}
