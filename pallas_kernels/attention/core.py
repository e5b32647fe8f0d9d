"""What surrounds every kernel route alike: its derivative, and how it meets `vmap` and sharding."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

from pallas_kernels.attention import mapped
from pallas_kernels.attention.placement import placed_like
from pallas_kernels.attention.problem import Gradients, Operands, Route, Settings, wide

# Letters of the axes of each array, as `mapped.call` reads them.
_AXES = {
    "query": "btnd",
    "key": "bskd",
    "value": "bske",
    "bias": "bnts",
    "sinks": "n",
    "offsets": "b",
    "query_lengths": "b",
    "key_value_lengths": "b",
    "query_segment_ids": "bt",
    "key_value_segment_ids": "bs",
    "dense": "bnts",
    "seeds": "bn",
}


def attend(
    route: Route, settings: Settings, operands: Operands, residual: bool = True
) -> tuple[jax.Array, jax.Array | None]:
    """Runs `route`, differentiable once in query, key, value, bias and sinks, lse included.

    Without `residual` the lse is None and never leaves the compiled program, where the search for
    infinities (`jax.debug_infs`) would take that of a row without keys for a mistake.

    Output and lse carry the names ``"attention_output"`` and ``"attention_lse"`` for checkpoint
    policies: one that saves both never runs the forward kernel twice.
    """
    if settings.interpret not in (False, True):
        return differentiable(batched(route), settings, operands)
    if not residual:
        return _compiled_output(batched(route), settings, operands), None
    return compiled(batched(route), settings, operands)


@functools.cache
def batched(route: Route) -> Route:
    """Returns the route that meets `vmap` and sharding as `mapped.call` describes.

    An interpreter with parameters orders its side effects, which no batched or partitioned call can
    carry: under one the route runs bare.
    """

    def forward(settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
        if settings.interpret not in (False, True):
            return route.forward(settings, operands)
        arrays, structure = jax.tree.flatten(operands)

        def fn(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            return route.forward(settings, jax.tree.unflatten(structure, arrays))

        dtypes = operands.query.dtype, wide(operands.query.dtype)
        output, lse = mapped.call(fn, arrays, axes_of(operands), ("btne", "bnt"), dtypes)
        return output, lse

    def backward(
        settings: Settings,
        operands: Operands,
        lse: jax.Array,
        cotangent: jax.Array,
        delta: jax.Array,
        bias_gradient: bool,
    ) -> Gradients:
        if settings.interpret not in (False, True):
            return route.backward(settings, operands, lse, cotangent, delta, bias_gradient)
        arrays, structure = jax.tree.flatten(operands)
        axes = axes_of(operands)
        number = 4 if bias_gradient else 3

        def fn(*arrays: jax.Array) -> tuple[jax.Array, ...]:
            operands = jax.tree.unflatten(structure, arrays[:-3])
            lse, cotangent, delta = arrays[-3:]
            results: Any = route.backward(settings, operands, lse, cotangent, delta, bias_gradient)
            return results[:number]

        gradients = mapped.call(
            fn,
            (*arrays, lse, cotangent, delta),
            (*axes, "bnt", "btne", "bnt"),
            axes[:number],
            [x.dtype for x in arrays[:number]],
            summed=[(i, i) for i in range(1, number)],
        )
        return Gradients(*gradients)

    return route._replace(forward=forward, backward=backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def differentiable(
    route: Route, settings: Settings, operands: Operands
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward pass of `route`, with its backward pass as the derivative."""
    return route.forward(settings, operands)


def _forward(route: Route, settings: Settings, operands: Operands) -> Any:
    # With `symbolic_zeros` every leaf comes with the news of whether its gradient is asked for.
    bias_gradient = operands.bias is not None and operands.bias.perturbed  # pyright: ignore
    operands = jax.tree.map(lambda x: x.value, operands, is_leaf=lambda x: hasattr(x, "perturbed"))
    operands = _once(operands)
    output, lse = route.forward(settings, operands)
    output = checkpoint_name(output, "attention_output")
    lse = checkpoint_name(lse, "attention_lse")
    # Finite, so that `jax.debug_infs` passes here too; the backward pass undoes it.
    saved = jnp.maximum(lse, jnp.finfo(lse.dtype).min)
    # A structure without arrays tells the backward pass, which is traced apart, what is asked. (An
    # empty array would do, but crashes XLA's CPU compiler in jax 0.11.2 under `shard_map`.)
    return (output, lse), (operands, output, saved, ((),) * bias_gradient)


def _backward(route: Route, settings: Settings, residuals: Any, cotangents: Any) -> tuple[Operands]:
    operands, output, lse, asked = _once(residuals)
    lse = jnp.where(lse == jnp.finfo(lse.dtype).min, -jnp.inf, lse)
    d_output, d_lse = (x if isinstance(x, SymbolicZero) else _once(x) for x in cotangents)
    bias_gradient = len(asked) == 1
    delta = jnp.zeros(lse.shape, lse.dtype)
    if isinstance(d_output, SymbolicZero):
        d_output = jnp.zeros(output.shape, output.dtype)
    else:
        delta += jnp.einsum("btne,btne->bnt", d_output.astype(lse.dtype), output.astype(lse.dtype))
    if not isinstance(d_lse, SymbolicZero):
        delta -= jnp.where(lse == -jnp.inf, 0, d_lse)
    gradients = route.backward(settings, operands, lse, d_output, delta, bias_gradient)
    sinks = None
    if operands.sinks is not None:
        # A sink is a key with value 0: its probability is exp(sink - lse), and its dp is 0.
        # One of -inf is no key, and neither is there another where the lse is -inf.
        share = jnp.exp(operands.sinks[None, :, None] - jnp.where(lse == -jnp.inf, 0, lse))
        sinks = -jnp.sum(share * delta, axis=(0, 2)).astype(operands.sinks.dtype)
        sinks = placed_like(sinks, operands.sinks)
    nothing: Any = None
    return (
        Operands(
            gradients.query, gradients.key, gradients.value, gradients.bias, sinks, nothing, nothing
        ),
    )


differentiable.defvjp(_forward, _backward, symbolic_zeros=True)

# Outside of `jit` too a call is traced once for its shapes, and `shard_map` accepts it there: by
# itself it cannot run custom derivatives that know symbolic zeros.
compiled = jax.jit(differentiable, static_argnums=(0, 1))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled_output(route: Route, settings: Settings, operands: Operands) -> jax.Array:
    results: Any = differentiable(route, settings, operands)
    return results[0]


def axes_of(operands: Operands) -> tuple[str, ...]:
    """Returns the letters of the axes of each array, as `mapped.call` reads them."""
    leaves = jax.tree_util.tree_leaves_with_path(operands)
    return tuple(_AXES[path[-1].name] for path, _ in leaves)


def _identity(tree: Any) -> Any:
    return tree


def _refuse(primals: Any, tangents: Any) -> Any:
    del primals, tangents
    raise NotImplementedError(
        "this implementation of attention can be differentiated once; for derivatives of its "
        "gradient use implementation='reference'"
    )


_once: Any = jax.custom_jvp(_identity)
_once.defjvp(_refuse)
