"""Products of quantised operands, their derivatives, and what they are made of."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P

from pallas_kernels import quantized_dot_general
from tests.pallas_kernels.matmul import oracle

DENSE = (((1,), (0,)), ((), ()))
# Shapes, and what is contracted and batch.
CALLS = {
    "dense": ((5, 11), (11, 3), DENSE),
    "tokens": ((2, 3, 10), (10, 4), (((2,), (0,)), ((), ()))),
    "two axes in another order": ((4, 6, 3), (3, 5, 6), (((1, 2), (2, 0)), ((), ()))),
    "batch": ((3, 2, 9), (9, 2, 4), (((2,), (0,)), ((1,), (1,)))),
    "vectors": ((9,), (9,), (((0,), (0,)), ((), ()))),
    "nothing contracted": ((3,), (4,), (((), ()), ((), ()))),
}
FORMATS = tuple(oracle.FORMATS)


def draw(*shapes: tuple[int, ...], seed: int = 0, dtype: Any = np.float64) -> list[np.ndarray]:
    """Numbers of very different sizes from row to row and column to column."""
    rng = np.random.default_rng(seed)
    found = []
    for shape in shapes:
        x = rng.normal(size=shape)
        for axis in range(len(shape)):
            x *= 2 ** rng.normal(size=(shape[axis], *(1,) * (len(shape) - axis - 1)))
        found.append(x.astype(dtype))
    return found


def both(dot: Any, a: Any, b: Any, g: Any, dimensions: Any, **options: Any) -> list[np.ndarray]:
    """Returns the product and both gradients, with `g` for the gradient of the product."""

    def program(a: Any, b: Any, g: Any) -> Any:
        y, pull = jax.vjp(lambda a, b: dot(a, b, dimensions, **options), a, b)
        return y, *pull(g)

    return [np.asarray(x) for x in jax.jit(program)(a, b, g)]


def plain(a: np.ndarray, b: np.ndarray, g: np.ndarray, dimensions: Any) -> list[np.ndarray]:
    """Returns the gradients of the exact product, by jax."""
    with jax.enable_x64(True):
        _, pull = jax.vjp(functools.partial(lax.dot_general, dimension_numbers=dimensions), a, b)
        return [np.asarray(x) for x in pull(g)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("granularity", oracle.GRANULARITIES)
@pytest.mark.parametrize("format", FORMATS)
def test_is_the_product_of_rounded_operands(format, granularity, call):
    *shapes, dimensions = CALLS[call]
    a, b = draw(*shapes)
    want = oracle.product(a, b, dimensions, (format, format), granularity)
    (g,) = draw(want.shape, seed=1)
    with jax.enable_x64(True):
        found = both(quantized_dot_general(format, granularity), a, b, g, dimensions)
    # Sums of integers are exact, those of floats are in float32.
    size = np.abs(oracle.product(np.abs(a), np.abs(b), dimensions, None))
    limit = 1e-12 if format.startswith("int") else 1e-6
    assert (np.abs(found[0] - want) <= limit * size).all()
    for x, exact in zip(found[1:], plain(a, b, g, dimensions), strict=True):
        np.testing.assert_allclose(x, exact, rtol=1e-12, atol=1e-12)


BACKWARD = {"lhs": (True, False), "rhs": (False, True), "both": (True, True)}


@pytest.mark.parametrize("residuals", ["operands", "quantized"])
@pytest.mark.parametrize("call", ["tokens", "two axes in another order", "batch"])
@pytest.mark.parametrize(
    ("format", "gradient_format", "granularity", "backward"),
    [
        ("int8", None, "row", "both"),
        ("int8", "int4", "tensor", "both"),
        ("int8", None, 4, "both"),
        ("int8", None, "row", "lhs"),
        ("int8", None, 4, "rhs"),
        ("float8_e4m3fn", "float8_e5m2", "row", "both"),
    ],
)
def test_gradients_of_quantised_products(
    format, gradient_format, granularity, backward, call, residuals
):
    *shapes, dimensions = CALLS[call]
    a, b = draw(*shapes)
    (of_a, of_b), (batch_a, batch_b) = dimensions
    (g,) = draw(oracle.product(a, b, dimensions, None).shape, seed=1)
    dot = quantized_dot_general(
        format, granularity, backward=backward, gradient_format=gradient_format, residuals=residuals
    )
    with jax.enable_x64(True):
        found = both(dot, a, b, g, dimensions)
    kept = [a, b]
    if residuals == "quantized":
        kept = [
            oracle.rounded(x, format, granularity, axes)
            for x, axes in zip((a, b), (of_a, of_b), strict=True)
        ]
    want = plain(kept[0], kept[1], g, dimensions)
    free = [
        [axis for axis in range(x.ndim) if axis not in (*own, *batch)]
        for x, own, batch in ((a, of_a, batch_a), (b, of_b, batch_b))
    ]
    count = len(batch_a)
    for side, quantised in enumerate(BACKWARD[backward]):
        if quantised:
            # The contraction is over what the other operand has alone.
            other = 1 - side
            start = count + (len(free[0]) if other else 0)
            summed = tuple(range(start, start + len(free[other])))
            name = gradient_format or format
            of_g = oracle.rounded(g, name, granularity, summed)
            rounded = oracle.rounded(kept[other], format, granularity, free[other])
            pair = (a, rounded) if side == 0 else (rounded, b)
            want[side] = plain(pair[0], pair[1], of_g, dimensions)[side]
    limit = 1e-11 if format == "int8" else 1e-5  # sums of floats are in float32
    for x, exact in zip(found[1:], want, strict=True):
        np.testing.assert_allclose(x, exact, rtol=limit, atol=limit * np.abs(exact).max())


def test_numbers_of_the_specification():
    a, b = np.array([[1, -2, 0.5], [0.1, 0.2, -0.3]]), np.array([[2.0, 0], [1, -1], [0, 4]])
    with jax.enable_x64(True):
        found = quantized_dot_general("int8")(a, b, DENSE)
        one = quantized_dot_general("int8")(np.array([-1, 0.5, 0.25, 1]), np.eye(4), VECTOR)
        one = np.asarray(one)
    want = [[0, 3.9999384852], [0.4023437140, -1.3913910035]]
    np.testing.assert_allclose(found, want, atol=1e-10)
    # The columns of the unit matrix are 1 to 127 of 127.5 parts.
    np.testing.assert_allclose(one * 127.5 / 127, np.array([-127, 64, 32, 127]) / 127.5, rtol=1e-12)


VECTOR = (((0,), (0,)), ((), ()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("format", FORMATS)
def test_error_is_bounded_in_every_dtype(format, dtype):
    a, b = (jnp.asarray(x, dtype) for x in draw((7, 40), (40, 6)))
    exact = [np.asarray(x, np.float64) for x in (a, b)]
    found = jax.jit(lambda a, b: quantized_dot_general(format)(a, b, DENSE))(a, b)
    assert found.dtype == dtype
    # Rounding to the nearest moves an entry by at most half of what rounding at random does, and
    # the edge, where the last bucket ends, is a little further than the largest value.
    half = [oracle.spacing(x, format, "row", (1 - i,)) / 2 for i, x in enumerate(exact)]
    of_a, of_b = np.abs(exact[0]), np.abs(exact[1])
    bound = half[0] @ of_b + of_a @ half[1] + half[0] @ half[1]
    bound += 2 * float(jnp.finfo(dtype).eps) * (of_a @ of_b)
    assert (np.abs(np.asarray(found, np.float64) - exact[0] @ exact[1]) <= bound).all()


def test_the_result_has_the_dtype_that_was_asked_for():
    a, b = (jnp.asarray(x, jnp.bfloat16) for x in draw((2, 8), (8, 3)))
    dot = quantized_dot_general()
    y, pull = jax.vjp(lambda a, b: dot(a, b, DENSE, None, jnp.float32), a, b)
    assert y.dtype == jnp.float32
    assert [x.dtype for x in pull(y)] == [jnp.bfloat16] * 2


@pytest.mark.parametrize(
    ("format", "kinds"),
    [("int8", ("i8", "i32")), ("int4", ("i8", "i32")), ("float8_e4m3fn", ("f8_e4m3fn", "f32"))],
)
@pytest.mark.parametrize("granularity", ["row", 4])
def test_what_is_multiplied_has_few_bits(format, kinds, granularity):
    dot = quantized_dot_general(format, granularity, backward="both")
    a, b = (jnp.asarray(x, jnp.float32) for x in draw((5, 12), (12, 8)))

    def program(a: jax.Array, b: jax.Array) -> Any:
        return jax.grad(lambda a, b: dot(a, b, DENSE).sum(), (0, 1))(a, b), dot(a, b, DENSE)

    names = {"int8": "i8", "int32": "i32", "float8_e4m3fn": "f8_e4m3fn", "float32": "f32"}
    products = [x for x in equations(jax.make_jaxpr(program)(a, b).jaxpr) if "dot_general" in x[0]]
    assert products
    for _, inputs, output in products:
        assert {names[str(x)] for x in inputs} == {kinds[0]}
        assert names[str(output)] == kinds[1]


def equations(jaxpr: Any) -> list[tuple[str, list[Any], Any]]:
    """Returns name, dtypes of the operands and dtype of the result of all operations."""
    found = []
    for equation in jaxpr.eqns:
        for inner in jaxprs_in_params(equation.params):
            found += equations(inner)
        if equation.outvars and hasattr(equation.outvars[0].aval, "dtype"):
            inputs = [x.aval.dtype for x in equation.invars if hasattr(x.aval, "dtype")]
            found.append((equation.primitive.name, inputs, equation.outvars[0].aval.dtype))
    return found


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("granularity", oracle.GRANULARITIES)
def test_zeros_and_small_numbers_are_no_special_case(format, granularity):
    a, b = draw((4, 8), (8, 4), dtype=np.float32)
    a[1], b[:, 2] = 0, 0
    dot = jax.jit(lambda a, b: quantized_dot_general(format, granularity)(a, b, DENSE))
    found = np.asarray(dot(a, b))
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found[1], 0)
    np.testing.assert_array_equal(found[:, 2], 0)
    # Powers of two change nothing but the exponent.
    np.testing.assert_array_equal(dot(a * 2.0**-90, b * 2.0**90), found)
    np.testing.assert_array_equal(np.asarray(dot(a[:, :0], b[:0])), np.zeros((4, 4)))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(format, value):
    a, b = draw((4, 8), (8, 5), dtype=np.float32)
    for granularity in oracle.GRANULARITIES:
        dot = jax.jit(lambda a, b: quantized_dot_general(format, granularity)(a, b, DENSE))  # noqa: B023
        clean = np.asarray(dot(a, b))
        bad = a.copy()
        bad[2, 3] = value
        found = np.asarray(dot(bad, b))
        assert np.isnan(found[2]).all()
        if granularity == "tensor":
            assert np.isnan(found).all()
        else:
            rest = [0, 1, 3]
            np.testing.assert_array_equal(found[rest], clean[rest])


@pytest.mark.parametrize(("format", "of_gradient"), [("int8", "int4"), ("float8_e4m3fn",) * 2])
def test_gradients_that_are_rounded_at_random_are_right_in_the_mean(format, of_gradient):
    a, b = draw((6, 8), (8, 4), dtype=np.float32)
    (g,) = draw((6, 4), seed=1, dtype=np.float32)
    options = {"backward": "both", "gradient_format": of_gradient}
    dot = quantized_dot_general(format, stochastic_rounding=True, **options)

    def gradients(key: jax.Array) -> Any:
        return jax.vjp(lambda a, b: dot(a, b, DENSE, key=key), a, b)[1](g)

    keys = jax.random.split(jax.random.key(0), 4000)
    many = [np.asarray(x, np.float64) for x in jax.jit(jax.vmap(gradients))(keys)]
    a, b, g = (x.astype(np.float64) for x in (a, b, g))
    want = (
        g @ oracle.rounded(b, format, "row", (1,)).T,
        oracle.rounded(a, format, "row", (0,)).T @ g,
    )
    for x, mean in zip(many, want, strict=True):
        assert len(np.unique(x[:, 0, 0])) > 1
        error = x.std(0) / np.sqrt(len(x))
        assert (np.abs(x.mean(0) - mean) <= 5 * error + 1e-5 * np.abs(mean)).all()
    # One draw is off by no more than a spacing of each entry of g.
    limit = oracle.spacing(g, of_gradient, "row", (1,)) @ np.abs(
        oracle.rounded(b, format, "row", (1,)).T
    )
    assert (np.abs(many[0] - want[0]) <= limit * (1 + 1e-4) + 1e-6).all()


def test_the_two_gradients_are_rounded_by_their_own_numbers():
    g = jnp.full((8, 8), 0.3).at[0].set(1.0).at[:, 0].set(1.0)
    dot = quantized_dot_general(backward="both", stochastic_rounding=True)
    eye, key = jnp.eye(8), jax.random.key(1)
    of_lhs, of_rhs = jax.vjp(lambda a, b: dot(a, b, DENSE, key=key), eye, eye)[1](g)
    again = jax.vjp(lambda a, b: dot(a, b, DENSE, key=key), eye, eye)[1](g)
    np.testing.assert_array_equal(of_lhs, again[0])
    assert (np.asarray(of_lhs) != np.asarray(of_rhs)).any()


def test_a_key_is_for_gradients_alone():
    dot = quantized_dot_general(backward="rhs", stochastic_rounding=True)
    x = jnp.eye(3)
    np.testing.assert_array_equal(dot(x, x, DENSE), quantized_dot_general()(x, x, DENSE))
    with pytest.raises(ValueError, match=r"key=None; expected a key .*stochastic_rounding=True"):
        jax.grad(lambda x: dot(x, x, DENSE).sum())(x)
    with pytest.raises(ValueError, match=r"key was given; expected None"):
        quantized_dot_general()(x, x, DENSE, key=jax.random.key(0))


@pytest.mark.parametrize(("residuals", "most"), [("operands", 1.0), ("quantized", 0.3)])
@pytest.mark.parametrize("granularity", ["row", 16])
def test_quantised_residuals_are_small(residuals, most, granularity):
    a, b = draw((64, 64), (64, 64), dtype=np.float32)
    dot = quantized_dot_general("int8", granularity, residuals=residuals)
    _, pull = jax.vjp(lambda a, b: dot(a, b, DENSE), a, b)
    kept = sum(x.nbytes for x in jax.tree.leaves(pull))
    if granularity == 16:
        most = max(most, 0.4)  # a float32 for 16 entries
    assert 0.25 * (a.nbytes + b.nbytes) < kept <= most * (a.nbytes + b.nbytes)


def test_equal_settings_are_one_function():
    # nnx compares the functions of a layer to tell whether it must trace again.
    assert quantized_dot_general("int8", "row") is quantized_dot_general()
    assert quantized_dot_general("int8", 32) is not quantized_dot_general("int8", 64)
    dot = quantized_dot_general(backward="both", gradient_format="int8")
    assert dot is quantized_dot_general(backward="both")


def test_layers_of_flax():
    x, _ = draw((4, 6), (6, 5), dtype=np.float32)
    x, dot, rngs = jnp.asarray(x), quantized_dot_general(), nnx.Rngs(0)

    def check(found: Any, kernel: Any) -> None:
        inputs, weight = (np.asarray(t, np.float64) for t in (x, kernel))
        want = oracle.product(inputs, weight, DENSE, ("int8", "int8"))
        np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-6)

    for layer in (
        nnx.Linear(6, 5, dot_general=dot, rngs=rngs),
        nnx.LinearGeneral(6, 5, dot_general=dot, rngs=rngs),
    ):
        check(nnx.jit(lambda layer, x: layer(x))(layer, x), layer.kernel[...])
    for layer in (nn.Dense(5, dot_general=dot), nn.DenseGeneral(5, dot_general=dot)):
        params = layer.init(jax.random.key(0), x)
        check(jax.jit(layer.apply)(params, x), params["params"]["kernel"])
    kernel = jnp.asarray(draw((6, 5), dtype=np.float32)[0])
    check(jnp.einsum("bi,io->bo", x, kernel, _dot_general=dot), kernel)


def test_keys_come_from_streams_of_flax():
    dot = quantized_dot_general(backward="rhs", stochastic_rounding=True)
    x = jnp.asarray(draw((16, 6), dtype=np.float32)[0])

    class Rounded(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.rngs = rngs.fork()

        def __call__(self, *args: Any, **options: Any) -> jax.Array:
            return dot(*args, key=self.rngs.rounding(), **options)

    layer = nnx.Linear(6, 5, rngs=nnx.Rngs(0), dot_general=Rounded(nnx.Rngs(rounding=1)))
    slope = nnx.jit(nnx.grad(lambda layer, x: jnp.sin(layer(x)).sum()))
    first, second = (np.asarray(slope(layer, x).kernel[...]) for _ in range(2))
    assert (first != second).any()
    np.testing.assert_allclose(first, second, atol=0.05 * np.abs(first).max())  # int8

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            keyed = functools.partial(dot, key=self.make_rng("rounding"))
            return nn.Dense(5, dot_general=keyed)(x)

    def loss(params: Any, key: jax.Array) -> jax.Array:
        return jnp.sin(Net().apply(params, x, rngs={"rounding": key})).sum()  # type: ignore[arg-type]

    params = Net().init({"params": jax.random.key(0), "rounding": jax.random.key(1)}, x)
    grads = [jax.jit(jax.grad(loss))(params, jax.random.key(i)) for i in range(2)]
    kernels = [np.asarray(g["params"]["Dense_0"]["kernel"]) for g in grads]
    assert (kernels[0] != kernels[1]).any()


@pytest.mark.parametrize("granularity", oracle.GRANULARITIES)
def test_a_stack_is_its_entries(granularity):
    a, b = draw((3, 4, 8), (3, 8, 5), dtype=np.float32)
    (g,) = draw((4, 5), seed=1, dtype=np.float32)
    dot = quantized_dot_general("int8", granularity, backward="both", residuals="quantized")
    one = jax.jit(lambda a, b: (dot(a, b, DENSE), jax.vjp(lambda *x: dot(*x, DENSE), a, b)[1](g)))
    found = jax.jit(jax.vmap(one))(a, b)
    for i in range(3):
        for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(one(a[i], b[i])), strict=True):
            np.testing.assert_allclose(x[i], y, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backward", ["none", "both"])
@pytest.mark.parametrize("granularity", ["row", 4])
def test_second_derivatives_are_those_of_the_plain_product(backward, granularity):
    a, b = draw((4, 8), (8, 5))
    dot = quantized_dot_general("int8", granularity, backward=backward)

    def loss(dot: Any, a: Any) -> Any:
        return (dot(a, b, DENSE) ** 2).sum()

    def curvature(dot: Any) -> Any:
        slope = jax.grad(functools.partial(loss, dot))
        return jax.jit(jax.grad(lambda a: jnp.vdot(slope(a), jnp.cos(a))))(a)

    with jax.enable_x64(True):
        found, want = curvature(dot), curvature(lax.dot_general)
        assert np.linalg.norm(found - want) < 0.03 * np.linalg.norm(want)  # int8, three products


def test_any_number_of_tokens_is_exported():
    a, b = (jnp.asarray(x) for x in draw((6, 8), (8, 5), dtype=np.float32))
    dot = quantized_dot_general(backward="both")

    def program(a: jax.Array, b: jax.Array) -> Any:
        return jax.grad(lambda a, b: jnp.sin(dot(a, b, DENSE)).sum(), (0, 1))(a, b)

    (tokens,) = jax.export.symbolic_shape("tokens")
    any_number = jax.ShapeDtypeStruct((tokens, 8), a.dtype)
    exported = jax.export.export(jax.jit(program))(any_number, b)
    for x, want in zip(exported.call(a, b), jax.jit(program)(a, b), strict=True):
        np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-5)


def test_forward_mode_is_refused():
    x = jnp.eye(2)
    with pytest.raises(TypeError, match=r"forward-mode.*custom_vjp"):
        jax.jvp(lambda x: quantized_dot_general()(x, x, DENSE), (x,), (x,))


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("granularity", ["row", 4])
def test_rows_over_devices(checked, granularity):
    a, b = draw((8, 8), (8, 4), dtype=np.float32)
    dot = quantized_dot_general("int8", granularity, backward="lhs")

    def program(a: jax.Array, b: jax.Array) -> Any:
        y, pull = jax.vjp(lambda a, b: dot(a, b, DENSE), a, b)
        of_a, of_b = pull(jnp.sin(y))
        # Where JAX checks what varies it sums the gradients of an equal kernel by itself.
        return y, of_a, of_b if checked else lax.psum(of_b, "batch")

    mesh = jax.make_mesh((4,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = P("batch")
    mapped = jax.shard_map(
        program, mesh=mesh, in_specs=(rows, P()), out_specs=(rows, rows, P()), check_vma=checked
    )
    y, pull = jax.vjp(lambda a, b: dot(a, b, DENSE), jnp.asarray(a), jnp.asarray(b))
    for x, want in zip(jax.jit(mapped)(a, b), (y, *pull(jnp.sin(y))), strict=True):
        np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-5)
