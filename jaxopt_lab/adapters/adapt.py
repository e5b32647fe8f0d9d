r"""Adapters of parameter trees: kernels stay as they are, small factors beside them are trained.

    theta' = apply(base, adapters),      d loss / d adapters  alone

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxopt_lab import _checks, _compat, _flax, _tree
from jaxopt_lab.adapters import _kernels, _targets, _whole
from jaxopt_lab.adapters._kernels import Factors, Kernel

Initializer = Callable[[Kernel, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""A start of low-rank factors: `(kernel, matrices, key) -> (a, b)`.

`matrices` has shape (matrices, inputs, outputs) and is at least float32; `a` is (matrices, inputs,
r) and `b` (matrices, r, outputs). What is taken out of the base is `kernel.scaling * a @ b`; an
initialiser whose product is zero has an attribute `keeps_base` that is true.
"""


class AdapterConfig(Protocol):
    """What `init_adapters` can make: `LoraConfig`, `PerpConfig` and `MissConfig`; hashable.

    Its methods are given `params`, the parameters of the model; a `kernel`, with its path, axes,
    rank and scaling; `matrices`, its values as (matrices, inputs, outputs), or `whole`, those with
    its own axes, both at least float32; its `factors` by name; `undo`, what the method of that name
    returned; `init`, the start that `init_adapters` was given, and `key`, its random key.
    """

    @property
    def additive(self) -> bool:
        """Whether the layer uses K + s a b, which `factored` can split."""
        ...

    @property
    def adapter_dtype(self) -> Any:
        """Dtype of the factors, or None for the widest of float32 and the kernel's."""
        ...

    @property
    def bias(self) -> _whole.Bias:
        """Which biases are trained whole."""
        ...

    @property
    def modules_to_save(self) -> Sequence[str] | None:
        """Which modules are trained whole."""
        ...

    def kernels(self, params: Any) -> tuple[Kernel, ...]:
        """Returns the kernels that get an adapter."""
        ...

    def shapes(self, kernel: Kernel) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each factor of a kernel, by name."""
        ...

    def start(
        self, kernel: Kernel, matrices: jax.Array, key: jax.Array | None, init: Initializer | None
    ) -> Factors:
        """Returns the first factors of one kernel."""
        ...

    def changes_base(self, init: Initializer | None) -> bool:
        """Whether the base gives up what the first factors add."""
        ...

    def effective(self, kernel: Kernel, whole: jax.Array, factors: Factors) -> jax.Array:
        """Returns the kernel that the layer uses."""
        ...

    def merged(self, kernel: Kernel, whole: jax.Array, factors: Factors) -> jax.Array:
        """Returns the kernel to use without adapters; for most, the effective one."""
        ...

    def undo(self, kernel: Kernel, whole: jax.Array, factors: Factors) -> Any:
        """Returns what `restored` needs beside the merged kernel, or None."""
        ...

    def restored(self, kernel: Kernel, whole: jax.Array, factors: Factors, undo: Any) -> jax.Array:
        """Returns the base's kernel from the merged one."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AdapterBase:
    """The parameters that are not trained, and how adapters act on them; a pytree.

    Attributes:
      params: the caller's container; the kernels of an initialisation that computes its start
        (PiSSA, OLoRA, CorDA, LoRA-GA) have given up what the first factors add.
      undo: by path, what unmerging needs beside the adapters; empty for most.
      config: the `LoraConfig`, `PerpConfig` or `MissConfig`.
      kernels: the kernels that have adapters, with their axes, rank and scaling.
      merged: whether adapters are part of `params`.
      gave_up: whether the kernels have given up what the first factors added.
      whole: the paths of the leaves that are trained whole (biases, saved modules). The adapters
        have their full value, `params` that from before.
    """

    params: Any
    undo: dict[str, Any]
    config: Any = dataclasses.field(metadata={"static": True})
    kernels: tuple[Kernel, ...] = dataclasses.field(metadata={"static": True})
    merged: bool = dataclasses.field(default=False, metadata={"static": True})
    gave_up: bool = dataclasses.field(default=False, metadata={"static": True})
    whole: tuple[str, ...] = dataclasses.field(default=(), metadata={"static": True})


