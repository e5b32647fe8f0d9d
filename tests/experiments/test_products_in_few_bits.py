"""The tables on products in few bits say what was measured."""

from __future__ import annotations

import pytest

from experiments import product_errors, quantized_training, weight_traffic


def test_errors_are_of_the_numbers_that_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("TOKENS", 32), ("WIDTH", 64), ("OUTPUTS", 16), ("OUTLIERS", 1)):
        monkeypatch.setattr(product_errors, name, size)
    normal, large = (product_errors.operands(kind) for kind in (False, True))
    fine, coarse = (product_errors.errors("int8", size, large)[0] for size in (16, "tensor"))
    assert 0.002 < product_errors.errors("int8", "row", normal)[0] < 0.02
    assert fine < coarse / 2
    measured = [
        {"outliers": outliers, "format": "int8", "granularity": size}
        | dict.fromkeys(product_errors.KINDS, 0.0123)
        for outliers in (False, True)
        for size in product_errors.GRANULARITIES
    ]
    monkeypatch.setattr(product_errors, "FORMATS", ("int8",))
    table = product_errors.rows(measured)
    assert table[0] == ["int8", "normal", "product", *["1.23%"] * 4]
    assert len(table) == 4
    assert {len(row) for row in table} == {len(product_errors.HEADER)}


def test_losses_are_beside_those_of_float32() -> None:
    found = {"float32": [2.0, 2.1], "int8": [2.05, 2.25], "int4": [2.0, None]}
    assert quantized_training.rows(found) == [
        ["float32", "2.0500", "0.1000", ""],
        ["int8", "2.1500", "0.2000", "+0.1000"],
        ["int4", "diverged", "", ""],
    ]


@pytest.mark.slow
def test_a_short_training_in_few_bits_is_that_in_float32() -> None:
    plain, few = (quantized_training.losses(x, 20, [0], "0.15M")[0] for x in ("float32", "int8"))
    assert plain is not None
    assert few == pytest.approx(plain, abs=0.02)  # int8's rounding; the loss falls by 1.5
    assert few != plain


def test_bytes_are_parts_of_those_in_bfloat16() -> None:
    measured = [
        {"chip": "h200", "tokens": 1, "format": name, "granularity": size, "bytes": moved}
        for (name, size), moved in zip(weight_traffic.WEIGHTS, (100, 50, 60, 51, 26), strict=True)
    ]
    assert weight_traffic.header(measured) == ["weight", "a scale for", "h200, 1 token"]
    assert weight_traffic.rows(measured)[:2] == [
        ["`int8`", "a row", "0.50"],
        ["`int8`", "128 inputs", "0.60"],
    ]
