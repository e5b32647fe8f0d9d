"""Wrong variants of what layers take, and whether their tests notice."""

from __future__ import annotations

import dataclasses

import pallas_kernels
from tests import suites


@dataclasses.dataclass(frozen=True)
class Mutant(suites.Mutant):
    """One replacement in a file of `pallas_kernels/layers`."""

    package = pallas_kernels

    def tests(self) -> tuple[str, ...]:
        return ("pallas_kernels/layers",)


MUTANTS = [
    Mutant("block_ffn", "active**2, axis=-1", "active**2, axis=0"),
    Mutant("block_ffn", "keepdims=True) + eps", "keepdims=True)"),
    Mutant("block_ffn", "found *= jnp.expand_dims", "found += jnp.expand_dims"),
    Mutant("block_ffn", "jnp.any(active != 0, axis=0)", "jnp.any(active > 1, axis=0)"),
    Mutant("block_ffn", "jnp.argsort(~used", "jnp.argsort(used"),
    Mutant("block_ffn", "used.sum() <= most", "used.sum() <= most + 1"),
    Mutant("block_ffn", "used.sum() <= most", "used.sum() < most"),
    Mutant("block_ffn", "preferred_element_type=sums\n", "preferred_element_type=x.dtype\n"),
]
