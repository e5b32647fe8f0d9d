"""Products by bits are those of the integers."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from pallas_kernels import bit_plane_matmul

WIDTHS = range(1, 9)


def odd(rng: np.random.Generator, shape: tuple[int, ...], bits: int) -> np.ndarray:
    return 2 * rng.integers(0, 2**bits, shape) - (2**bits - 1)


@functools.cache
def product(lhs_bits: int, rhs_bits: int):
    return jax.jit(functools.partial(bit_plane_matmul, lhs_bits=lhs_bits, rhs_bits=rhs_bits))


@pytest.mark.parametrize("rhs_bits", WIDTHS)
@pytest.mark.parametrize("lhs_bits", WIDTHS)
def test_every_pair_of_widths_is_exact(lhs_bits, rhs_bits):
    rng = np.random.default_rng(0)
    lhs, rhs = odd(rng, (5, 70), lhs_bits), odd(rng, (70, 4), rhs_bits)
    lhs[0], rhs[:, 0] = 2**lhs_bits - 1, -(2**rhs_bits - 1)
    found = product(lhs_bits, rhs_bits)(lhs.astype(np.int32), rhs.astype(np.int32))
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, lhs @ rhs)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 64])
def test_every_length_is_exact(length):
    rng = np.random.default_rng(1)
    lhs, rhs = odd(rng, (3, length), 3), odd(rng, (length, 2), 2)
    found = product(3, 2)(lhs.astype(np.int16), rhs.astype(np.int8))
    np.testing.assert_array_equal(found, lhs @ rhs)


def test_signed_integers_are_odd_numbers():
    rng = np.random.default_rng(2)
    lhs, rhs = rng.integers(-128, 128, (4, 40)), rng.integers(-8, 8, (40, 3))
    doubled = (2 * lhs + 1).astype(np.int32), (2 * rhs + 1).astype(np.int32)
    found = np.asarray(product(8, 4)(*doubled))
    sums = 2 * lhs.sum(1, keepdims=True) + 2 * rhs.sum(0, keepdims=True) + 40
    np.testing.assert_array_equal(found, 4 * (lhs @ rhs) + sums)


def test_the_longest_contraction_does_not_leave_int32():
    length = (2**31 - 1) // 255**2
    ones = np.full((1, length), 255, np.int32)
    found = bit_plane_matmul(ones, -ones.T, lhs_bits=8, rhs_bits=8)
    assert int(found[0, 0]) == -(255**2) * length
