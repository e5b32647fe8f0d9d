r"""EVA: one factor starts from the directions in which a layer's inputs vary most.

    S = sum (x - m)(x - m)^T = V L V^T over all rows x of a kernel's inputs with mean m,
    a = V_r,  b = 0,    ranks to the kernels whose directions explain the most, sum r unchanged

Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", 2024,
arXiv:2410.07170, section 3.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_lab import _checks
from jaxopt_lab.adapters import _inputs, _targets, _trace, lora
from jaxopt_lab.adapters._kernels import Kernel
from jaxopt_lab.adapters._trace import Dot, Record
from jaxopt_lab.adapters.adapt import AdapterConfig
from jaxopt_lab.adapters.lora import LoraConfig


def estimate_scatter(
    fun: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    config: AdapterConfig,
    *,
    mask: Callable[[Any], jax.Array] | None = None,
) -> dict[str, np.ndarray]:
    r"""Sums up how the inputs of each kernel vary about their mean, over all products with it.

    .. math::
      S = \sum_{i} (x_i - m)(x_i - m)^\top, \quad m = \frac{1}{N} \sum_i x_i

    The function is traced and its products with the kernels are found, as by `factored`. The sums
    are kept in the host's memory in float64: of each batch about its own mean, so that nothing is
    lost where the mean is large.

    Args:
      fun: `(params, batch) -> anything`; a loss or a forward pass.
      params: the parameters, in any container.
      batches: at least one.
      config: chooses the kernels.
      mask: `batch -> array` that is not zero for the rows that count, such as the tokens that are
        no padding: its axes are the first ones of every kernel's inputs, as (batch, time).

    Returns:
      A dictionary from the kernel's path to a float64 array (matrices, inputs, inputs); a kernel
      that is no stack is one matrix.

    Raises:
      ValueError: no batch; a kernel that no product was found for; a mask that does not fit a
        kernel's inputs; see `LoraConfig` for what concerns the choice of kernels.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1)
      >>> model = lambda params, x: x @ params["w"]
      >>> batch = jnp.array([[1.0, 0.0], [3.0, 0.0]])
      >>> adapters.estimate_scatter(model, {"w": jnp.eye(2)}, [batch], config)["w"].tolist()
      [[[2.0, 0.0], [0.0, 0.0]]]

    References:
      Paischer et al., `EVA <https://arxiv.org/abs/2410.07170>`_, 2024.
    """
    _inputs.check(config, batches, fun=fun)
    if mask is not None:
        _checks.check_function(mask=mask)
    kernels = config.kernels(params)

    @jax.jit
    def collect(params: Any, batch: Any) -> dict[str, list[Record]]:
        weights = None if mask is None else jnp.asarray(mask(batch) != 0)
        collector = _inputs.Collector(functools.partial(_varying, weights))
        return _trace.evaluate(fun, params, kernels, {}, collector, batch)[1]

    sums: dict[str, _Rows] = {}
    by_name = {kernel.name: kernel for kernel in kernels}
    batch = None
    for batch in batches:
        for name, records in collect(params, batch).items():
            before = [sums[name]] if name in sums else []
            parts = (_split(by_name[name], record) for record in records)
            sums[name] = _joined([*before, *itertools.chain.from_iterable(parts)])
    if batch is None:
        raise ValueError("estimate_scatter needs at least one batch, got none")
    for kernel in kernels:
        if kernel.name not in sums:
            raise ValueError(
                f"estimate_scatter found no product that sums over the inputs of kernel "
                f"'{kernel.name}' (a convolution or a table is none): use exclude_modules"
            )
    return {kernel.name: sums[kernel.name].scatter for kernel in kernels}


def eva(
    scatter: Mapping[str, Any],
    config: LoraConfig,
    *,
    rho: float = 2.0,
    whiten: bool = False,
    adjust_scaling_factors: bool = True,
) -> tuple[LoraConfig, Callable[..., tuple[jax.Array, jax.Array]]]:
    r"""Starts `a` from the principal directions of the inputs, and shares out the ranks by them.

    .. math::
      S = V \Lambda V^\top, \quad a = V_r, \quad b = 0

    All directions of all kernels are ordered by the share of their kernel's variance that they
    explain, and as many of them as the config has ranks in all are kept: a kernel gets from 0, with
    which it has no adapter, to rho r. A kernel that is a stack has one rank, by the mean share of
    its matrices, each of which it costs. The base stays as it is.

    Args:
      scatter: from `estimate_scatter`, of the kernels that `config` chooses.
      config: its ranks are shared out anew.
      rho: at least 1; bound of a kernel's rank as a multiple of its own; 1 leaves all ranks alone.
      whiten: divide each direction by the root of its singular value, :math:`\Lambda^{1/4}`.
      adjust_scaling_factors: change alpha with the rank, so that alpha / r stays.

    Returns:
      The config with the new ranks, and the start that goes with it: `init_adapters(params, config,
      init=init)`. It draws nothing.

    Raises:
      ValueError: rho below 1, a scatter that is no array (matrices, inputs, inputs), inputs that do
        not vary; at init, kernels that are not those of the new config.
      TypeError: a `config` that is no `LoraConfig`, a `scatter` that is no dict, a flag that is
        none.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1)
      >>> scatter = {"w": jnp.diag(jnp.array([1.0, 5.0, 2.0]))[None]}  # the second input varies
      >>> config, init = adapters.eva(scatter, config)
      >>> _, lora = adapters.init_adapters({"w": jnp.eye(3)}, config, init=init)
      >>> lora["w"]["lora_a"].ravel()
      Array([0., 1., 0.], dtype=float32)

    References:
      Paischer et al., `EVA <https://arxiv.org/abs/2410.07170>`_, 2024.
    """
    if type(config) is not LoraConfig:
        raise TypeError(f"config must be a LoraConfig, got {type(config).__name__}")
    if not isinstance(scatter, Mapping) or not scatter:
        found = "nothing" if isinstance(scatter, Mapping) else type(scatter).__name__
        raise TypeError(f"scatter must be a dict from estimate_scatter, by kernel, got {found}")
    _checks.check_flag(whiten=whiten, adjust_scaling_factors=adjust_scaling_factors)
    _checks.check_finite(rho=rho)
    if rho < 1:
        raise ValueError(f"rho must be at least 1, got {rho}")
    found = {name: _directions(name, value) for name, value in scatter.items()}
    ranks = _ranks({n: shares for n, (_, _, shares) in found.items()}, scatter, config, rho)
    alphas = {}
    for name, rank in ranks.items():
        alphas[name] = _targets.by_pattern(name, config.alpha_pattern, config.lora_alpha)
        alphas[name] *= rank / config.rank(name) if adjust_scaling_factors else 1
    config = lora.of_kernels(config, {n: rank for n, rank in ranks.items() if rank}, alphas)
    return config, _Start(found, ranks, whiten)


@dataclasses.dataclass(frozen=True, eq=False)
class _Start:
    """The start of `eva`."""

    found: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
    ranks: Mapping[str, int]
    whiten: bool
    keeps_base = True

    def __call__(
        self, kernel: Kernel, matrices: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del key
        count, fan_in, fan_out = matrices.shape
        if self.ranks.get(kernel.name) != kernel.r:
            raise ValueError(
                f"eva: kernel '{kernel.name}' has r={kernel.r}, and the directions are for r="
                f"{self.ranks.get(kernel.name, 0)}: use the config that eva returns"
            )
        directions, singular, _ = self.found[kernel.name]
        if directions.shape[:2] != (count, fan_in):
            raise ValueError(
                f"eva: the scatter of the inputs of kernel '{kernel.name}' is of shape "
                f"{directions.shape}; expected {(count, fan_in, fan_in)}"
            )
        a = directions[..., : kernel.r]
        if self.whiten:
            a = a / np.sqrt(singular[:, None, : kernel.r])
        return jnp.asarray(a, matrices.dtype), jnp.zeros((count, kernel.r, fan_out), matrices.dtype)


def _directions(name: str, scatter: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns directions (matrices, inputs, inputs), singular values and the mean shares."""
    value = np.asarray(scatter, np.float64)
    if value.ndim != 3 or value.shape[1] != value.shape[2]:
        raise ValueError(
            f"eva: the scatter of '{name}' has shape {value.shape}; expected (matrices, inputs, "
            "inputs), as from estimate_scatter"
        )
    if not (np.isfinite(value).all() and (np.trace(value, axis1=1, axis2=2) > 0).all()):
        raise ValueError(f"eva: the inputs of kernel '{name}' do not vary, or are not finite")
    variances, vectors = np.linalg.eigh(value)
    variances, vectors = np.maximum(variances[:, ::-1], 0), vectors[:, :, ::-1]
    shares = (variances / variances.sum(1, keepdims=True)).mean(0)
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(1)[:, None], 1)
    return vectors * np.sign(largest), np.sqrt(variances), shares


