"""Wrong variants of products, and whether the test that should notice does."""

from __future__ import annotations

import dataclasses

import pallas_kernels
from tests import suites


@dataclasses.dataclass(frozen=True)
class Mutant(suites.Mutant):
    """One replacement in a file of `pallas_kernels/matmul`, and the test that must notice."""

    test: str = ""  # any of the file
    package = pallas_kernels

    def tests(self) -> tuple[str, ...]:
        own = self.name if self.name in ("gram", "weight_only", "bit_planes") else "quantized"
        return (f"pallas_kernels/matmul/test_{own}.py{self.test and f'::{self.test}'}",)


PRODUCT = "test_is_the_product_of_rounded_operands"
NUMBERS = "test_numbers_of_the_specification"
GRADIENTS = "test_gradients_of_quantised_products"
MEAN = "test_gradients_that_are_rounded_at_random_are_right_in_the_mean"
PAIRS = "test_every_pair_of_widths_is_exact"
WEIGHT = "test_is_the_product_of_the_rounded_weight"

MUTANTS = [
    # What is kept in few bits.
    Mutant("formats", "Format(jnp.int8, 127, 127.5)", "Format(jnp.int8, 127, 127)", NUMBERS),
    Mutant("formats", "Format(jnp.int4, 7, 7.5)", "Format(jnp.int4, 7, 8)", PRODUCT),
    Mutant(
        "formats", "if key is None else format.largest", "if key is None else format.edge", MEAN
    ),
    Mutant(
        "formats",
        "scales < jnp.finfo(dtype).tiny, 1, scales",
        "~(scales > 0), 1, scales",
        "test_what_is_not_finite_stays_so",
    ),
    Mutant(
        "formats",
        "scales < jnp.finfo(dtype).tiny, 1, scales",
        "scales < jnp.sqrt(jnp.finfo(dtype).tiny), 1, scales",
        "test_zeros_and_small_numbers_are_no_special_case",
    ),
    Mutant("formats", "y = jnp.round(y)", "y = jnp.trunc(y)", PRODUCT),
    Mutant("formats", "jnp.floor(y / spacing + ", "jnp.floor(y / spacing + 0.5 * ", MEAN),
    Mutant("formats", "jnp.frexp(y)[1] - 1", "jnp.frexp(y)[1]", MEAN),
    Mutant("formats", "jnp.clip(x / scales, -format.largest", "jnp.clip(x / scales, -128", NUMBERS),
    # The product.
    Mutant("products", "count * size - x.shape[axis]", "0", PRODUCT),
    Mutant("products", "lax.fori_loop(1, count,", "lax.fori_loop(0, count,", PRODUCT),
    Mutant(
        "products",
        "preferred_element_type=jnp.int32",
        "preferred_element_type=jnp.float32",
        "test_what_is_multiplied_has_few_bits",
    ),
    Mutant("products", "place = len(batch) if of_rhs", "place = len(sizes) if of_rhs", PRODUCT),
    Mutant("products", 'if product.settings.granularity == "tensor":', "if False:", PRODUCT),
    # Its derivatives.
    Mutant(
        "products",
        "return multiply(product, lhs, rhs, keys), (kept",
        "return _multiplied(product, *_quantized(product, lhs, rhs, keys)), (kept",
        "test_second_derivatives_are_those_of_the_plain_product",
    ),
    Mutant(
        "products",
        "if settings.keeps_quantized:\n        kept =",
        "if False:\n        kept =",
        GRADIENTS,
    ),
    Mutant("products", "if settings.backward[side]:", "if any(settings.backward):", GRADIENTS),
    Mutant(
        "products",
        "settings.gradient_format, settings.formats[other]",
        "settings.formats[other], settings.formats[other]",
        GRADIENTS,
    ),
    Mutant(
        "products",
        "keys[side]) for side",
        "keys[0]) for side",
        "test_the_two_gradients_are_rounded_by_their_own_numbers",
    ),
    Mutant("products", "(key, None))", "(None, None))", MEAN),
    Mutant("products", "if other == 0 else count + len(product.free(0))", "", GRADIENTS),
    Mutant("products", "for x in sorted(matching)", "for x in matching", PRODUCT),
    Mutant(
        "products",
        "return found.transpose([order.index(axis) for axis in range(len(order))])",
        "return found.transpose(order)",
        PRODUCT,
    ),
    Mutant(
        "products",
        "found = found.reshape(*found.shape[:axis], -1,",
        "found = found.swapaxes(axis, axis + 1).reshape(*found.shape[:axis], -1,",
        GRADIENTS,
    ),
    # The function.
    Mutant("quantized", "@functools.cache\n", "", "test_equal_settings_are_one_function"),
    Mutant(
        "quantized",
        "preferred_element_type=preferred_element_type,\n",
        "",
        "test_the_result_has_the_dtype_that_was_asked_for",
    ),
    Mutant("quantized", "_compat.vary_like(rhs, lhs)", "rhs", "test_rows_over_devices"),
    Mutant(
        "quantized",
        "if key is not None and not settings.stochastic:",
        "if False:",
        "test_a_key_is_for_gradients_alone",
    ),
    # Weights.
    Mutant(
        "weight_only",
        "preferred_element_type=sums,\n",
        "",
        "test_sums_are_wide_and_the_result_has_the_dtype_of_the_tokens",
    ),
    Mutant(
        "weight_only",
        "quantize(split, name, (place + 1,))",
        "quantize(split, name, (place,))",
        WEIGHT,
    ),
    Mutant("weight_only", "name, (place,)))", "name, (0,)))", WEIGHT),
    Mutant("weight_only", "len(batch) if of_rhs", "0 if of_rhs", WEIGHT, file="products"),
    Mutant("weight_only", "if summed and all(", "if all(", WEIGHT),
    Mutant(
        "weight_only", "size // scales.shape[axis], axis)", "size // scales.shape[axis], 0)", WEIGHT
    ),
    # Bits.
    Mutant("bit_planes", "of_lhs[1] - 2 * count", "of_lhs[1] - count", PAIRS),
    Mutant("bit_planes", "<< (i + j)", "<< i", PAIRS),
    Mutant("bit_planes", "(2**bits - 1)) >> 1", "(2**bits - 3)) >> 1", PAIRS),
    Mutant("bit_planes", "-x.shape[1] % WORD", "0", "test_every_length_is_exact"),
    Mutant("bit_planes", "of_lhs[1] - 2 * count", "rows[0].shape[1] * WORD - 2 * count", PAIRS),
    # The symmetric product.
    Mutant("gram", "across.mT], axis=-1", "across], axis=-1"),
    Mutant("gram", "product(lower, upper)", "product(upper, lower)"),
    Mutant("gram", "SPLITS = 2", "SPLITS = 1"),
    Mutant("gram", ">= least_side", "> least_side"),
    Mutant("gram", "preferred_element_type=preferred_element_type", "preferred_element_type=None"),
]