_flax.register(AdapterBase, ["params", "undo"])


def init_adapters(
    params: Any,
    config: AdapterConfig,
    key: jax.Array | None = None,
    *,
    init: Initializer | None = None,
) -> tuple[AdapterBase, dict[str, Any]]:
    r"""Makes adapters for the kernels that `config` chooses.

    With a start that is computed (`init` other than that of `eva`, or a name such as "pissa") the
    base gives up what the factors add, :math:`K_0 = K - s a b`, computed in at least float32 from
    the factors as they are stored, and rounded once to the kernel's dtype: the function stays the
    same. The container, its other leaves and their shardings stay.

    Args:
      params: tree of real floating point parameters: nested dictionaries, Linen's `params`, an NNX
        module or `nnx.state(model, nnx.Param)`.
      config: a `LoraConfig`, a `PerpConfig` or a `MissConfig`.
      key: random key; what draws nothing does without.
      init: for a `LoraConfig`, a start that is computed: `pissa()`, `olora()`,
        `lora_ga(gradients)`, `corda(covariances)`, that of `eva`, or a function of one's own.

    Returns:
      The base, for `apply_adapters`, and the adapters: a tree of nested dictionaries with the paths
      of the kernels, which is what is trained. For LoRA each kernel has `lora_a`, shape (batch...,
      inputs..., r), and `lora_b`, (batch..., r, outputs...), at least float32. Leaves that are
      trained whole (`bias`, `modules_to_save`) are there as copies, of their own dtype unless
      `config.adapter_dtype` names one.

    Raises:
      ValueError: adapters on adapters; patterns that match nothing, with the nearest paths; axes
        that are not known; for a computed start, a rank above the smaller side of a kernel.
      TypeError: a kernel that is not real floating point.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_lab import adapters
      >>> params = {"dense": {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}}
      >>> config = adapters.LoraConfig(target_modules=["dense"], r=2)
      >>> base, lora = adapters.init_adapters(params, config, jax.random.key(0))
      >>> jax.tree.map(jnp.shape, lora)
      {'dense': {'kernel': {'lora_a': (4, 2), 'lora_b': (2, 4)}}}
      >>> def loss(lora):
      ...     params = adapters.apply_adapters(base, lora)
      ...     return jnp.sum(params["dense"]["kernel"] ** 2)
      >>> tx = optax.adam(1e-3)  # its state is that of the adapters
      >>> updates, state = tx.update(jax.grad(loss)(lora), tx.init(lora))

    References:
      Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, ICLR 2022.
    """
    if isinstance(params, AdapterBase):
        raise ValueError(
            "these parameters have adapters already; merge them (merge_adapters(...).params) to "
            "start others on top"
        )
    _targets.check_config(config)
    if init is not None:
        _checks.check_function(init=init)
    kernels = config.kernels(params)
    names = _whole.leaves(params, config, kernels)
    leaves = _kernels.named_leaves(params)
    adapters: dict[str, Any] = {}
    rests = {}
    for name, value in _whole.of(params, names, config.adapter_dtype).items():
        _kernels.insert(adapters, name, value)
    for index, kernel in enumerate(kernels):
        leaf = jnp.asarray(leaves[kernel.name])
        dtype = _tree.compute_dtype(leaf.dtype)
        matrices = kernel.matrices(leaf.astype(dtype))
        own = None if key is None else jax.random.fold_in(key, index)
        target = jnp.dtype(config.adapter_dtype or dtype)
        start = config.start(kernel, matrices, own, init)
        _kernels.check_factors(start, kernel.name, config.shapes(kernel), "the start gives")
        # The kernel gives up what the factors add as they are stored.
        stored = {name: _compat.rounded(x.astype(dtype), target) for name, x in start.items()}
        factors = {name: x.astype(target) for name, x in stored.items()}
        _kernels.insert(adapters, kernel.name, factors)
        if config.changes_base(init):
            change = kernel.change(stored)
            rest = leaf.astype(dtype) - kernel.scaling * change
            rests[kernel.name] = _placed_like(rest.astype(leaf.dtype), leaf)
    base = AdapterBase(
        _kernels.replace_leaves(params, rests),
        {},
        config,
        kernels,
        gave_up=bool(rests),
        whole=names,
    )
    return base, adapters


