from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention.merge import merge_attention, merge_parts


def parts(count=3, seed=0, shape=(2, 5, 3), width=4, empty=()):
    """Outputs and lse of `count` sets of keys; those of `empty` see none, and hold NaN."""
    rng = np.random.default_rng(seed)
    outputs = rng.normal(size=(count, *shape, width)).astype(np.float32)
    lses = 3 * rng.normal(size=(count, *shape)).astype(np.float32)
    for part in empty:
        outputs[part], lses[part] = np.nan, -np.inf
    return jnp.asarray(outputs), jnp.asarray(lses)


def expected(outputs, lses):
    outputs, lses = np.asarray(outputs, np.float64), np.asarray(lses, np.float64)
    weights = np.exp(lses)
    total = weights.sum(axis=0)
    products = np.where(weights[..., None] > 0, weights[..., None] * outputs, 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(products.sum(axis=0) / total[..., None]), np.log(total)


def test_is_attention_over_both_sets_of_keys():
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 3, 8)), jnp.float32) for n in (5, 20, 20))

    def attend(k, v):
        z = jnp.einsum("btnd,bsnd->btns", q, k)
        lse = jax.nn.logsumexp(z, axis=-1)
        return jnp.einsum("btns,bsnd->btnd", jnp.exp(z - lse[..., None]), v), lse

    got = merge_attention(*attend(k[:, :13], v[:, :13]), *attend(k[:, 13:], v[:, 13:]))
    for g, w in zip(got, attend(k, v)):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)


def test_lse_far_from_zero():
    outputs, lses = parts(2)
    for shift in (-1e4, 1e4):
        output, lse = merge_attention(outputs[0], lses[0] + shift, outputs[1], lses[1] + shift)
        # The shift itself rounds lse to 1e-3.
        want, want_lse = expected(outputs, lses)
        np.testing.assert_allclose(output, want, atol=5e-3)
        np.testing.assert_allclose(lse - shift, want_lse, atol=5e-3)


@pytest.mark.parametrize("empty", [(), (0,), (1,), (0, 1)])
def test_empty_parts_whatever_they_hold(empty):
    outputs, lses = parts(2, empty=empty)
    output, lse = merge_attention(outputs[0], lses[0], outputs[1], lses[1])
    want, want_lse = expected(outputs, lses)
    np.testing.assert_allclose(output, want, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("empty", [(), (0,), (2,), (0, 1), (0, 1, 2)])
def test_is_associative_and_commutative(empty):
    (a, b, c), (x, y, z) = parts(empty=empty)
    left = merge_attention(*merge_attention(a, x, b, y), c, z)
    right = merge_attention(a, x, *merge_attention(b, y, c, z))
    swapped = merge_attention(*merge_attention(c, z, a, x), b, y)
    at_once = merge_parts(*parts(empty=empty))
    for other in (right, swapped, at_once):
        for g, w in zip(other, left):
            np.testing.assert_allclose(g, w, rtol=2e-6, atol=2e-6)


def test_gradients_are_those_of_the_formula():
    (a, b), (x, y) = parts(2)
    rng = np.random.default_rng(1)
    d_output, d_lse = (jnp.asarray(rng.normal(size=s.shape), jnp.float32) for s in (a, x))

    @jax.jit
    def merged(a, x, b, y):
        values, vjp = jax.vjp(merge_attention, a, x, b, y)
        return values, vjp((d_output, d_lse))

    (output, lse), gradients = merged(a, x, b, y)
    for part, part_lse, d_part, d_part_lse in (
        (a, x, *gradients[:2]),
        (b, y, *gradients[2:]),
    ):
        weight = jnp.exp(part_lse - lse)
        np.testing.assert_allclose(d_part, weight[..., None] * d_output, rtol=1e-5, atol=1e-6)
        along = (d_output * (part - output)).sum(-1) + d_lse
        np.testing.assert_allclose(d_part_lse, weight * along, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("empty", [(0,), (1,), (0, 1)])
def test_gradients_of_empty_parts_are_zero(empty):
    (a, b), (x, y) = parts(2, empty=empty)
    (output, lse), vjp = jax.vjp(merge_attention, a, x, b, y)
    gradients = vjp((jnp.ones_like(output), jnp.ones_like(lse)))
    for part, (d_part, d_lse) in enumerate((gradients[:2], gradients[2:])):
        if part in empty:
            assert not np.any(d_part)
            assert not np.any(d_lse)
        else:
            np.testing.assert_allclose(d_part, 1, rtol=1e-6)
            np.testing.assert_allclose(d_lse, 1, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_dtypes(dtype):
    outputs, lses = parts(2)
    outputs = outputs.astype(dtype)
    output, lse = merge_attention(outputs[0], lses[0], outputs[1], lses[1])
    assert output.dtype == dtype
    assert lse.dtype == jnp.float32
    want, _ = expected(outputs.astype(jnp.float32), lses)
    # One rounding, of the result.
    tolerance = 0.51 * float(jnp.finfo(dtype).eps) if dtype != jnp.float32 else 1e-6
    np.testing.assert_allclose(output.astype(jnp.float32), want, rtol=tolerance, atol=1e-6)


def test_float64_stays():
    with jax.enable_x64(True):
        outputs, lses = (np.asarray(x, np.float64) for x in parts(2))
        output, lse = merge_attention(
            *(jnp.asarray(x) for x in (outputs[0], lses[0], outputs[1], lses[1]))
        )
        want, want_lse = expected(outputs, lses)
        assert output.dtype == lse.dtype == jnp.float64
        np.testing.assert_allclose(output, want, rtol=1e-14)
        np.testing.assert_allclose(lse, want_lse, rtol=1e-13)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output2": (2, 5, 3, 8)}, r"output2 has shape \(2, 5, 3, 8\); expected that of output1"),
        ({"lse1": (2, 3, 5)}, r"lse1 has shape \(2, 3, 5\); expected \(2, 5, 3\)"),
        ({"lse2": (2, 5)}, r"lse2 has shape \(2, 5\)"),
        ({"output2": jnp.bfloat16}, "dtypes float32 and bfloat16; expected one floating"),
        ({"lse2": jnp.int32}, "lse2 has dtype int32"),
    ],
)
def test_refusals(changes, message):
    arguments = {"output1": (2, 5, 3, 4), "lse1": (2, 5, 3), "output2": (2, 5, 3, 4)}
    arguments["lse2"] = (2, 5, 3)
    arrays = {name: jnp.zeros(shape) for name, shape in arguments.items()}
    for name, change in changes.items():
        is_shape = isinstance(change, tuple)
        arrays[name] = jnp.zeros(change) if is_shape else arrays[name].astype(change)
    with pytest.raises(ValueError, match=message):
        merge_attention(**arrays)
