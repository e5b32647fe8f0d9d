"""The route ``"cudnn"``: `jax.nn.dot_product_attention`, which hands the call to NVIDIA's library.

For those who want that kernel under the same call, with the same meaning of every argument that it
has: rows that see no key are set to 0 afterwards. `jax.nn` differentiates it once, in reverse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from pallas_kernels._compat import Device
from pallas_kernels.attention import derivatives
from pallas_kernels.attention.mask import Limits, Mask, in_interval, visible
from pallas_kernels.attention.problem import Operands, Settings

IMPLEMENTATION = "cudnn"


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def attend(settings: Settings, operands: Operands) -> jax.Array:
    """Returns the output (B, T, N, dv)."""
    return _hand_over(settings, operands)


@functools.partial(attend.defjvp, symbolic_zeros=True)
def _attend_jvp(settings: Settings, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Has a tangent that can be transposed and not computed."""
    (operands,), (d_operands,) = primals, tangents
    moved = derivatives.moves(d_operands)
    differentiable = {name: getattr(operands, name) for name in derivatives.MOVABLE}
    guarded = {k: _once_p.bind(x) for k, x in differentiable.items() if x is not None}
    operands = operands._replace(**guarded)
    here = {name: getattr(operands, name) for name in moved}
    output, pull = jax.vjp(lambda x: _hand_over(settings, operands._replace(**x)), here)
    residuals, structure = jax.tree.flatten(pull)

    def transpose(residuals: Sequence[jax.Array], cotangent: jax.Array) -> tuple[jax.Array, ...]:
        (found,) = jax.tree.unflatten(structure, residuals)(cotangent)
        return tuple(found[name] for name in moved)

    aval = jax.typeof(output)
    arguments = (*residuals, *moved.values())
    return output, _tangent_p.bind(*arguments, transpose=transpose, known=len(residuals), aval=aval)


# `jax.nn` has a rule for reverse mode, and JAX's message where that does not serve has no remedy.
_tangent_p = Primitive("cudnn_attention_tangent")
_once_p = Primitive("differentiated_once")  # the identity, whose derivative is refused


def _refuse(*_: Any, **__: Any) -> Any:
    raise NotImplementedError(
        'implementation="cudnn" can be differentiated once, in reverse (jax.grad, jax.vjp); '
        'expected implementation="chunked" for jax.jvp, jax.linearize and higher derivatives'
    )


def _transpose(
    cotangent: Any, *arguments: Any, transpose: Callable[..., Any], known: int, aval: Any
) -> list[Any]:
    residuals, moved = arguments[:known], arguments[known:]
    if type(cotangent) is ad.Zero:
        return [None] * known + [ad.Zero(x.aval) for x in moved]
    return [None] * known + list(transpose(residuals, cotangent))


def _batch(
    axis: Any, arguments: Any, dims: Any, *, transpose: Callable[..., Any], known: int, aval: Any
) -> tuple[Any, int]:
    arguments = [
        jnp.broadcast_to(x, (axis.size, *x.shape)) if d is None else jnp.moveaxis(x, d, 0)
        for x, d in zip(arguments, dims)
    ]
    mapped = jax.vmap(transpose, axis_size=axis.size)
    aval = aval.update(shape=(axis.size, *aval.shape))
    return _tangent_p.bind(*arguments, transpose=mapped, known=known, aval=aval), 0


_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda *_, aval, **__: aval)
ad.primitive_jvps[_tangent_p] = _refuse
ad.primitive_transposes[_tangent_p] = _transpose
batching.fancy_primitive_batchers[_tangent_p] = _batch
mlir.register_lowering(_tangent_p, _refuse)
_once_p.def_impl(lambda x: x)
_once_p.def_abstract_eval(lambda aval: aval)
ad.primitive_jvps[_once_p] = _refuse
batching.defvectorized(_once_p)
mlir.register_lowering(_once_p, lambda _, x: [x])


def _hand_over(settings: Settings, operands: Operands) -> jax.Array:
    size, mask = operands.sizes, operands.mask
    allowed = mask.dense
    if mask.query_segment_ids is not None and mask.key_value_segment_ids is not None:
        same = mask.query_segment_ids[:, None, :, None] == mask.key_value_segment_ids[:, None, None]
        allowed = same if allowed is None else allowed & same
    window = None
    if mask.left is not None or mask.right not in (None, 0):
        window = (
            size.keys if mask.left is None else mask.left,
            size.queries if mask.right is None else mask.right,
        )
    output = jax.nn.dot_product_attention(
        operands.query,
        operands.key,
        operands.value,
        operands.bias,
        allowed,
        scale=settings.scale,
        is_causal=mask.right == 0,
        query_seq_lengths=mask.query_lengths,
        key_value_seq_lengths=mask.key_value_lengths,
        local_window_size=window,
        implementation=IMPLEMENTATION,
    )
    return jnp.where(_seeing_rows(mask, operands, allowed), output, 0)


def _seeing_rows(mask: Mask, operands: Operands, allowed: jax.Array | None) -> jax.Array:
    """Returns which rows see a key, broadcastable to (B, T, N, dv)."""
    size = operands.sizes
    if allowed is not None:
        return visible(mask, *size[:3]).any(axis=3).transpose(0, 2, 1)[..., None]
    rows = jnp.arange(size.queries, dtype=jnp.int32)[None, :, None]
    limits = Limits(*mask.limits(*size[:3]).T[:, :, None, None])
    first = 0 if mask.left is None else jnp.maximum(0, rows + limits.offset - mask.left)
    return in_interval(mask, limits, rows, first)[..., None]


def refusal(settings: Settings, operands: Operands, device: Device) -> str | None:
    """Returns why the call cannot be handed to `jax.nn`, or None."""
    size, mask = operands.sizes, operands.mask
    if device.platform != "gpu" or device.compute_capability is None:
        return f"needs an NVIDIA GPU, not {device.kind}"
    if device.compute_capability < (8, 0):
        return "needs compute capability 8.0"
    for given, name in (
        (settings.soft_cap is not None, "soft cap"),
        (operands.sinks is not None, "sinks"),
        (operands.diagonals is not None, "bias by rule"),
        (operands.seeds is not None, "dropout"),
        (mask.offset != 0 or mask.offsets is not None, "query offset"),
        (mask.has_start, "first key"),
        (mask.has_prefix, "prefix"),
        (size.head_dim != size.value_dim, "values of another head size than the keys"),
        (mask.right not in (None, 0), "keys after the query in a window"),
        (mask.left is not None and mask.right != 0, "a window that is not causal"),
        (bool(settings.interpret), "interpreter"),
    ):
        if given:
            return f"jax.nn's cuDNN route has no {name}"
    if operands.query.dtype not in (jnp.float16, jnp.bfloat16):
        return f"needs float16 or bfloat16, not {operands.query.dtype}"
    largest = 256 if device.compute_capability >= (9, 0) else 128
    if size.head_dim % 8 or size.head_dim > largest:
        return f"needs a head size of at most {largest} and a multiple of 8, not {size.head_dim}"
    return None
