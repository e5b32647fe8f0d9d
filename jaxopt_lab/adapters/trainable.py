"""How many parameters are trained, kernel by kernel; nothing is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from jaxopt_lab.adapters.adapt import AdapterBase, parts, require_apart


class TrainableParameters(NamedTuple):
    """What `trainable_parameters` counts; its text is a table.

    Attributes:
      trained: number of parameters of the adapters.
      total: number of parameters of the base.
      kernels: of each kernel path, matrices, inputs x outputs, r, scaling and parameters, as text.
    """

    trained: int
    total: int
    kernels: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        head = ("kernel", "matrices", "in x out", "r", "scaling", "parameters")
        rows = [head, *self.kernels]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])
            for row in rows
        ]
        share = self.trained / max(self.total, 1)
        lines.append(f"trained: {self.trained:,} beside {self.total:,} of the base ({share:.3%})")
        return "\n".join(lines)


def trainable_parameters(base: AdapterBase, adapters: Mapping[str, Any]) -> TrainableParameters:
    """Counts what is trained, and says which axes, rank and scaling each kernel has.

    Args:
      base: from `init_adapters`, of arrays or shapes (`jax.eval_shape`).
      adapters: the factors, likewise.

    Returns:
      The counts; printed they are a table with a line for each kernel, and for each leaf that is
      trained whole.

    Raises:
      ValueError: the adapters are for other parameters or of another rank.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.LoraConfig(target_modules=["w"], r=2)
      >>> params = {"w": jnp.ones((8, 6)), "b": jnp.zeros(6)}
      >>> base, lora = adapters.init_adapters(params, config, jax.random.key(0))
      >>> print(adapters.trainable_parameters(base, lora))
      kernel  matrices  in x out  r  scaling  parameters
      w              1     8 x 6  2        4          28
      trained: 28 beside 54 of the base (51.852%)
    """
    require_apart(base, "trainable_parameters")
    rows, trained = [], 0
    factors, whole = parts(base, adapters)
    for kernel in base.kernels:
        count = sum(x.size for x in factors[kernel.name].values())
        trained += count
        fan_in, fan_out = kernel.matrix
        rows.append(
            (
                kernel.name,
                f"{kernel.count}",
                f"{fan_in} x {fan_out}",
                f"{kernel.r}",
                f"{kernel.scaling:.4g}",
                f"{count:,}",
            )
        )
    for name, leaf in whole.items():
        trained += leaf.size
        rows.append((name, "-", "whole", "-", "-", f"{leaf.size:,}"))
    total = sum(x.size for x in jax.tree.leaves(base.params))
    return TrainableParameters(trained, total, tuple(rows))
