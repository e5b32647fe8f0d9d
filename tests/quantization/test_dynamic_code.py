"""The dynamic-exponent code: every boundary between two codes, and what a code stands for."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import quantization
from jaxopt_lab.quantization import _dynamic

TOP = {True: 128, False: 255}  # the index of 1 among the levels that are not negative


def specification(units, signed):
    """Indices of the nearest levels from 0 on, by arithmetic on decades."""
    book = quantization.dynamic_code(signed=signed).astype(np.float64)
    book = book[book >= 0]
    lead, cells = units, jnp.float32(64 if signed else 128)
    for step in (4, 2, 1):
        lower = lead < 10.0**-step
        lead = jnp.where(lower, lead * 10.0**step, lead)
        cells = jnp.where(lower, cells * 0.5**step, cells)
    position = (lead * 10 - 1) * (cells / 9)
    first = 1 if signed else 2
    inside = jnp.where(position < 0.2, -1, jnp.minimum(jnp.floor(position), cells - 1))
    index = jnp.maximum(cells - first + 1 + inside, 1)
    index = jnp.where(units >= float((book[-2] + 1) / 2), len(book) - 1.0, index)
    return jnp.where(units < float(book[1] / 2), 0, index).astype(jnp.int32)


def boundaries(signed):
    """Bits of the first float32 of each index from 1 on, by bisection of the specification."""
    fn = jax.jit(specification, static_argnums=1)
    wanted = np.arange(1, TOP[signed] + 1)
    low, high = np.zeros(len(wanted), np.int32), np.full(len(wanted), 0x40000000, np.int32)
    for _ in range(31):
        middle = low + (high - low) // 2
        reached = np.asarray(fn(middle.view(np.float32), signed)) >= wanted
        low, high = np.where(reached, low, middle + 1), np.where(reached, middle, high)
    return low.astype(np.int32)


def codes_of(index, negative, signed):
    # There is no level at -1: what is nearest to it there would be is nearest to the last one.
    return np.where(negative, np.maximum(127 - index, 0), 127 + index) if signed else index


@pytest.mark.parametrize("by_table", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_each_boundary_is_where_the_arithmetic_has_it(signed, by_table):
    first = boundaries(signed)
    assert (np.diff(first) > 0).all()
    near = (first[:, None] + np.arange(-3, 4, dtype=np.int32)).ravel().view(np.float32)
    others = np.array([0, 1e-38, 1e-20, 1, 1.5, 1e10, 3e38], np.float32)
    units = np.concatenate([near, others])
    index = np.asarray(jax.jit(specification, static_argnums=1)(units, signed))
    assert set(index) == set(range(TOP[signed] + 1))

    def code(units):
        if by_table:
            return _dynamic.nearest_by_table(units, jnp.full_like(units, 4), signed)
        return _dynamic.nearest(units, signed)

    for sign in (1, -1) if signed else (1,):
        found = np.asarray(jax.jit(code)(sign * units).astype(jnp.uint8))
        np.testing.assert_array_equal(found, codes_of(index, sign < 0, signed))


@pytest.mark.parametrize("signed", [True, False])
def test_codes_on_the_whole_range_are_those_of_the_arithmetic(signed):
    # 2**20 numbers at equal distance in bits, 1.0e-10 to 4: 16 in each place of the table.
    units = np.linspace(0x2EE00000, 0x40800000, 2**20).astype(np.int32).view(np.float32)
    index = jax.jit(specification, static_argnums=1)(units, signed)
    found = jax.jit(lambda u: _dynamic.nearest_by_table(u, jnp.full_like(u, 4), signed))(units)
    np.testing.assert_array_equal(found.astype(jnp.uint8), codes_of(index, False, signed))


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_the_book(signed):
    codes, book = jnp.arange(256, dtype=jnp.uint8), quantization.dynamic_code(signed=signed)
    np.testing.assert_array_equal(_dynamic.levels_by_table(codes, signed), book)
    # Three powers of ten and a product, each rounded once.
    np.testing.assert_allclose(_dynamic.compute_levels(codes, signed), book, rtol=4 * 2**-24)


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_no_number_does_not_become_zero(signed):
    zero = 127 if signed else 0
    x, inverse = jnp.array([jnp.nan, 1.0, jnp.inf]), jnp.array([1.0, jnp.nan, 0.0])
    by_table = _dynamic.nearest_by_table(x, inverse, signed).astype(jnp.uint8)
    assert zero not in np.asarray(by_table)
    assert _dynamic.nearest(jnp.full(1, jnp.nan), signed).astype(jnp.uint8)[0] != zero


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("opposite", [1.0, 0.9999, 0.9964])
def test_an_entry_opposite_to_the_largest_keeps_its_sign(sign, opposite):
    x = sign * jnp.array([1.0, -opposite, 0.5, 0.0])
    found = quantization.int8(4).decode(quantization.int8(4).encode(x), jnp.float32)
    # The last level is half a cell of 0.9 / 64 from -1.
    np.testing.assert_allclose(found, x, atol=0.45 / 64 * 1.0001)


@pytest.mark.parametrize("sign", [1, -1])
def test_infinities_keep_their_signs(sign):
    x = sign * jnp.array([jnp.inf, -jnp.inf, 1.0, 0.0])
    found = quantization.int8(4).decode(quantization.int8(4).encode(x), jnp.float32)
    np.testing.assert_array_equal(found, sign * jnp.array([jnp.inf, -jnp.inf, 0.0, 0.0]))
