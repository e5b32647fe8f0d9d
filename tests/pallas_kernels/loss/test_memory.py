"""What the compiled programs need beside arguments and results."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels

PLANS = {"recompute": {}, "in forward": {"gradient_in_forward": True}}


@functools.cache
def temporaries(
    tokens: int, width: int, vocabulary: int, axis: int = 1, dtype: str = "float32", **options
) -> int:
    weight = (width, vocabulary) if axis == 1 else (vocabulary, width)
    structs = (
        jax.ShapeDtypeStruct((tokens, width), dtype),
        jax.ShapeDtypeStruct(weight, dtype),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    )
    fn = functools.partial(pallas_kernels.cross_entropy, vocabulary_axis=axis, **options)
    program = jax.jit(jax.value_and_grad(fn, (0, 1))).lower(*structs).compile()
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("plan", PLANS)
def test_no_copy_of_the_weight_is_made(plan, axis):
    vocabulary = 20 * 512 + 7  # with a smaller last block
    found = temporaries(256, 128, vocabulary, axis, block_vocabulary=512, **PLANS[plan])
    assert found < 4 * 128 * vocabulary / 2


@pytest.mark.parametrize("axis", [0, 1])
def test_a_narrow_weight_is_widened_block_by_block(axis):
    vocabulary = 20 * 512 + 7
    found = temporaries(256, 128, vocabulary, axis, "bfloat16", block_vocabulary=512)
    assert found < 4 * 128 * vocabulary / 2


@pytest.mark.parametrize("plan", PLANS)
def test_temporaries_are_a_thirtieth_of_the_definition_s(plan):
    shape = (4096, 1024, 65536)
    plain = temporaries(*shape, implementation="reference")
    assert plain > 4 * 4096 * 65536
    assert 30 * temporaries(*shape, **PLANS[plan]) <= plain


def test_temporaries_do_not_grow_with_the_vocabulary():
    small, large = (temporaries(512, 64, v, block_vocabulary=512) for v in (4096, 65536))
    assert large < 1.1 * small
