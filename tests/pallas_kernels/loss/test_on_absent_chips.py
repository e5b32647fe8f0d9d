"""What the loss of a large vocabulary needs on chips that are not there, beside the plain form."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
import pytest

import pallas_kernels
from pallas_kernels.targets import compile_in_child
from tests.pallas_kernels.targets import needs

TOKENS, WIDTH, VOCABULARY = 8192, 2048, 152_064


def program(loss):
    """A loss and its gradients, as `compile_in_child` expects them."""
    fn = jax.value_and_grad(loss, (0, 1))
    structs = (
        jax.ShapeDtypeStruct((TOKENS, WIDTH), jnp.bfloat16),
        jax.ShapeDtypeStruct((WIDTH, VOCABULARY), jnp.bfloat16),
        jax.ShapeDtypeStruct((TOKENS,), jnp.int32),
    )
    return fn, structs, ()


def plain():
    def loss(hidden, weight, labels):
        logits = jnp.matmul(hidden, weight, preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return program(loss)


def chunked():
    return program(pallas_kernels.cross_entropy)


def tied():
    loss = functools.partial(pallas_kernels.cross_entropy, vocabulary_axis=0)
    fn, (hidden, weight, labels), _ = program(loss)
    return fn, (hidden, jax.ShapeDtypeStruct(weight.shape[::-1], weight.dtype), labels), ()


@pytest.mark.slow
@pytest.mark.parametrize("chip", [needs.on(chip) for chip in ("h200", "v5e")])
def test_temporaries_are_a_fortieth_of_the_plain_form_s(chip):
    temporary = {
        name: compile_in_child(f"{__name__}:{name}", chip)["memory"]["temp"]
        for name in ("chunked", "tied", "plain")
    }
    assert temporary["plain"] >= 4 * TOKENS * VOCABULARY
    assert 40 * temporary["chunked"] <= temporary["plain"], temporary
    assert 40 * temporary["tied"] <= temporary["plain"], temporary
