"""What holds for every test of cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_ranks() -> Iterator[None]:
    """No array gets axes silently: the suites of jax and others ask this of what they call."""
    with jax.numpy_rank_promotion("raise"):
        yield