def apply_adapters(base: AdapterBase, adapters: Mapping[str, Any]) -> Any:
    r"""Returns the parameters that the model is to use: with LoRA, :math:`K + s a b`.

    Differentiate with respect to `adapters`: nothing of the base has a gradient. The adapted
    kernels are in the kernels' dtype, and are kept for the backward pass; `factored` does the same
    without making them.

    Args:
      base: from `init_adapters`.
      adapters: the factors, from `init_adapters` or trained.

    Returns:
      Parameters in the container given to `init_adapters`.

    Raises:
      TypeError: `base` is not from `init_adapters`.
      ValueError: the adapters are merged into the base, or are for other parameters or of another
        rank; a config with `lora_dropout`.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1, lora_alpha=2)
      >>> base, lora = adapters.init_adapters({"w": jnp.zeros((2, 2))}, config, jax.random.key(0))
      >>> ones = jax.tree.map(jnp.ones_like, lora)
      >>> adapters.apply_adapters(base, ones)["w"]
      Array([[2., 2.],
             [2., 2.]], dtype=float32)
    """
    require_apart(base, "apply_adapters")
    rate = getattr(base.config, "lora_dropout", 0.0)
    if rate:
        raise ValueError(
            f"apply_adapters has no dropout, and the config has lora_dropout={rate}, which acts on "
            "the inputs of each layer: train with factored(fun)(base, adapters, ..., key=key), and "
            "evaluate with factored without a key or with merge_adapters"
        )
    return _edited(base, *parts(base, adapters), base.config.effective)


