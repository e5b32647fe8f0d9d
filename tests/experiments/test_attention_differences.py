"""The probes of attention: the libraries that are here answer as the table of the site says."""

from __future__ import annotations

import pytest

from experiments.attention_differences import answers, libraries


@pytest.mark.parametrize(
    ("library", "hidden", "float64"),
    [
        ("pallas_kernels", "0", 1e-15),
        ("jax", "mean of all values", 1e-6),
        ("flax", "mean of all values", 1e-6),
    ],
)
def test_answers_of_the_libraries_that_are_here(library: str, hidden: str, float64: float) -> None:
    found = answers(libraries()[library]())
    assert found["fully hidden row"] == hidden
    assert found["causal, T < S"] == "first key"
    dtype, error = found["float64"].split(", error ")
    assert dtype == "float64"
    assert float64 / 100 < float(error) < float64


def test_an_error_is_an_answer() -> None:
    def attend(*_: object, **__: object) -> None:
        raise NotImplementedError("no such mask\nand more")

    assert set(answers(attend).values()) == {"NotImplementedError: no such mask"}
