"""Wrong variants of products, and whether their tests notice."""

from __future__ import annotations

import dataclasses

import pallas_kernels
from tests import suites


@dataclasses.dataclass(frozen=True)
class Mutant(suites.Mutant):
    """One replacement in a file of `pallas_kernels/matmul`."""

    package = pallas_kernels

    def tests(self) -> tuple[str, ...]:
        return ("pallas_kernels/matmul",)


MUTANTS = [
    Mutant("gram", "across.mT], axis=-1", "across], axis=-1"),
    Mutant("gram", "product(lower, upper)", "product(upper, lower)"),
    Mutant("gram", "SPLITS = 2", "SPLITS = 1"),
    Mutant("gram", ">= least_side", "> least_side"),
    Mutant("gram", "preferred_element_type=preferred_element_type", "preferred_element_type=None"),
]
