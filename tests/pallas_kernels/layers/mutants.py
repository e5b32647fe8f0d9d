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
    Mutant("tract", "product(a.T, a) / rows", "product(a.T, a)"),
    Mutant("tract", "product(a, a.T) / rows", "product(a, a.T)"),
    Mutant("tract", "damping * jnp.eye", "jnp.eye"),
    Mutant("tract", "rows < entries and axis_name is None", "rows < entries"),
    Mutant("tract", "lax.pmean(moments, axis_name)", "lax.psum(moments, axis_name)"),
    Mutant("tract", "_compat.vary_like(lax.pmean(moments, axis_name), z)", "moments"),
    Mutant("tract", "tract(lhs, _compat.vary_like(rhs, lhs))", "tract(lhs, rhs)"),
    Mutant("tract", "lhs.transpose(*kept, *of_lhs)", "lhs.transpose(*of_lhs, *kept)"),
    Mutant("tract", "order = (*of_rhs, *columns)", "order = tuple(range(rhs.ndim))"),
    Mutant("tract", "x.transpose(batch, *space, features)", "x"),
    Mutant("tract", "order = list(axes.rhs_spec)", "order = list(range(rhs.ndim))"),
    Mutant("tract", "wide(lhs.dtype)", "lhs.dtype"),
    Mutant("tract", "return of_lhs, found", "return 0 * of_lhs, found"),
    Mutant("tract", "@functools.cache\n", ""),
    Mutant(
        "tract",
        "preferred_element_type=preferred_element_type,\n            out_sharding=out_sharding,\n"
        "        )\n        kept",
        "out_sharding=out_sharding,\n        )\n        kept",
    ),
    Mutant("tract", '"rhs_dilation": rhs_dilation,', '"rhs_dilation": None,'),
    Mutant("block_ffn", "active**2, axis=-1", "active**2, axis=0"),
    Mutant("block_ffn", "keepdims=True) + epsilon", "keepdims=True)"),
    Mutant("block_ffn", "found *= jnp.expand_dims", "found += jnp.expand_dims"),
    Mutant("block_ffn", "jnp.any(active != 0, axis=0)", "jnp.any(active > 1, axis=0)"),
    Mutant("block_ffn", "jnp.argsort(~used", "jnp.argsort(used"),
    Mutant("block_ffn", "used.sum() <= most", "used.sum() <= most + 1"),
    Mutant("block_ffn", "used.sum() <= most", "used.sum() < most"),
    Mutant("block_ffn", "preferred_element_type=sums\n", "preferred_element_type=x.dtype\n"),
]
