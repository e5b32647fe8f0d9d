r"""The mean gradient of some batches, for the kernels that get adapters, kept on the host.

    G = 1 / N sum_b d loss(theta, batch_b) / d K

Wang, Yu and Li, "LoRA-GA", NeurIPS 2024, arXiv:2407.05000, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _checks
from jaxopt_lab.adapters import _inputs, _kernels
from jaxopt_lab.adapters.adapt import AdapterConfig


def estimate_gradients(
    loss: Callable[[Any, Any], jax.Array],
    params: Any,
    batches: Iterable[Any],
    config: AdapterConfig,
    *,
    kernels_at_once: int | None = None,
) -> dict[str, np.ndarray]:
    r"""Averages the gradient over batches, each of which has the same weight.

    .. math::
      \bar G = \frac{1}{N} \sum_{b=1}^N \nabla_K L_b

    The sums are kept in the host's memory, so that the device holds the gradients of one backward
    pass; with `kernels_at_once` only those of so many kernels, at the price of a pass for each
    group. Parameters without an adapter have no gradient at all.

    Args:
      loss: `(params, batch) -> scalar`, the mean loss of a batch; wrap what it calls in
        `jax.checkpoint` where activations do not fit.
      params: the parameters, in any container; they may be sharded.
      batches: at least one; a list if there is more than one group.
      config: chooses the kernels.
      kernels_at_once: how many kernels' gradients are alive on the device at once; None for all.

    Returns:
      A dictionary from the kernel's path to a float32 array (float64 for a float64 kernel) with the
      kernel's shape.

    Raises:
      ValueError: no batch; see `LoraConfig` for what concerns the kernels.
      TypeError: a loss that is no real scalar.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1)
      >>> loss = lambda params, x: jnp.sum(x @ params["w"])
      >>> batches = [jnp.array([[1.0, 2.0]]), jnp.array([[3.0, 0.0]])]
      >>> adapters.estimate_gradients(loss, {"w": jnp.ones((2, 1))}, batches, config)["w"].tolist()
      [[2.0], [1.0]]
    """
    _inputs.check(config, batches, loss=loss)
    kernels = config.kernels(params)
    if kernels_at_once is not None:
        _checks.check_positive_integer(kernels_at_once=kernels_at_once)
    at_once = kernels_at_once or len(kernels)
    groups = [kernels[i : i + at_once] for i in range(0, len(kernels), at_once)]
    leaves = _kernels.named_leaves(params)

    @jax.jit
    def gradient(selected: dict[str, jax.Array], params: Any, batch: Any) -> dict[str, jax.Array]:
        def of_selected(selected: dict[str, jax.Array]) -> jax.Array:
            return loss(_kernels.replace_leaves(params, selected), batch)

        return jax.grad(of_selected)(selected)

    sums: dict[str, np.ndarray] = {}
    count = 0
    for batch in batches if len(groups) == 1 else list(batches):
        count += 1
        for group in groups:
            found = gradient({k.name: leaves[k.name] for k in group}, params, batch)
            while found:
                name, value = found.popitem()
                wide = np.asarray(value.astype(jnp.promote_types(value.dtype, jnp.float32)))
                sums[name] = sums[name] + wide if name in sums else wide
    if not count:
        raise ValueError("estimate_gradients needs at least one batch, got none")
    return {kernel.name: sums[kernel.name] / count for kernel in kernels}
