r"""The dynamic-exponent code of `int8`: its levels, codes of numbers, and numbers of codes.

    code(u) = argmin_c |u - l[c]|,    level(c) = l[c]

A CPU looks both up in tables, of which a loop that it vectorises reads one entry a number, and a
GPU the second; other devices compute them, as they have no fast look-up. A table also takes the
compiler a fraction of the time.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _checks, _compat


def dynamic_code(signed: bool) -> np.ndarray:
    r"""The 256 levels of the dynamic-exponent code: finer steps for larger numbers.

    For each decade :math:`[10^{k-7}, 10^{k-6}]`, :math:`k = 0 \dots 6`, the levels are the centres
    of :math:`2^k` equal cells (:math:`2^{k+1}` without a sign); then come their negatives, 0 and 1.
    In a byte this is a sign, a run of zeros that gives the decade, a one, and the cell's number in
    the bits that are left.

    Args:
      signed: from -1 to 1 (-1 itself is no level), or from 0 to 1.

    Returns:
      A float32 array of shape (256,), strictly increasing.

    Examples:
      >>> dynamic_code(signed=False)[[0, 1, 128, 255]]
      array([0.0000000e+00, 3.2500000e-07, 1.1054687e-01, 1.0000000e+00],
            dtype=float32)
    """
    _checks.check_flag(signed=signed)
    return _levels(bool(signed))


@functools.cache
def _levels(signed: bool) -> np.ndarray:
    positive = []
    for k in range(7):
        cells = 2 ** (k if signed else k + 1)
        centres = 0.1 + 0.9 * (np.arange(cells) + 0.5) / cells
        positive.append(centres * 10.0 ** (k - 6))
    levels = np.concatenate([*positive, [0.0, 1.0]])
    if signed:
        levels = np.concatenate([levels, *[-decade for decade in positive]])
    book = np.sort(levels).astype(np.float32)
    book.setflags(write=False)
    return book


def nearest(units: jax.Array, signed: bool) -> jax.Array:
    """Returns the codes of the levels that are nearest, as low bits; not zero's for NaN.

    Args:
      units: float32 of any shape.
      signed: which of the two codes.
    """
    size = jnp.abs(units) if signed else jnp.maximum(units, 0)
    index = _nearest_index(size, signed, jnp, lambda x: x * 10 - 1)
    return round_to_integer(_with_sign(index, units < 0) if signed else index)


def nearest_by_table(x: jax.Array, inverse: jax.Array, signed: bool) -> jax.Array:
    """Returns `nearest(x * inverse / 4, signed)`, and for infinity times zero the largest.

    A number's bits without the last ones are its place in a table. What stands there makes a sum
    whose last bits overflow where the next level is nearer.

    Args:
      x: float32 of any shape.
      inverse: float32 of its shape, without a sign from 0 on.
      signed: which of the two codes.
    """
    table, low, shift = _sums(signed)
    units = x * inverse if signed else jnp.maximum(x * inverse, 0)
    bits = jax.lax.bitcast_convert_type(units, jnp.int32) & 0x7FFFFFFF
    bits = jax.lax.clamp(jnp.int32(low), bits, jnp.int32(low + (len(table) << shift) - 1))
    index = (bits + _look_up(table, (bits >> shift) - (low >> shift))) >> shift
    if not signed:
        return index
    # NaN has no sign to rely on.
    signs = [jax.lax.bitcast_convert_type(y, jnp.int32) for y in (x, inverse)]
    return _with_sign(index, signs[0] ^ signs[1] < 0)


def levels_of(codes: jax.Array, signed: bool) -> jax.Array:
    """Returns `dynamic_code(signed)[codes]`, up to the last bits if the platform is not a GPU.

    Args:
      codes: uint8 of any shape.
      signed: which of the two codes.
    """
    return _compat.platform_dependent(
        codes,
        cuda=lambda codes: levels_by_table(codes, signed),
        default=lambda codes: compute_levels(codes, signed),
    )


def levels_by_table(codes: jax.Array, signed: bool) -> jax.Array:
    """Returns `dynamic_code(signed)[codes]`.

    Args:
      codes: uint8 of any shape.
      signed: which of the two codes.
    """
    return _look_up(dynamic_code(signed), codes)


def _look_up(table: np.ndarray, index: jax.Array) -> jax.Array:
    places = jnp.asarray(table).at[index.astype(jnp.int32)]
    return places.get(mode="promise_in_bounds", wrap_negative_indices=False)


def _with_sign(index: jax.Array, negative: jax.Array) -> jax.Array:
    # There is no level at -1.
    return 127 + jnp.where(negative, jnp.maximum(-index, -127), index)


def _nearest_index(size: Any, signed: bool, xp: Any, ten_fold_less_one: Any) -> Any:
    """Returns the index of the level nearest to a magnitude among those from 0 on, as a float.

    The number in units of its decade's lower end, less 1, times cells / 9, is a position in cells
    from there. The middle between the last level of a decade and the first of the next is 0.2.
    """
    book = dynamic_code(signed=signed).astype(np.float64)
    book = book[book >= 0]
    lead, cells = size, xp.float32(64 if signed else 128)
    for step in (4, 2, 1):
        lower = lead < 10.0**-step
        lead = xp.where(lower, lead * 10.0**step, lead)
        cells = xp.where(lower, cells * 0.5**step, cells)
    position = ten_fold_less_one(lead) * (cells / 9)
    first = 1 if signed else 2
    inside = xp.where(position < 0.2, -1, xp.minimum(xp.floor(position), cells - 1))
    index = xp.maximum(cells - first + 1 + inside, 1)
    index = xp.where(size < float((book[-2] + 1) / 2), index, len(book) - 1.0)
    return xp.where(size < float(book[1] / 2), 0, index)


@functools.cache
def _sums(signed: bool) -> tuple[np.ndarray, int, int]:
    """Returns the table, the bits at which it begins, and how many of the last bits it is without.

    It is for four times the number. In each of its 64 or 128 places between two powers of 2 no more
    than one level begins.
    """
    shift = 17 if signed else 16
    firsts = _first_of_each(signed) + (2 << 23)
    starts = np.arange((firsts[0] - 1) >> shift, (firsts[-1] >> shift) + 1) << shift
    index = np.searchsorted(firsts, starts, side="right")
    following = np.append(firsts, np.iinfo(np.int32).max)[index]
    turns = np.where(following < starts + (1 << shift), following, starts + (1 << shift))
    table = (((index + 1) << shift) - turns).astype(np.int32)
    table.setflags(write=False)
    return table, int(starts[0]), shift


def _first_of_each(signed: bool) -> np.ndarray:
    """Returns the bits of the least number to which `nearest` gives each index from 1 on.

    That is so on a CPU, where a product and a sum are rounded once, and near to the middle between
    two levels.
    """
    book = dynamic_code(signed=signed)
    book = book[book >= 0]
    middles = ((book[1:] + book[:-1]) / 2).view(np.int32)
    near = middles[:, None] + np.arange(-8, 8, dtype=np.int32)

    def rounded_once(x: np.ndarray) -> np.ndarray:
        return (x.astype(np.float64) * 10 - 1).astype(np.float32)

    index = _nearest_index(near.view(np.float32), signed, np, rounded_once)
    return near[:, 0].astype(np.int64) + (index <= np.arange(len(middles))[:, None]).sum(1)


def compute_levels(codes: jax.Array, signed: bool) -> jax.Array:
    """Returns `dynamic_code(signed)[codes]` to the last bits, without a look-up an entry.

    Of index + first - 1 = first * 2**k + cell, exponent and mantissa are the decade k and the place
    in it.
    """
    first = 1 if signed else 2
    offset = codes.astype(jnp.int32) - (127 if signed else 0)
    index = jnp.abs(offset)
    bits = jax.lax.bitcast_convert_type((index + (first - 1)).astype(jnp.float32), jnp.int32)
    decade = (bits >> 23) - (127 + first - 1)
    place = jax.lax.bitcast_convert_type((bits & 0x7FFFFF) | (127 << 23), jnp.float32)
    half_cell = jax.lax.bitcast_convert_type(((127 - first + 1) - decade) << 23, jnp.float32)
    power = jnp.where(decade & 4 != 0, 1e-3, 1e-7)
    power = power * jnp.where(decade & 2 != 0, 100.0, 1.0) * jnp.where(decade & 1 != 0, 10.0, 1.0)
    levels = power * (9 * place - 8 + 4.5 * half_cell)
    levels = jnp.where(index == (128 if signed else 255), 1, levels)
    levels = jnp.where(index == 0, 0, levels)
    return jnp.where(offset < 0, -levels, levels)


def round_to_integer(x: jax.Array) -> jax.Array:
    """Rounds to nearest, ties to even; a conversion of floating numbers would saturate first."""
    return jax.lax.bitcast_convert_type(x + 1.5 * 2**23, jnp.int32)
