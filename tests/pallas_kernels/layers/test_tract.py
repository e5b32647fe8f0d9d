"""TrAct against the passes of its authors' code, its formula, and the layers that take it."""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

from pallas_kernels import tract_conv, tract_dot_general

ROOT = pathlib.Path(
    os.environ.get("JAXOPT_LAB_GOLDEN", pathlib.Path(__file__).parents[2] / "golden")
)
DENSE = (((1,), (0,)), ((), ()))
NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(autouse=True)
def strict() -> Any:
    """No array gets axes or a wider dtype silently."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def formula(a: np.ndarray, z: np.ndarray, damping: float) -> np.ndarray:
    """The definition, whichever of rows and columns are more."""
    return np.linalg.solve(a.T @ a / len(a) + damping * np.eye(a.shape[1]), a.T @ z)


def draw(*shapes: tuple[int, ...], dtype: type = np.float64) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize(
    "case", ["tract_linear_tall", "tract_linear_wide", "tract_conv", "tract_conv_wide"]
)
def test_passes_of_the_authors(case):
    with np.load(ROOT / "optimizers" / f"{case}.npz") as file:
        want = {key.removeprefix("aux/"): file[key] for key in file.files}
    settings = {"tract_conv": (1, 1), "tract_conv_wide": (2, 0)}
    with jax.enable_x64(True):
        if "conv" in case:
            stride, padding = settings[case]
            layer = functools.partial(
                tract_conv(0.1),
                window_strides=(stride, stride),
                padding=[(padding, padding)] * 2,
                dimension_numbers=NHWC,
            )
            last, kernel = (0, 2, 3, 1), (2, 3, 1, 0)
        else:
            layer = functools.partial(tract_dot_general(0.1), dimension_numbers=DENSE)
            last, kernel = (0, 1), (1, 0)
        x, z = want["x"].transpose(last), want["grad_output"].transpose(last)
        output, pull = jax.vjp(layer, jnp.asarray(x), jnp.asarray(want["weight"].transpose(kernel)))
        of_x, of_weight = pull(jnp.asarray(z))
        output = np.asarray(output)
    # Both are float64; the reference inverts where we factor.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12)
    close(output + want["bias"], want["output"].transpose(last))
    close(of_x, want["grad_x"].transpose(last))
    close(of_weight, want["grad_weight"].transpose(kernel))


@pytest.mark.parametrize("rows", [1, 5, 6, 40])
def test_rows_and_columns_in_any_number(rows):
    x, w, z = draw((rows, 6), (6, 3), (rows, 3))
    with jax.enable_x64(True):
        pull = jax.vjp(functools.partial(tract_dot_general(0.3), dimension_numbers=DENSE), x, w)[1]
        np.testing.assert_allclose(pull(z)[1], formula(x, z, 0.3), rtol=1e-9)


def test_no_rows_and_zero_inputs_move_nothing():
    layer = functools.partial(tract_dot_general(), dimension_numbers=DENSE)
    for x in (jnp.zeros((0, 4)), jnp.zeros((3, 4))):
        of_weight = jax.vjp(layer, x, jnp.ones((4, 2)))[1](jnp.ones((len(x), 2)))[1]
        np.testing.assert_array_equal(of_weight, np.zeros((4, 2)))


def test_large_damping_is_the_plain_gradient():
    x, w, z = draw((9, 4), (4, 2), (9, 2))
    with jax.enable_x64(True):
        layer = functools.partial(tract_dot_general(1e9), dimension_numbers=DENSE)
        np.testing.assert_allclose(1e9 * jax.vjp(layer, x, w)[1](z)[1], x.T @ z, rtol=1e-7)


def test_axes_of_a_product_in_any_order():
    # Rows are axes 1 and 3 of x; the kernel has its outputs in the middle.
    x, w, z = draw((3, 2, 4, 5), (4, 6, 3), (2, 5, 6))
    dimensions = (((2, 0), (0, 2)), ((), ()))
    with jax.enable_x64(True):
        layer = functools.partial(tract_dot_general(0.2), dimension_numbers=dimensions)
        output, pull = jax.vjp(layer, x, w)
        np.testing.assert_array_equal(output, lax.dot_general(x, w, dimensions))
        a = x.transpose(1, 3, 2, 0).reshape(10, 12)
        want = formula(a, z.reshape(10, 6), 0.2).reshape(4, 3, 6).transpose(0, 2, 1)
        np.testing.assert_allclose(pull(jnp.asarray(z))[1], want, rtol=1e-9)


def windows(x: np.ndarray, w: np.ndarray, options: dict[str, Any], axes: Any) -> np.ndarray:
    """The rows a (b, n), read off the convolution itself, which is linear in its kernel."""
    jacobian = jax.jacfwd(lambda w: lax.conv_general_dilated(x, w, **options))(jnp.asarray(w))
    batch, features, *space = axes.out_spec
    kernel = [4 + axis for axis in axes.rhs_spec]
    jacobian = np.asarray(jacobian).transpose(batch, *space, features, *kernel)
    return jacobian[:, :, :, 0, 0].reshape(-1, w.size // w.shape[axes.rhs_spec[0]])


@pytest.mark.parametrize(
    "options",
    [
        {"window_strides": (2, 1), "padding": "SAME"},
        {"window_strides": (1, 2), "padding": [(1, 0), (0, 2)], "rhs_dilation": (1, 2)},
        {"window_strides": (1, 1), "padding": [(0, 0), (1, 0)], "lhs_dilation": (2, 1)},
    ],
    ids=["strides", "dilated windows", "dilated inputs"],
)
@pytest.mark.parametrize("layout", [NHWC, ("NCHW", "OIHW", "NHWC"), None], ids=str)
def test_windows_are_those_of_the_convolution(options, layout):
    axes = lax.conv_dimension_numbers((1,) * 4, (1,) * 4, layout)
    options = {**options, "dimension_numbers": layout}
    shapes = [(2, 3, 6, 5), (4, 3, 2, 3)]  # batch or out, features, space
    x, w = (
        array.transpose(np.argsort(spec))
        for array, spec in zip(draw(*shapes), (axes.lhs_spec, axes.rhs_spec), strict=True)
    )
    batch, features, *space = axes.out_spec
    with jax.enable_x64(True):
        output, pull = jax.vjp(functools.partial(tract_conv(0.2), **options), x, w)
        np.testing.assert_array_equal(output, lax.conv_general_dilated(x, w, **options))
        (z,) = draw(output.shape)
        got = np.asarray(pull(jnp.asarray(z))[1]).transpose(axes.rhs_spec)
        a = windows(x, w, options, axes)
    want = formula(a, z.transpose(batch, *space, features).reshape(len(a), 4), 0.2)
    np.testing.assert_allclose(got, want.T.reshape(4, 3, 2, 3), rtol=1e-9, atol=1e-12)


def test_layers_of_flax():
    x = jnp.asarray(draw((4, 6, 6, 3), dtype=np.float32)[0])
    z = jnp.asarray(draw((4, 6, 6, 5), dtype=np.float32)[0])

    def by_nnx(layer: nnx.Module) -> jax.Array:
        return nnx.grad(lambda layer: jnp.vdot(layer(x), z))(layer).kernel[...]

    def by_linen(layer: nn.Module) -> jax.Array:
        params = layer.init(jax.random.key(0), x)
        gradient = jax.grad(lambda params: jnp.vdot(layer.apply(params, x), z))(params)
        return gradient["params"]["kernel"]

    dense, conv, rngs = tract_dot_general(), tract_conv(), nnx.Rngs(0)
    a, rows = np.asarray(x).reshape(-1, 3), np.asarray(z).reshape(-1, 5)
    want = formula(a.astype(np.float64), rows, 0.1)
    found = [
        by_nnx(nnx.Linear(3, 5, dot_general=dense, rngs=rngs)),
        by_nnx(nnx.LinearGeneral(3, 5, dot_general=dense, rngs=rngs)),
        by_linen(nn.Dense(5, dot_general=dense)),
        by_linen(nn.DenseGeneral(5, dot_general=dense)),
        # A window of one pixel is a dense layer.
        by_nnx(nnx.Conv(3, 5, (1, 1), conv_general_dilated=conv, rngs=rngs))[0, 0],
        by_linen(nn.Conv(5, (1, 1), conv_general_dilated=conv))[0, 0],
    ]
    for gradient in found:
        np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-5)  # float32


def test_equal_settings_are_one_function():
    # nnx compares the functions of a layer to tell whether it must trace again.
    assert tract_conv(1) is tract_conv(1.0)
    assert tract_dot_general(0.1, axis_name=("a", "b")) is tract_dot_general(axis_name=("a", "b"))
    assert tract_dot_general(0.2) is not tract_dot_general(0.1)


def test_sixteen_bits_are_solved_in_float32():
    x, w, z = (jnp.asarray(a, jnp.bfloat16) for a in draw((64, 6), (6, 3), (64, 3)))
    layer = functools.partial(
        tract_dot_general(), dimension_numbers=DENSE, preferred_element_type=jnp.float32
    )
    output, pull = jax.vjp(layer, x, w)
    assert output.dtype == jnp.float32
    found = pull(z.astype(jnp.float32))[1]
    assert found.dtype == jnp.bfloat16
    want = formula(np.asarray(x, np.float64), np.asarray(z, np.float64), 0.1)
    # Rounded once, to 8 bits.
    np.testing.assert_allclose(np.asarray(found, np.float64), want, rtol=2**-8)


def of_shards(axis_name: Any, how: str) -> jax.Array:
    """The kernel's gradient of a mean loss over 12 rows that lie on four devices."""
    x, w, z = (jnp.asarray(a) for a in draw((12, 4), (4, 2), (12, 2)))
    layer = functools.partial(tract_dot_general(axis_name=axis_name), dimension_numbers=DENSE)

    def gradient(w: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
        return jax.grad(lambda w: jnp.sum(layer(x, w) * z) / len(x))(w)

    if how == "vmap":
        parts = (a.reshape(4, 3, -1) for a in (x, z))
        mapped = jax.vmap(gradient, (None, 0, 0), axis_name="batch")
        return jax.jit(mapped)(w, *parts).mean(0)

    def averaged(w: jax.Array, x: jax.Array, z: jax.Array) -> jax.Array:
        found = gradient(w, x, z)
        # Where JAX checks what varies it sums the gradients of an equal kernel by itself.
        return found / 4 if how == "checked" else lax.pmean(found, "batch")

    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P(), P("batch"), P("batch"))
    mapped = jax.shard_map(
        averaged, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=how == "checked"
    )
    return jax.jit(mapped)(w, x, z)


