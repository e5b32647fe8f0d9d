"""Marks for tests that need the compiler of an absent chip."""

from __future__ import annotations

import pytest

from pallas_kernels.targets import missing_compiler


def compiler(chip: str) -> tuple[pytest.MarkDecorator, ...]:
    reason = missing_compiler(chip)
    return pytest.mark.aot, pytest.mark.skipif(reason is not None, reason=reason or "")


def on(chip: str, *values: object) -> object:
    """Returns a parameter set for `chip`, skipped where its compiler is not installed."""
    return pytest.param(chip, *values, marks=compiler(chip), id="-".join(map(str, (chip, *values))))