def merge_adapters(base: AdapterBase, adapters: Mapping[str, Any]) -> AdapterBase:
    """Folds the adapters into the base, for use without them.

    Args:
      base: from `init_adapters`.
      adapters: the factors.

    Returns:
      A base whose `params` are the parameters to use, and which `unmerge_adapters` takes back.

    Raises:
      TypeError: `base` is not from `init_adapters`.
      ValueError: the adapters are merged already, or are for other parameters.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1)
      >>> base, lora = adapters.init_adapters({"w": jnp.eye(2)}, config, jax.random.key(0))
      >>> merged = adapters.merge_adapters(base, lora)
      >>> merged.params["w"]
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    require_apart(base, "merge_adapters")
    leaves = _kernels.named_leaves(base.params)
    factors, whole = parts(base, adapters)
    undo = {name: leaves[name] for name in base.whole}
    for kernel in base.kernels:
        operands = _operands(leaves[kernel.name], factors[kernel.name])
        found = base.config.undo(kernel, *operands)
        if found is not None:
            undo[kernel.name] = found
    # A merged base outlives adapters that are donated to a next step.
    copies = {name: jnp.copy(x) for name, x in whole.items()}
    params = _edited(base, factors, copies, base.config.merged)
    return dataclasses.replace(base, params=params, undo=undo, merged=True)


def unmerge_adapters(base: AdapterBase, adapters: Mapping[str, Any]) -> AdapterBase:
    """Takes the adapters out of the base again, up to one rounding of its dtype.

    Args:
      base: from `merge_adapters`.
      adapters: the factors that were merged.

    Returns:
      The base, for `apply_adapters`. Keep the one that was merged where its exact bits matter.

    Raises:
      TypeError: `base` is not from `merge_adapters`.
      ValueError: nothing is merged, or the adapters are for other parameters.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1)
      >>> base, lora = adapters.init_adapters({"w": jnp.eye(2)}, config, jax.random.key(0))
      >>> ones = jax.tree.map(jnp.ones_like, lora)
      >>> adapters.unmerge_adapters(adapters.merge_adapters(base, ones), ones).params["w"]
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """
    _require_base(base, "unmerge_adapters")
    if not base.merged:
        raise ValueError("unmerge_adapters: no adapters are merged into this base")

    def restored(kernel: Kernel, whole: jax.Array, factors: Factors) -> jax.Array:
        return base.config.restored(kernel, whole, factors, base.undo.get(kernel.name))

    whole = {name: base.undo[name] for name in base.whole}
    params = _edited(base, parts(base, adapters)[0], whole, restored)
    return dataclasses.replace(base, params=params, undo={}, merged=False)


def parts(
    base: AdapterBase, adapters: Mapping[str, Any]
) -> tuple[dict[str, Factors], dict[str, jax.Array]]:
    """Takes adapters apart, into the factors of each kernel and the leaves that are trained whole.

    Raises:
      ValueError: something is missing, has another shape, or belongs to nothing in the base; the
        message has its path.
    """
    shapes = {kernel.name: base.config.shapes(kernel) for kernel in base.kernels}
    factors = {name: _kernels.lookup(adapters, name) for name in shapes}
    for name, found in factors.items():
        _kernels.check_factors(found, name, shapes[name], "the adapters have")
    whole = {name: _kernels.lookup(adapters, name) for name in base.whole}
    leaves = _kernels.named_leaves(base.params) if whole else {}
    for name, leaf in whole.items():
        if _kernels.shape_of(leaf) != jnp.shape(leaves[name]):
            raise ValueError(
                f"the adapters have {_kernels.shown(leaf)} at '{name}', which is trained whole and "
                f"needs shape {jnp.shape(leaves[name])}"
            )
    known = {f"{name}/{factor}" for name in factors for factor in factors[name]} | set(whole)
    for name in _kernels.named_leaves(adapters):
        if name not in known:
            raise ValueError(
                f"the adapters have '{name}', for which the base has no place: were they made with "
                "another config?"
            )
    return factors, whole


def _edited(
    base: AdapterBase,
    factors: Mapping[str, Factors],
    whole: Mapping[str, jax.Array],
    rule: Callable[[Kernel, jax.Array, Factors], jax.Array],
) -> Any:
    """Puts what `rule` makes of the kernels, and `whole`, in the place of the base's leaves."""
    leaves = _kernels.named_leaves(base.params)
    new = {n: x.astype(leaves[n].dtype) for n, x in whole.items()}
    for kernel in base.kernels:
        leaf = jnp.asarray(leaves[kernel.name])
        operands = _operands(leaf, factors[kernel.name])
        new[kernel.name] = rule(kernel, *operands).astype(leaf.dtype)
    return _kernels.replace_leaves(base.params, new)


def _operands(leaf: jax.Array, factors: Factors) -> tuple[jax.Array, Factors]:
    """Returns the kernel and the factors in the dtype that is computed in."""
    leaf = jnp.asarray(leaf)
    dtype = _tree.compute_dtype(*(x.dtype for x in [leaf, *factors.values()]))
    return leaf.astype(dtype), {n: x.astype(dtype) for n, x in factors.items()}


def _placed_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Shards a concrete array like another one; a traced one is placed by the compiler."""
    return x if isinstance(like, Tracer) else jax.device_put(x, like.sharding)


def _require_base(base: Any, method: str) -> None:
    if not isinstance(base, AdapterBase):
        raise TypeError(
            f"{method} needs the base that init_adapters returned, got {type(base).__name__}: were "
            "adapters applied to it already?"
        )


def require_apart(base: Any, method: str) -> None:
    """Refuses what is no base, and a base that has adapters merged into it."""
    _require_base(base, method)
    if base.merged:
        raise ValueError(
            f"{method}: adapters are merged into this base already; unmerge_adapters takes them out"
        )
