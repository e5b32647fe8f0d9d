"""What surrounds every kernel route alike: its derivative, and how it meets `vmap` and sharding."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.attention import derivatives, mapped
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


def attend(route: Route, settings: Settings, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """Runs `route`, differentiable once in query, key, value, bias and sinks, lse included.

    Output and lse carry the names ``"attention_output"`` and ``"attention_lse"`` for checkpoint
    policies: one that saves both never runs the forward kernel twice.
    """
    call = differentiable if settings.interpret not in (False, True) else compiled
    return call(batched(route), settings, operands)


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
        output, lse = mapped.call(fn, arrays, _axes(operands), ("btne", "bnt"), dtypes)
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
        axes = _axes(operands)
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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def differentiable(
    route: Route, settings: Settings, operands: Operands
) -> tuple[jax.Array, jax.Array]:
    """Runs the forward pass of `route`, with the derivatives that `derivatives` describes."""
    return route.forward(settings, operands)


# With `symbolic_zeros` the rule knows which derivatives are asked for.
@functools.partial(differentiable.defjvp, symbolic_zeros=True)
def _differentiable_jvp(route: Route, settings: Settings, primals: Any, tangents: Any) -> Any:
    (operands,), (moves,) = primals, tangents
    output, lse = differentiable(route, settings, operands)
    output = checkpoint_name(output, "attention_output")
    lse = checkpoint_name(lse, "attention_lse")
    moved = derivatives.moving(moves)
    return (output, lse), tuple(
        derivatives.push(route, settings, operands, output, lse, moved)
    )


# Outside of `jit` too a call is traced once for its shapes, and `shard_map` accepts it there: by
# itself it cannot run custom derivatives that know symbolic zeros.
compiled = jax.jit(differentiable, static_argnums=(0, 1))


def _axes(operands: Operands) -> tuple[str, ...]:
    leaves = jax.tree_util.tree_leaves_with_path(operands)
    return tuple(_AXES[path[-1].name] for path, _ in leaves)

