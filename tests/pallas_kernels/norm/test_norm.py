"""`rms_norm`, `layer_norm` and `add_rms_norm` against float64, numbers and derivatives."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_kernels import add_rms_norm, layer_norm, rms_norm

SHAPES = [(3, 5, 8), (128,)]
KINDS = ["rms", "rms from 1", "layer", "add"]


@pytest.fixture(autouse=True)
def strict() -> Any:
    """No array gets axes or a wider dtype silently."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def draw(*shapes: tuple[int, ...], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def call(kind: str, x: Any, r: Any, w: Any, b: Any) -> Any:
    if kind == "layer":
        return layer_norm(x, w, b, epsilon=1e-3)
    if kind == "add":
        return add_rms_norm(x, r, w, epsilon=1e-3)
    return rms_norm(x, w, epsilon=1e-3, scale_offset=1.0 if kind == "rms from 1" else 0.0)


def definition(kind: str, x: Any, r: Any, w: Any, b: Any) -> Any:
    """In numpy."""
    total = x + r if kind == "add" else x
    centred = total - total.mean(-1, keepdims=True) if kind == "layer" else total
    normal = centred / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-3)
    if kind == "layer":
        return normal * w + b
    y = normal * (w + (kind == "rms from 1"))
    return (y, total) if kind == "add" else y


def gradients(kind: str, x: Any, r: Any, w: Any, b: Any, dy: Any, ds: Any) -> Any:
    """The formulas of the specification, in numpy: of x, r, w and b."""
    total = x + r if kind == "add" else x
    centred = total - total.mean(-1, keepdims=True) if kind == "layer" else total
    inverse = 1 / np.sqrt(np.mean(centred**2, -1, keepdims=True) + 1e-3)
    normal, m = centred * inverse, dy * (w + (kind == "rms from 1"))
    dx = m - normal * np.mean(m * normal, -1, keepdims=True)
    if kind == "layer":
        dx -= m.mean(-1, keepdims=True)
    dx = inverse * dx + (ds if kind == "add" else 0)
    over = tuple(range(x.ndim - 1))
    dw = np.sum(dy * normal, over)
    db = np.sum(dy, over) if kind == "layer" else np.zeros_like(b)
    return dx, dx if kind == "add" else np.zeros_like(r), dw, db


@functools.partial(jax.jit, static_argnums=0)
def both_passes(kind: str, arguments: Any, dy: Any, ds: Any) -> Any:
    found, pull = jax.vjp(functools.partial(call, kind), *arguments)
    return found, pull((dy, ds) if kind == "add" else dy)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind, shape):
    x, r, dy, ds = draw(shape, shape, shape, shape)
    w, b = draw(shape[-1:], shape[-1:], seed=1)
    with jax.enable_x64(True):
        found = both_passes(kind, (x, r, w, b), dy, ds)
    want = definition(kind, x, r, w, b), gradients(kind, x, r, w, b, dy, ds)
    # float64 on both sides; sums in another order.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), found, want)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_dtypes(kind, dtype, shape):
    arguments = [jnp.asarray(a, dtype) for a in draw(shape, shape, shape[-1:], shape[-1:])]
    dy = jnp.asarray(draw(shape, seed=2)[0], dtype)
    found, (dx, _, dw, _) = both_passes(kind, arguments, dy, dy)
    assert (found.dtype, dx.dtype, dw.dtype) == (dtype,) * 3
    x, r, w, b, dy = (np.asarray(a, np.float64) for a in (*arguments, dy))
    want = definition(kind, x, r, w, b)
    want_dx, _, want_dw, _ = gradients(kind, x, r, w, b, dy, dy)
    # Rounded once: half a unit in the last place, of float32 some for the sums.
    unit = float(jnp.finfo(dtype).eps) * (8 if dtype == jnp.float32 else 0.51)
    for got, right, size in ((found, want, 1), (dx, want_dx, 1), (dw, want_dw, 8)):
        error = np.abs(np.asarray(got, np.float64) - right)
        assert (error <= unit * np.maximum(np.abs(right), size)).all()


def test_numbers_by_hand():
    with jax.enable_x64(True):
        x, r, w = (jnp.array(a, jnp.float64) for a in ([1, 2, 3], [2, 0, -1], [1, 2, 0.5]))
        call = functools.partial(add_rms_norm, epsilon=0)
        (y, s), pull = jax.vjp(call, x, r, w)
        dx, dr, dw = pull((jnp.array([1.0, -1, 2]), jnp.array([0.1, 0.2, 0.3])))
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)
    close(s, [3, 2, 2])
    close(y, [1.2602520756, 1.6803361008, 0.4200840252])
    close(dx, [0.4459515502, -0.6895897004, 0.6706623752])
    close(dr, dx)
    close(dw, [1.2602520756, -0.8401680504, 1.6803361008])


