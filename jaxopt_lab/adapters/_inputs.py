"""What goes into the products with kernels, recorded while they stay as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from jaxopt_lab import _checks, _tree
from jaxopt_lab.adapters import _targets, _trace
from jaxopt_lab.adapters._trace import Convolution, Dot, Tracked


def check(config: Any, batches: Any, **function: Any) -> None:
    """Refuses arguments that no estimate can be made of, by name.

    Raises:
      TypeError: no config, no function, or batches that nothing iterates over.
    """
    _targets.check_config(config)
    _checks.check_function(**function)
    if not isinstance(batches, Iterable) or isinstance(batches, (str, Mapping)):
        raise TypeError(
            f"batches must be a list, an iterator or the like of batches, got a "
            f"{type(batches).__name__}; of one batch, [batch]"
        )


@dataclasses.dataclass(frozen=True)
class Collector:
    """A handler for `_trace.evaluate`.

    Attributes:
      of_rows: `(product, rows) -> tree`, what is recorded of the inputs, (matrices, rows, inputs)
        in at least float32: arrays with an axis of matrices in front, for which the record has the
        kernel's batch axes.
    """

    of_rows: Callable[[Dot, jax.Array], Any]

    def materialise(self, kernel: Tracked) -> jax.Array:
        """Returns the kernel as it is."""
        return kernel.value

    def repeated(self, kernel: Tracked, step: jax.Array) -> Tracked:
        """Returns the kernel."""
        del step
        return kernel

    def product(self, product: Dot | Convolution) -> tuple[jax.Array, dict[str, Any]] | None:
        """Returns the product and the record; nothing is known of a convolution."""
        if isinstance(product, Convolution):
            return None
        kernel = product.kernel
        x = _trace.rows(product.x, product.x_batch, product.x_inputs)
        found = self.of_rows(product, x.astype(_tree.compute_dtype(x.dtype)))
        batch = [kernel.kernel.shape[axis] for axis in kernel.batch]
        record = jax.tree.map(lambda z: z.reshape(*batch, *z.shape[1:]), found)
        return product.whole(), {kernel.kernel.name: record}
