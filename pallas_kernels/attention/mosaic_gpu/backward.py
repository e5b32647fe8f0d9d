"""The backward pass on Hopper: kernels for dK and dV, for dQ and, if asked for, for the bias."""

from __future__ import annotations

import jax

from pallas_kernels.attention.mosaic_gpu import _common, backward_bias
from pallas_kernels.attention.mosaic_gpu.backward_dkv import key_value_gradients
from pallas_kernels.attention.mosaic_gpu.backward_dq import query_gradient
from pallas_kernels.attention.problem import Gradients, Operands, Settings


def backward(
    settings: Settings,
    operands: Operands,
    lse: jax.Array,
    cotangent: jax.Array,
    delta: jax.Array,
    bias_gradient: bool,
) -> Gradients:
    """Returns the gradients of query, key, value and, if asked for, bias, as `Route.backward`."""
    call, inputs = _common.prepare(settings, operands)
    inputs = _common.prepare_backward(call, inputs, lse, cotangent, delta)
    key, value = key_value_gradients(call, inputs)
    query = query_gradient(call, inputs)
    bias = None
    if bias_gradient:
        assert operands.bias is not None
        bias = backward_bias.bias_gradient(call, inputs, operands.bias)
    return Gradients(query, key, value, bias)
