"""A name that the package does not have: the error says where the right one is."""

from __future__ import annotations

import pytest

import jaxopt_lab


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("adamP", "; did you mean adamp?"),
        ("quantise_state", "; did you mean quantize_state?"),
        ("LoRAConfig", "; did you mean LoraConfig?"),
        ("adamw", "; that one is optax's: optax.adamw"),
        ("AdamW", "; that one is optax's: optax.adamw"),
        ("sgd", "; that one is optax's: optax.sgd"),
        ("prodigy", "; that one is optax's: optax.contrib.prodigy"),
        ("int8", "; it is jaxopt_lab.quantization.int8"),
        ("nothing_like_it", ""),
        ("_private", ""),
    ],
)
def test_a_wrong_name_is_told_the_right_one(name: str, hint: str) -> None:
    with pytest.raises(AttributeError) as raised:
        getattr(jaxopt_lab, name)
    assert str(raised.value) == f"module 'jaxopt_lab' has no attribute {name!r}{hint}"
