"""Codecs: levels, errors, and what bad entries do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab import quantization

CASES = [(code, signed) for code in ("linear", "dynamic") for signed in (True, False)]


def sample(signed, size=1000, decades=4.0):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(size) * 10.0 ** rng.uniform(-decades, 0, size)
    return jnp.asarray(x if signed else np.abs(x), jnp.float32)


def levels(code, signed):
    if code == "dynamic":
        return quantization.dynamic_code(signed=signed).astype(np.float64)
    return np.arange(-127, 128) / 127 if signed else np.arange(256) / 255


def round_trip(codec, x):
    return codec.decode(codec.encode(x), x.dtype)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_code_covers_seven_decades(signed):
    book = quantization.dynamic_code(signed=signed).astype(np.float64)
    assert book.shape == (256,)
    assert (np.diff(book) > 0).all()
    assert book[0] == (0 if not signed else -book[-2])
    assert 0 in book
    assert book[-1] == 1
    positive = book[book > 0]
    cells = [1, 2, 4, 8, 16, 32, 64]
    for k, count in enumerate(cells):
        inside = positive[(positive > 10.0 ** (k - 7)) & (positive < 10.0 ** (k - 6))]
        assert len(inside) == (count if signed else 2 * count)
    # In the upper three decades no number is further from its level than half a cell, which is
    # at most 4.5 / cells of the decade's lowest number.
    probes = 10.0 ** np.linspace(-3, -0.001, 5000)
    nearest = book[np.abs(probes[:, None] - book).argmin(1)]
    assert np.max(np.abs(nearest / probes - 1)) <= 4.5 / (16 if signed else 32) * 1.0001


@pytest.mark.parametrize(("code", "signed"), CASES)
def test_each_entry_gets_the_nearest_level(code, signed):
    book = levels(code, signed)
    x = sample(signed, 4096, 8.0)
    scale = float(x[jnp.argmax(jnp.abs(x))])
    codec = quantization.int8(4096, code, signed)
    found = np.asarray(round_trip(codec, x), np.float64) / scale
    units = np.asarray(x, np.float64) / scale
    if not signed:
        units = np.maximum(units, book[1])  # positive entries never become zero
    best = np.abs(units[:, None] - book).min(1)
    # float32: a few units in the last place of the entry, and of the level's own rounding.
    assert np.all(np.abs(found - units) <= best + 1e-6 * np.abs(units) + 1e-13)


@pytest.mark.parametrize(("code", "signed"), CASES)
def test_each_level_is_kept(code, signed):
    book = levels(code, signed)
    codec = quantization.int8(len(book), code, signed)
    x = jnp.asarray(book, jnp.float32)
    codes = np.asarray(codec.encode(x).codes, np.int64)
    assert len(set(codes)) == len(book)
    np.testing.assert_allclose(round_trip(codec, x), book, rtol=1e-6)  # some float32 roundings


@pytest.mark.parametrize(("code", "signed"), CASES)
@pytest.mark.parametrize("sign", [1, -1])
def test_encoding_again_changes_nothing(code, signed, sign):
    codec = quantization.int8(64, code, signed)
    x = sample(signed) * (sign if signed else 1)
    first = codec.encode(x)
    again = codec.encode(codec.decode(first, jnp.float32))
    np.testing.assert_array_equal(again.codes, first.codes)
    np.testing.assert_array_equal(again.scales, first.scales)


@pytest.mark.parametrize(("code", "signed"), CASES)
def test_compiled_round_trip_over_the_range_of_float32(code, signed):
    # Compiled, as XLA may merge the factors of two products and round differently.
    codec = quantization.int8(16, code, signed)
    magnitudes = 10.0 ** np.linspace(-36.9, 37.4, 300)[:, None]
    x = np.random.default_rng(0).uniform(-9, 9, (300, 37)) * magnitudes
    x = jnp.asarray(x if signed else np.abs(x), jnp.float32)
    encode, decode = jax.jit(codec.encode), jax.jit(lambda e: codec.decode(e, jnp.float32))
    first = encode(x)
    found = decode(first)
    again = encode(found)
    for left, right in zip(again, first):
        np.testing.assert_array_equal(left, right)
    for start, stop in ((0, 16), (16, 32), (32, 37)):
        largest = np.abs(x[:, start:stop]).argmax(1)[:, None]
        np.testing.assert_array_equal(
            np.take_along_axis(np.asarray(found[:, start:stop]), largest, 1),
            np.take_along_axis(np.asarray(x[:, start:stop]), largest, 1),
        )


@pytest.mark.parametrize(("code", "signed"), CASES)
def test_ends_of_the_range(code, signed):
    largest, tiny = float(jnp.finfo(jnp.float32).max), float(jnp.finfo(jnp.float32).tiny)
    codec = quantization.int8(4, code, signed)
    for scale in (largest, 1.5 * tiny):
        x = jnp.array([0, -scale if signed else scale])
        np.testing.assert_array_equal(round_trip(codec, x), x)
    found, zeros = codec.encode(jnp.full(4, tiny)), codec.encode(jnp.zeros(4))
    jax.tree.map(np.testing.assert_array_equal, found, zeros)
    np.testing.assert_array_equal(codec.decode(found, jnp.float32), jnp.zeros(4))


@pytest.mark.parametrize(
    ("shape", "scales"),
    [
        ((), (1,)),
        ((8,), (1,)),
        ((33,), (3,)),
        ((5, 16), (5, 1)),
        ((5, 40), (5, 3)),
        ((6, 4, 8), (6, 2)),
        ((3, 2, 4), (2,)),
        ((0, 16), (0, 1)),
        ((3, 0), (0,)),
    ],
)
def test_blocks_are_cut_from_rows_that_are_long_enough(shape, scales):
    codec = quantization.int8(16, "linear")
    x = sample(True, int(np.prod(shape))).reshape(shape)
    encoded = codec.encode(x)
    assert encoded.codes.shape == shape
    assert encoded.scales.shape == scales
    length = int(np.prod(shape[len(scales) - 1 :]))
    rows = np.abs(x).reshape(*shape[: len(scales) - 1], length)
    wanted = [rows[..., i : i + 16].max(-1) for i in range(0, length, 16)]
    if x.size:
        np.testing.assert_array_equal(encoded.scales, np.stack(wanted, -1))


@pytest.mark.parametrize("signed", [True, False])
def test_linear_error_is_half_a_level_of_the_block(signed):
    x = sample(signed).reshape(10, 100)
    found = round_trip(quantization.int8(256, "linear", signed), x)
    assert found.shape == x.shape
    # The two axes of 1000 entries are one row of three blocks and 232 entries.
    padded = np.zeros(1024)
    padded[:1000] = np.abs(np.ravel(x))
    bound = np.repeat(padded.reshape(4, 256).max(1), 256)[:1000] / (254 if signed else 255)
    error = np.abs(np.ravel(found).astype(np.float64) - np.ravel(x))
    # Unsigned, entries below half a level go up to the first, which is a whole one away.
    assert np.all(error <= bound * 1.0001)


@pytest.mark.parametrize(("code", "signed"), CASES)
def test_zeros_and_the_padded_block(code, signed):
    codec = quantization.int8(16, code, signed)
    x = sample(signed, 21).at[jnp.array([3, 20])].set(0)
    alone = round_trip(codec, x[16:])
    found = round_trip(codec, x)
    assert found[3] == found[20] == 0
    np.testing.assert_array_equal(found[16:], alone)
    for size in (0, 1, 16):
        np.testing.assert_array_equal(round_trip(codec, jnp.zeros(size)), jnp.zeros(size))
    assert codec.encode(x).scales.shape == (2,)
    np.testing.assert_array_equal(round_trip(codec, jnp.full(16, 1e-45)), jnp.zeros(16))


@pytest.mark.parametrize(("code", "signed"), CASES)
def test_bad_entries_stay_in_their_block(code, signed):
    codec = quantization.int8(8, code, signed)
    x = sample(signed, 24)
    clean = round_trip(codec, x)
    found = round_trip(codec, x.at[9].set(jnp.nan))
    assert np.isnan(found[8:16]).all()
    found = found.at[8:16].set(clean[8:16])
    np.testing.assert_array_equal(found, clean)
    found = round_trip(codec, x.at[9].set(jnp.inf).at[10].set(0))
    assert found[9] == jnp.inf
    assert found[10] == 0
    assert not np.isnan(found).any()
    np.testing.assert_array_equal(found[16:], clean[16:])


@pytest.mark.parametrize("code", ["linear", "dynamic"])
def test_unsigned_keeps_positive_entries_positive(code):
    x = jnp.array([1.0, 1e-20, 0.0, -1.0])
    found = round_trip(quantization.int8(4, code, signed=False), x)
    assert found[1] > 0
    assert found[2] == found[3] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_decoded_dtype(dtype):
    x = sample(True).astype(dtype)
    codecs: list[quantization.Codec] = [quantization.int8(), quantization.bfloat16()]
    for codec in codecs:
        assert codec.decode(codec.encode(x, jax.random.key(0)), dtype).dtype == dtype


def test_derivatives_do_not_pass():
    codec = quantization.int8(4, signed=False)
    slope = jax.grad(lambda x: round_trip(codec, x).sum())(jnp.array([0.5, 1.0, 2.0]))
    np.testing.assert_array_equal(slope, jnp.zeros(3))


def test_bfloat16_to_nearest():
    x = sample(True)
    codec = quantization.bfloat16(stochastic=False)
    found = codec.decode(codec.encode(x, jax.random.key(0)), jnp.float32)
    np.testing.assert_array_equal(found, x.astype(jnp.bfloat16).astype(jnp.float32))


def test_bad_arguments():
    with pytest.raises(ValueError, match="block_size must be a positive integer, got 0"):
        quantization.int8(0)
    with pytest.raises(TypeError, match=r"positive integer, got 1\.5"):
        quantization.int8(1.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="code must be one of dynamic, linear, got 'cubic'"):
        quantization.int8(code="cubic")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="signed must be True, False or None, got 1"):
        quantization.int8(signed=1)  # pyright: ignore[reportArgumentType]
    codec = quantization.int8(4)
    encoded = codec.encode(jnp.ones(8))
    with pytest.raises(ValueError, match=r"need scales of shape \(2,\)"):
        codec.decode(encoded._replace(scales=jnp.ones(3)), jnp.float32)
