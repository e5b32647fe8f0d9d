r"""Second moments of what goes into the kernels, collected from a pure function.

    C = 1 / calls sum_calls X^T X,        X = inputs / |max(inputs)|

Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for
Task-Aware Parameter-Efficient Fine-tuning", NeurIPS 2024, arXiv:2406.05223, section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab.adapters import _inputs, _trace
from jaxopt_lab.adapters._kernels import Kernel
from jaxopt_lab.adapters._trace import Dot, Record
from jaxopt_lab.adapters.adapt import AdapterConfig


def estimate_covariances(
    fun: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    config: AdapterConfig,
) -> dict[str, np.ndarray]:
    r"""Averages the second moment of each kernel's inputs over all products with it.

    .. math::
      C = \frac{1}{n} \sum_{i=1}^n X_i^\top X_i, \quad X_i = x_i / |\max x_i|

    The function is traced and its products with the kernels are found (see `factored`): no hooks,
    and nothing to change in a model. Each product counts one, with all examples of a batch; the
    division is by the magnitude of the largest entry, as in the authors' code, and where that is
    less than 1e-6 of the largest magnitude, by the latter. Sums are kept in the host's memory.

    Args:
      fun: `(params, batch) -> anything`; a loss or a forward pass.
      params: the parameters, in any container.
      batches: at least one.
      config: chooses the kernels.

    Returns:
      A dictionary from the kernel's path to an array (matrices, inputs, inputs), float32 (float64
      for float64 inputs); a kernel that is no stack is one matrix.

    Raises:
      ValueError: no batch; a kernel that no product was found for, or whose inputs were all zero;
        see `LoraConfig` for what concerns the choice of kernels.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1)
      >>> model = lambda params, x: x @ params["w"]
      >>> batch = jnp.array([[1.0, 0.0], [0.0, 2.0]])
      >>> adapters.estimate_covariances(model, {"w": jnp.eye(2)}, [batch], config)["w"].tolist()
      [[[0.25, 0.0], [0.0, 1.0]]]

    References:
      Yang et al., `CorDA <https://arxiv.org/abs/2406.05223>`_, NeurIPS 2024.
    """
    _inputs.check(config, batches, fun=fun)
    kernels = config.kernels(params)

    @jax.jit
    def collect(params: Any, batch: Any) -> dict[str, tuple[jax.Array, jax.Array]]:
        _, records = _trace.evaluate(fun, params, kernels, {}, _inputs.Collector(_moment), batch)
        return {k.name: _total(k, records[k.name]) for k in kernels if k.name in records}

    sums: dict[str, np.ndarray] = {}
    counts: dict[str, np.ndarray] = {}
    batch = None
    for batch in batches:
        for name, (moment, count) in collect(params, batch).items():
            sums[name] = sums.get(name, 0) + np.asarray(moment)
            counts[name] = counts.get(name, 0) + np.asarray(count)
    if batch is None:
        raise ValueError("estimate_covariances needs at least one batch, got none")
    for kernel in kernels:
        if kernel.name not in sums:
            raise ValueError(
                f"estimate_covariances found no product that sums over the inputs of kernel "
                f"'{kernel.name}' (a convolution is none): use exclude_modules"
            )
        if not (counts[kernel.name] > 0).all():
            raise ValueError(f"all inputs of kernel '{kernel.name}' were zero or there were none")
    return {k.name: sums[k.name] / counts[k.name][:, None, None] for k in kernels}


def _total(kernel: Kernel, records: list[Record]) -> tuple[jax.Array, jax.Array]:
    """Adds up what was recorded: (matrices, inputs, inputs), and how often, (matrices,)."""
    width = kernel.matrix[0]
    sums = [
        jax.tree.map(lambda x, r=record.repeats: jnp.sum(x, range(r)), record.value)
        for record in records
    ]
    moment, count = jax.tree.map(lambda *parts: sum(parts), *sums)
    return moment.reshape(-1, width, width), count.reshape(-1)


def _moment(product: Dot, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the second moment, (matrices, inputs, inputs), and 1 for the product."""
    del product
    largest = jnp.max(jnp.abs(x), (1, 2), initial=0)
    signed = jnp.abs(jnp.max(x, (1, 2), initial=-jnp.inf))
    divisor = jnp.where(signed > 1e-6 * largest, signed, largest)
    empty = divisor == 0
    x = x / jnp.where(empty, 1, divisor)[:, None, None]
    moment = jnp.matmul(jnp.swapaxes(x, 1, 2), x, precision="highest")
    return moment, jnp.where(empty, 0, 1).astype(jnp.int32)
