"""Wrong variants of what is added to a loss, and whether their tests notice."""

from __future__ import annotations

import dataclasses

from tests import suites


@dataclasses.dataclass(frozen=True)
class Mutant(suites.Mutant):
    """One replacement in a file of `jaxopt_lab/regularizers`."""

    def tests(self) -> tuple[str, ...]:
        return ("regularizers",)


MUTANTS = [
    Mutant("block_ffn", "scaled = steep * scores", "scaled = scores"),
    Mutant("block_ffn", "- target * here", "- here"),
    Mutant("block_ffn", "jax.nn.sigmoid(scaled", "jax.nn.sigmoid(scores"),
    Mutant("block_ffn", "jnp.where(together[..., None], losses, 0)", "losses"),
    Mutant("block_ffn", "jnp.maximum(together.sum(), 1)", "together.sum()"),
    Mutant("block_ffn", "jnp.where(total == 0, 1, total) + eps", "total"),
    Mutant("block_ffn", "jnp.log(1 - p + eps)", "jnp.log(1 - p)"),
    Mutant("block_ffn", "jnp.where(counted, logs, 0)", "logs"),
    Mutant("block_ffn", "max(1.025, ratio)", "ratio"),
    Mutant("block_ffn", "missing = -x.shape[-2] % chunk", "missing = 0"),
]
