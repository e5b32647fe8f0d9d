"""Products of integers by their bits: bipolar-INT, as a reference.

n bits b_i stand for the odd number sum_i (2 b_i - 1) 2^i, from -(2^n - 1) to 2^n - 1, so that every
bit is a sign. A product of two such matrices is one of signs for each pair of bits,

    W A = sum_ij 2^(i + j) W_i A_j,       W_i A_j = K - 2 popcount(w_i xor a_j)

with 32 of the K signs in a word. Ma et al., arXiv:2409.17870.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._options import array, index

WORD = 32
INT32 = 2**31 - 1


def bit_plane_matmul(lhs: Any, rhs: Any, *, lhs_bits: int, rhs_bits: int) -> jax.Array:
    r"""The product of two matrices of odd integers, made of their bits alone.

    An odd number from :math:`-(2^n - 1)` to :math:`2^n - 1` is :math:`\sum_i (2 b_i - 1) 2^i` with
    n bits, and with matrices :math:`W_i` and :math:`A_j` of the signs,

    .. math::
      W A = \sum_{i,j} 2^{i+j} \, W_i A_j, \qquad
      W_i A_j = K - 2\, \mathrm{popcount}(w_i \oplus a_j)

    exactly, for every pair of widths. A signed integer x of n bits is the odd number
    :math:`x' = 2 x + 1`, and a real weight :math:`s x + z` is
    :math:`\tfrac{s}{2} x' + (z - \tfrac{s}{2})`.

    This is a reference, for tests of kernels and of files in this format. There is a product for
    every pair of bits, and JAX has no matrix unit of single bits: ``jax.lax.dot_general`` of int8
    is faster on every device, also for few bits.

    Args:
      lhs: integers (M, K), odd numbers of `lhs_bits` bits.
      rhs: integers (K, N), odd numbers of `rhs_bits` bits. What is even or too large counts as one
        of the numbers next to it or is cut off: values are not checked.
      lhs_bits: the width of `lhs`, 1 to 8.
      rhs_bits: the width of `rhs`, 1 to 8.

    Returns:
      The product, int32 (M, N).

    Raises:
      TypeError: a matrix is not of integers.
      ValueError: shapes do not match, a width is not 1 to 8, or sums may leave int32.

    Examples:
      >>> import jax.numpy as jnp, pallas_kernels
      >>> w, a = jnp.array([[-7, 5, 1]]), jnp.array([[1], [-1], [1]])
      >>> pallas_kernels.bit_plane_matmul(w, a, lhs_bits=3, rhs_bits=1).tolist()
      [[-11]]

    References:
      Ma et al., `Efficient Arbitrary Precision Acceleration for Large Language Models on GPU
      Tensor Cores <https://arxiv.org/abs/2409.17870>`_.
    """
    matrices = array("lhs", lhs), array("rhs", rhs)
    widths = _width("lhs_bits", lhs_bits), _width("rhs_bits", rhs_bits)
    for name, x in zip(("lhs", "rhs"), matrices):
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise TypeError(f"{name} is {x.dtype}; expected integers")
    of_lhs, of_rhs = (x.shape for x in matrices)
    if len(of_lhs) != 2 or len(of_rhs) != 2 or of_lhs[1] != of_rhs[0]:
        raise ValueError(f"lhs is {of_lhs} and rhs {of_rhs}; expected (M, K) and (K, N)")
    most = INT32 // ((2 ** widths[0] - 1) * (2 ** widths[1] - 1))
    if of_lhs[1] > most:
        raise ValueError(
            f"lhs has {of_lhs[1]} columns; expected at most {most} for {widths[0]} and "
            f"{widths[1]} bits, whose sums int32 holds"
        )
    rows, columns = _planes(matrices[0], widths[0]), _planes(matrices[1].T, widths[1])
    total = jnp.zeros((of_lhs[0], of_rhs[1]), jnp.int32)
    for i in range(widths[0]):
        for j in range(widths[1]):
            differ = rows[i][:, None] ^ columns[j][None]
            count = lax.population_count(differ).astype(jnp.int32).sum(-1, dtype=jnp.int32)
            total += (of_lhs[1] - 2 * count) << (i + j)
    return total


def _width(name: str, value: Any) -> int:
    value = index(name, value)
    if not 1 <= value <= 8:
        raise ValueError(f"{name}={value}; expected a width of 1 to 8 bits")
    return value


def _planes(x: jax.Array, bits: int) -> list[jax.Array]:
    """Returns the bits of odd numbers (M, K), packed along K into words (M, K / 32) a plane."""
    codes = (x.astype(jnp.int32) + (2**bits - 1)) >> 1
    codes = jnp.pad(codes, [(0, 0), (0, -x.shape[1] % WORD)])  # equal signs, which never differ
    words = codes.reshape(x.shape[0], -1, WORD).astype(jnp.uint32)
    places = jnp.arange(WORD, dtype=jnp.uint32)[None, None]
    return [
        (((words >> jnp.uint32(i)) & jnp.uint32(1)) << places).sum(-1, dtype=jnp.uint32)
        for i in range(bits)
    ]