@pytest.mark.parametrize("how", ["vmap", "checked", "unchecked"])
def test_a_batch_over_devices(how):
    with jax.enable_x64(True):
        x, _, z = draw((12, 4), (4, 2), (12, 2))
        whole = formula(x, z / 12, 0.1)
        np.testing.assert_allclose(of_shards("batch", how), whole, rtol=1e-9)
        parts = [formula(x[i : i + 3], z[i : i + 3] / 3, 0.1) for i in range(0, 12, 3)]
        np.testing.assert_allclose(of_shards(None, how), np.mean(parts, 0), rtol=1e-9)


def test_a_stack_of_kernels():
    x, w, z = draw((9, 4), (3, 4, 2), (3, 9, 2))
    layer = functools.partial(tract_dot_general(), dimension_numbers=DENSE)
    with jax.enable_x64(True):
        grads = jax.vmap(lambda w, z: jax.vjp(layer, jnp.asarray(x), w)[1](z)[1])(w, z)
    for found, one in zip(grads, z, strict=True):
        np.testing.assert_allclose(found, formula(x, one, 0.1), rtol=1e-9)


def test_forward_mode_is_refused():
    w = jnp.ones((2, 2))
    layer = functools.partial(tract_dot_general(), dimension_numbers=DENSE)
    with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
        jax.jvp(lambda w: layer(w, w), (w,), (w,))