def test_llama_rounds_before_the_scale():
    x, w = (jnp.asarray(a, jnp.bfloat16) for a in draw((64, 128), (128,)))
    normal = rms_norm(x).astype(jnp.float32) * w.astype(jnp.float32)[None]
    llama = rms_norm(x, w, casting="llama")
    np.testing.assert_array_equal(llama, normal.astype(jnp.bfloat16))
    assert (llama != rms_norm(x, w)).any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_forward_mode_is_the_transpose_of_the_backward_pass(kind, shape):
    x, r, dy, dx = draw(shape, shape, shape, shape)
    w, b, dw, db = draw(*[shape[-1:]] * 4, seed=1)
    with jax.enable_x64(True):
        fn = functools.partial(call, kind)
        moved = jax.jit(lambda a, t: jax.jvp(fn, a, t)[1])((x, r, w, b), (dx, 0 * r, dw, db))
        _, pulled = both_passes(kind, (x, r, w, b), dy, dy)
    right = sum(np.vdot(a, t) for a, t in zip(pulled, (dx, 0 * r, dw, db), strict=True))
    np.testing.assert_allclose(np.vdot(moved, dy), right, rtol=1e-10)


def test_second_derivatives():
    x, dx = draw((2, 8), (2, 8))
    with jax.enable_x64(True):
        energy = lambda x: jnp.sum(jnp.sin(rms_norm(x, epsilon=1e-3)))  # noqa: E731
        twice = jax.jit(lambda x, dx: jax.jvp(jax.grad(energy), (x,), (dx,))[1])(x, dx)
        step = 1e-5
        near = jax.jit(jax.grad(energy))
        want = (near(x + step * dx) - near(x - step * dx)) / (2 * step)
    np.testing.assert_allclose(twice, want, rtol=1e-6, atol=1e-9)  # of the difference


@pytest.mark.parametrize(("kind", "numbers"), [("rms", 1), ("layer", 2), ("add", 1)])
def test_what_is_kept_for_the_backward_pass(kind, numbers):
    x = jax.ShapeDtypeStruct((4, 32, 8), jnp.bfloat16)
    w = jax.ShapeDtypeStruct((8,), jnp.bfloat16)
    fn = functools.partial(call, kind)
    _, pull = jax.eval_shape(lambda *a: jax.vjp(fn, *a), x, x, w, w)
    large = [leaf for leaf in jax.tree.leaves(pull) if leaf.size > w.size]
    assert sorted(leaf.size for leaf in large) == [128] * numbers + [x.size]
    assert next(leaf.dtype for leaf in large if leaf.size == x.size) == jnp.bfloat16


def passes(x: jax.Array, w: jax.Array, dy: jax.Array) -> Any:
    found, pull = jax.vjp(rms_norm, x, w)
    return found, *pull(dy)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_a_batch_over_devices(kind):
    x, dy = (jnp.asarray(a, jnp.float32) for a in draw((8, 16, 8), (8, 16, 8)))
    w = jnp.asarray(draw((8,))[0], jnp.float32)
    mesh = jax.make_mesh((4,), ("batch",), axis_types=(kind,))
    batch, whole = NamedSharding(mesh, P("batch")), NamedSharding(mesh, P())
    placed = [jax.device_put(a, s) for a, s in ((x, batch), (w, whole), (dy, batch))]
    specs = (P("batch"), P(), P("batch")), (P("batch"), P("batch"), P())
    mapped = jax.shard_map(passes, mesh=mesh, in_specs=specs[0], out_specs=specs[1])
    want = jax.jit(passes)(x, w, dy)
    with jax.set_mesh(mesh):
        for found in (jax.jit(passes)(*placed), jax.jit(mapped)(*placed)):
            for got, right in zip(found, want, strict=True):
                # float32; sums over 128 rows in another order
                np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5)


def test_vmap():
    x, w = (jnp.asarray(a, jnp.float32) for a in draw((3, 64, 8), (3, 8)))
    found = jax.jit(jax.vmap(rms_norm))(x, w)
    for got, one, scale in zip(found, x, w, strict=True):
        np.testing.assert_allclose(got, rms_norm(one, scale), rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (4,)])
def test_shapes_at_the_edge(shape):
    found, pull = jax.vjp(rms_norm, jnp.ones(shape), jnp.ones(shape[-1:]))
    assert found.shape == shape
    dx, dw = pull(found)
    assert (dx.shape, dw.shape) == (shape, shape[-1:])
    assert np.isfinite(dx).all()


@pytest.mark.parametrize("norm", [rms_norm, layer_norm])
def test_rows_of_zeros_and_of_large_numbers(norm):
    x = jnp.stack([jnp.zeros(8), jnp.full(8, 1e18), jnp.arange(8.0) + 1e4])
    found, pull = jax.vjp(norm, x)
    assert np.isfinite(found).all()
    assert np.isfinite(pull(jnp.ones_like(x))[0]).all()
    want = definition(
        "layer" if norm is layer_norm else "rms", np.asarray(x[2], np.float64), 0, 1, 0
    )
    # Around 1e4 float32 has steps of 1e-3, and the centred row is exact.
    np.testing.assert_allclose(found[2], want, rtol=1e-3)