def _ranks(
    shares: Mapping[str, np.ndarray], scatter: Mapping[str, Any], config: LoraConfig, rho: float
) -> dict[str, int]:
    """Gives the ranks of all kernels to the directions that explain most."""
    cost = {name: len(scatter[name]) for name in shares}
    left = sum(config.rank(name) * cost[name] for name in shares)
    candidates = [
        (share, name)
        for name, all_shares in shares.items()
        for share in all_shares[: round(config.rank(name) * rho)]
    ]
    ranks = dict.fromkeys(shares, 0)
    closed = set()
    # Of equal ones the first in the tree, as sorting is stable.
    for _, name in sorted(candidates, key=lambda candidate: -candidate[0]):
        if cost[name] > left:
            closed.add(name)
        if name not in closed:
            ranks[name] += 1
            left -= cost[name]
    return ranks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """How some rows vary; with axes in front for matrices."""

    count: Any  # (...)
    mean: Any  # (..., inputs)
    scatter: Any  # (..., inputs, inputs)


def _split(kernel: Kernel, record: Record) -> list[_Rows]:
    """Returns what each repetition of a product has recorded, for (matrices,) each."""
    width = kernel.matrix[0]
    count, mean, scatter = (np.asarray(x, np.float64) for x in jax.tree.leaves(record.value))
    times = int(np.prod(count.shape[: record.repeats], dtype=np.int64))
    shape = times, kernel.count
    arrays = (
        count.reshape(shape),
        mean.reshape(*shape, width),
        scatter.reshape(*shape, width, width),
    )
    return [_Rows(*one) for one in zip(*arrays)]


