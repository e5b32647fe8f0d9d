"""Wrong variants of the norms, and whether their tests notice."""

from __future__ import annotations

import dataclasses

import pallas_kernels
from tests import suites


@dataclasses.dataclass(frozen=True)
class Mutant(suites.Mutant):
    """One replacement in a file of `pallas_kernels/norm`."""

    package = pallas_kernels

    def tests(self) -> tuple[str, ...]:
        return ("pallas_kernels/norm",)


MUTANTS = [
    Mutant("formula", "lax.rsqrt(mean_square + epsilon)", "lax.rsqrt(mean_square) + epsilon"),
    Mutant("formula", "centred * _inverse(centred", "centred * _inverse(exact"),
    Mutant("formula", "scale + offset if offset", "scale if offset"),
    Mutant("formula", "normal.astype(x.dtype).astype(exact.dtype)", "normal"),
    Mutant("formula", "exact = x.astype(wide(x.dtype))", "exact = x"),
    Mutant("formula", "found += bias", "found -= bias"),
    Mutant(
        "formula",
        "return _scaled(normal, scale, scale_offset).astype(x.dtype)",
        "return _scaled(normal, scale, scale_offset)",
    ),
    Mutant("norms", "save_only_these_names(*formula.KEPT)", "everything_saveable"),
    Mutant("norms", "total = x + residual", "total = x - residual"),
    Mutant("norms", "(total, scale), total", "(total, scale), x"),
    Mutant("linen", "astype(jnp.promote_types(x.dtype, dtype))", "astype(dtype)"),
    Mutant("linen", "epsilon=self.epsilon).astype(dtype)", "epsilon=self.epsilon)"),
    Mutant(
        "linen",
        "layer.axis_name is not None or not in_float32 or any(",
        "any(x is None for x in ()) and any(",
    ),
    Mutant("nnx", "if mask is not None or is_special", "if is_special"),
    Mutant("nnx", "epsilon=self.epsilon", "epsilon=1e-6"),
]
