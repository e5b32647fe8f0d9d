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


@pytest.mark.parametrize(
    ("folder", "name", "hint"),
    [
        ("distributed", "DiLoCo", "; did you mean diloco?"),
        ("distributed", "sync_gradient", "; did you mean sync_gradients?"),
        ("distributed", "lion", "; it is jaxopt_lab.lion"),
        ("distributed", "int8", "; it is jaxopt_lab.quantization.int8"),
        ("distributed", "adamw", "; that one is optax's: optax.adamw"),
        ("distributed", "nothing_like_it", ""),
        ("quantization", "Int8", "; did you mean int8?"),
        ("regularizers", "chunksparsity", "; did you mean chunk_sparsity?"),
        ("schedules", "WSD_schedule", "; did you mean wsd_schedule?"),
        ("subspace", "SVD", "; did you mean svd?"),
        ("adapters", "LoRAConfig", "; did you mean LoraConfig?"),
        ("diagnostics", "state_byte", "; did you mean state_bytes?"),
    ],
)
def test_a_wrong_name_in_a_folder_is_told_the_right_one(folder: str, name: str, hint: str) -> None:
    module = getattr(jaxopt_lab, folder)
    with pytest.raises(AttributeError) as raised:
        getattr(module, name)
    assert str(raised.value) == f"module 'jaxopt_lab.{folder}' has no attribute {name!r}{hint}"


def test_a_file_of_a_folder_can_be_imported_by_its_name() -> None:
    from jaxopt_lab.adapters import files

    assert files.__name__ == "jaxopt_lab.adapters.files"