def _joined(parts: list[_Rows]) -> _Rows:
    """Returns how all rows vary about the mean of all."""
    count = sum(part.count for part in parts)
    some = np.maximum(count, 1)[:, None]
    mean = sum(part.count[:, None] * part.mean for part in parts) / some
    scatter = sum(part.scatter for part in parts)
    for part in parts:
        apart = part.mean - mean
        scatter = scatter + part.count[:, None, None] * apart[:, :, None] * apart[:, None]
    return _Rows(count, mean, scatter)


def _varying(mask: jax.Array | None, product: Dot, x: jax.Array) -> _Rows:
    """Returns how the inputs vary, for each matrix."""
    weights = _weights(mask, product).astype(x.dtype)
    count = jnp.broadcast_to(jnp.sum(weights), x.shape[:1])
    counts = weights[:, None] > 0
    mean = jnp.sum(jnp.where(counts, x, 0), 1) / jnp.maximum(count, 1)[:, None]
    apart = jnp.where(counts, x - mean[:, None], 0)
    scatter = jnp.matmul(jnp.swapaxes(apart, 1, 2), apart, precision="highest")
    return _Rows(count, mean, scatter)


def _weights(mask: jax.Array | None, product: Dot) -> jax.Array:
    """Returns 1 for the rows that count, (rows,)."""
    taken = (*product.x_batch, *product.x_inputs)
    middle = [n for axis, n in enumerate(product.x.shape) if axis not in taken]
    if mask is None:
        return jnp.ones(int(np.prod(middle, dtype=np.int64)))
    shape = mask.shape
    if list(shape) != middle[: len(shape)]:
        raise ValueError(
            f"the mask has shape {shape}; the inputs of kernel '{product.kernel.kernel.name}' "
            f"have the axes {tuple(middle)} beside those that the kernel sums over"
        )
    whole = mask.reshape(*shape, *[1] * (len(middle) - len(shape)))
    return jnp.broadcast_to(whole, middle).reshape(-1)
