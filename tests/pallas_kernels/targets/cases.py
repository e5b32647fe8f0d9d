"""Programs to compile for absent chips, as `compile_in_child` expects them."""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

PARAMETERS = 1024 * 4096 + 4096
ROW = 1024 * 4  # bytes of a row of `matrix`
MATRIX = 1024 * ROW


def floats(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


matrix = floats(1024, 1024)


def optimizer_step(transform: optax.GradientTransformation) -> tuple[Any, Any, Any]:
    params = {"w": floats(1024, 4096), "b": floats(4096)}

    def step(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, (params, jax.eval_shape(transform.init, params), params), (0, 1)


adamw = functools.partial(optimizer_step, optax.adamw(1e-3))
lion = functools.partial(optimizer_step, optax.lion(1e-3))
adabelief = functools.partial(optimizer_step, optax.adabelief(1e-3))
sgd = functools.partial(optimizer_step, optax.sgd(1e-3))


def update_rows(donate: tuple[int, ...] = (0,)):
    def fn(x, rows, start):
        return lax.dynamic_update_slice(x, 2 * rows, (start, 0))

    return fn, (matrix, floats(8, 1024), ints()), donate


update_rows_of_a_copy = functools.partial(update_rows, ())


def take_rows():
    return lambda x, start: 2 * lax.dynamic_slice(x, (start, 0), (8, 1024)), (matrix, ints()), ()


def gather_rows():
    return lambda x, rows: 2 * x[rows], (matrix, ints(16)), ()


def scatter_add_rows():
    return lambda x, i, rows: x.at[i].add(rows), (matrix, ints(16), floats(16, 1024)), (0,)


def scan():
    def body(carry, x):
        return 2 * jnp.sin(carry) + x, carry[:4] + 1

    return lambda carry, xs: lax.scan(body, carry, xs), (matrix, floats(10, 1024, 1024)), ()


def nested_loops():
    def body(carry, _):
        return lax.fori_loop(3, 8, lambda i, c: jnp.sin(c) * i, carry), None

    return lambda x: lax.scan(body, x, length=6)[0], (floats(4096, 4096),), ()


def until_large():
    return lambda x: lax.while_loop(lambda c: c.sum() < 1e9, lambda c: 2 * c + 1, x), (matrix,), ()


def packed_int4():
    return lambda x: 2 * x.astype(jnp.float32), (jax.ShapeDtypeStruct((1024, 1024), jnp.int4),), ()


def triton_kernel():
    def kernel(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    def double(x):
        block = pl.BlockSpec((32, 128), lambda i: (i, 0))
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
            grid=(4,),
            in_specs=[block],
            out_specs=block,
            compiler_params=plgpu.CompilerParams(num_warps=4),
        )(x)

    return double, (floats(128, 128),), ()


def refused():
    return lambda x: x @ x, (floats(3, 4),), ()


def not_a_case():
    return 3


def abort():
    os.abort()


def sleep():
    time.sleep(60)


def square():
    def kernel(x_ref, out_ref):
        x = x_ref[...]
        out_ref[...] = jnp.dot(x, x, preferred_element_type=jnp.float32)

    x = jax.ShapeDtypeStruct((256, 256), jnp.bfloat16)
    out = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    return lambda x: pl.pallas_call(kernel, out_shape=out, name="square")(x), (x,), ()
