"""Products of operands that are quantised on the way, for Flax's ``dot_general=``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from pallas_kernels import _compat
from pallas_kernels._options import flag, floating
from pallas_kernels.matmul import formats, products
from pallas_kernels.matmul.formats import FORMATS
from pallas_kernels.matmul.products import Product, Settings

BACKWARD = {"none": (False, False), "lhs": (True, False), "rhs": (False, True), "both": (True,) * 2}
RESIDUALS = ("operands", "quantized")


def quantized_dot_general(
    format: str = "int8",
    granularity: str | int = "row",
    *,
    backward: str = "none",
    gradient_format: str | None = None,
    stochastic_rounding: bool = False,
    residuals: str = "operands",
) -> Callable[..., jax.Array]:
    r"""Returns a ``dot_general`` that multiplies in 8 bits, for layers of Flax.

    Operands :math:`a` and :math:`b` are rounded to :math:`s q` with scales :math:`s` from their
    largest entries, at each call; with :math:`i` over the contraction, and one scale for all of it
    or for each block of it,

    .. math::
      y = \sum_{\text{blocks}} s_a s_b \sum_{i} q_a q_b, \qquad
      q = \mathrm{round}(x / s), \quad s = \max |x| / B

    with :math:`B` = 127.5 for int8, 7.5 for int4, 448 and 57344 for the floats. Sums are int32
    for integers and float32 for floats. The derivative is that of the plain product
    (straight-through): :math:`g b^\top` and :math:`a^\top g`, made of floats in the dtype of the
    operands, or quantised too by `backward`.

    A group of zeros gives 0. What shares a scale with NaN or an infinity is NaN as a whole: a row
    of y for a row of a, everything for ``"tensor"``. The scales are those of what the device has:
    in `shard_map` of its own part.

    Derivatives: reverse mode, and reverse mode of that; JAX refuses `jax.jvp`. A derivative of a
    derivative takes quantised residuals for constants.

    Args:
      format: ``"int8"``, ``"int4"``, ``"float8_e4m3fn"`` or ``"float8_e5m2"``, of both operands.
      granularity: what has one scale: ``"tensor"``, all of an operand; ``"row"``, what is summed
        up for an entry of the result (a token's row, an output channel's column); or the length of
        blocks along the last axis of the contraction, of which the last may be shorter. With
        blocks there is a product for each, and a pass over the result.
      backward: which gradients are products in few bits: ``"none"``, ``"lhs"`` (of the inputs),
        ``"rhs"`` (of the kernel) or ``"both"``. `g` and the operand are quantised for each product
        anew, with scales by `granularity` along its contraction.
      gradient_format: of g there, by default that of the operands. A float needs a float.
      stochastic_rounding: whether g is rounded at random, so that its mean is right. Then
        gradients need a key, an argument of the product.
      residuals: what is kept for the backward pass: ``"operands"``, or ``"quantized"``, which is a
        quarter of float32's memory, and takes the rounded operands for the operands in it.

    Returns:
      ``dot_general(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None, *,
      out_sharding=None, key=None)``: the arguments of `jax.lax.dot_general`, and the key for one
      call's random rounding. Operands are floating; the result has the dtype that
      `jax.lax.dot_general` would give it. `precision` is that of products of floats.
      Calls with equal arguments return the same function.

    Raises:
      TypeError: `granularity` is no integer, or `stochastic_rounding` no bool; in the product, an
        operand is not floating.
      ValueError: a name is not known, or an option would do nothing; in the product, a key is
        missing or not needed.
      NotImplementedError: in the product, an `out_sharding`.

    Examples:
      >>> from flax import nnx
      >>> import jax, jax.numpy as jnp, pallas_kernels
      >>> layer = nnx.Linear(
      ...     8, 4, rngs=nnx.Rngs(0), dot_general=pallas_kernels.quantized_dot_general("int8"))
      >>> layer(jnp.ones((2, 8))).shape
      (2, 4)

      Random rounding takes a key that differs from call to call:

      >>> dot = pallas_kernels.quantized_dot_general(backward="both", stochastic_rounding=True)
      >>> def loss(w, x, key):
      ...     return dot(x, w, (((1,), (0,)), ((), ())), key=key).sum()
      >>> jax.grad(loss)(jnp.ones((8, 4)), jnp.ones((2, 8)), jax.random.key(0)).shape
      (8, 4)

    References:
      The scales are those of `AQT <https://github.com/google/aqt>`_ and
      `Qwix <https://github.com/google/qwix>`_; straight-through: Bengio, Léonard and Courville,
      *Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation*
      (`arXiv 1308.3432 <https://arxiv.org/abs/1308.3432>`_).
    """
    name = formats.format_name("format", format)
    for argument, value, known in (
        ("backward", backward, tuple(BACKWARD)),
        ("residuals", residuals, RESIDUALS),
    ):
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{argument}={value!r}; expected one of {known}")
    stochastic = flag("stochastic_rounding", stochastic_rounding)
    given = "gradient_format" if gradient_format is not None else "stochastic_rounding"
    if backward == "none" and (stochastic or gradient_format is not None):
        raise ValueError(
            f"{given} is for the products of the backward pass, and backward='none'; expected "
            "'lhs', 'rhs' or 'both'"
        )
    of_gradient = name
    if gradient_format is not None:
        of_gradient = formats.format_name("gradient_format", gradient_format)
    if FORMATS[of_gradient].is_integer != FORMATS[name].is_integer:
        raise ValueError(
            f"gradient_format={gradient_format!r} with format={name!r}; expected both of integers "
            "or both of floats, which can be multiplied"
        )
    return _dot_general(
        Settings(
            (name, name), formats.granularity(granularity), of_gradient, BACKWARD[backward],
            stochastic, residuals == "quantized",
        )
    )  # fmt: skip


# Layers of equal settings have equal functions: nnx compares them to tell whether to trace again.
@functools.cache
def _dot_general(settings: Settings) -> Callable[..., jax.Array]:
    def dot_general(
        lhs: jax.Array,
        rhs: jax.Array,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """`jax.lax.dot_general` of operands that are quantised on the way."""
        lhs, rhs = floating("lhs", lhs), floating("rhs", rhs)
        if out_sharding is not None:
            raise NotImplementedError(
                f"out_sharding={out_sharding!r}; expected None: shard the operands, or constrain "
                "the result"
            )
        if key is not None and not settings.stochastic:
            raise ValueError("key was given; expected None without stochastic_rounding=True")
        plain = functools.partial(
            lax.dot_general,
            dimension_numbers=dimension_numbers,
            precision=precision,
            preferred_element_type=preferred_element_type,
        )
        like = jax.eval_shape(plain, lhs, rhs)  # which checks the axes
        (of_lhs, of_rhs), (batch_lhs, batch_rhs) = dimension_numbers
        product = Product(
            settings,
            (tuple(of_lhs), tuple(of_rhs)),
            (tuple(batch_lhs), tuple(batch_rhs)),
            (
                jax.ShapeDtypeStruct(lhs.shape, lhs.dtype),
                jax.ShapeDtypeStruct(rhs.shape, rhs.dtype),
            ),
            precision,
            like.dtype,
        )
        # Under `shard_map` a gradient varies as its operand does.
        lhs, rhs = _compat.vary_like(lhs, rhs), _compat.vary_like(rhs, lhs)
        return products.multiply(product, lhs, rhs, (None, key))

    return dot_general
