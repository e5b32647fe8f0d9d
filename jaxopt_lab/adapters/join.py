r"""Several LoRA adapters as one, whose change of each kernel is the weighted sum of theirs.

    sum_t w_t s_t a_t b_t = [w_1 s_1 a_1, w_2 s_2 a_2, ...] [b_1; b_2; ...]

or the best approximation of it of a given rank. These are "cat" and "svd" of the adapters' library
`peft` (`add_weighted_adapter`); the truncation is that of Eckart and Young, Psychometrika 1, 1936.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxopt_lab import _checks, _matrices, _tree
from jaxopt_lab.adapters import _kernels, _svd, _targets, _task_vectors, lora
from jaxopt_lab.adapters._kernels import Factors, Kernel
from jaxopt_lab.adapters.adapt import AdapterBase, parts, require_apart
from jaxopt_lab.adapters.lora import LoraConfig

CombinationType = Literal["cat", "svd"]
Pair = tuple[jax.Array, jax.Array]


def join_adapters(
    base: AdapterBase | Sequence[AdapterBase],
    adapters: Sequence[Mapping[str, Any]],
    weights: Any,
    combination_type: CombinationType = "cat",
    *,
    svd_rank: int | None = None,
) -> tuple[AdapterBase, dict[str, Any]]:
    r"""Makes one adapter of several, whose change of each kernel is the weighted sum of theirs.

    .. math::
      \Delta = \sum_t w_t s_t\, a_t b_t

    "cat" is exact: factors stand side by side and ranks add up. "svd" is the best approximation of
    rank `svd_rank` in the Frobenius norm, exact from the sum of the ranks on, and is had from the
    factors alone (two orthogonal-triangular decompositions, and a singular value decomposition of
    the size of the ranks). Ranks, scalings and kernels may differ between the adapters; leaves that
    are trained whole become the base's own plus the weighted sum of their changes.

    Args:
      base: from `init_adapters`, one for all adapters or a list with one for each; the parameters
        are those of the first, and must be the same in all.
      adapters: the trained adapters, at least one.
      weights: :math:`w_t`, `(adapters,)`, a list of numbers or an array, of either sign.
      combination_type: "cat" or "svd".
      svd_rank: of "svd", the largest rank of a kernel; by default that of the adapters.

    Returns:
      A base with a config of the new ranks and scaling 1, and its adapters, at least float32.

    Raises:
      TypeError: a base that is not from `init_adapters`.
      ValueError: an unknown combination, `svd_rank` with "cat", another number of bases or weights;
        adapters that are merged, not LoRA, of DoRA, or whose start has changed the base
        (`to_plain_lora` converts them); parameters or axes that differ; a kernel that is trained
        whole in one adapter and has factors in another.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1, lora_alpha=2)
      >>> base, lora = adapters.init_adapters({"w": jnp.zeros((2, 2))}, config, jax.random.key(0))
      >>> one, two = (jax.tree.map(lambda x: 0 * x + c, lora) for c in (1.0, 2.0))
      >>> joined, both = adapters.join_adapters(base, [one, two], [0.5, 0.25])
      >>> both["w"]["lora_a"].shape, adapters.apply_adapters(joined, both)["w"].tolist()
      ((2, 2), [[3.0, 3.0], [3.0, 3.0]])

    References:
      `peft <https://huggingface.co/docs/peft>`_, `LoraModel.add_weighted_adapter`.
    """
    _check_type(combination_type, svd_rank)
    if not isinstance(base, (AdapterBase, list, tuple)):
        _check_base(base)
    if not isinstance(adapters, (list, tuple)):
        raise TypeError(
            f"adapters must be a list of adapters of one model, got {type(adapters).__name__}"
        )
    bases = [base] * len(adapters) if isinstance(base, AdapterBase) else list(base)
    if not adapters or len(bases) != len(adapters):
        raise ValueError(
            "join_adapters needs adapters, and one base for all or one for each; got "
            f"{len(adapters)} adapters and {len(bases)} bases"
        )
    for one in bases:
        _check_base(one)
    first = bases[0]
    leaves = _kernels.named_leaves(first.params)
    _check_alike(bases, {name: jnp.shape(leaf) for name, leaf in leaves.items()})
    weights = _task_vectors.check_weights(weights, len(adapters))
    taken_apart = [parts(*pair) for pair in zip(bases, adapters)]

    new: dict[str, Any] = {}
    kernels = []
    for name in _in_order(leaves, [kernel for one in bases for kernel in one.kernels]):
        members = [
            (kernel, factors[name], weight)
            for one, (factors, _), weight in zip(bases, taken_apart, weights)
            for kernel in one.kernels
            if kernel.name == name
        ]
        kernel, a, b = _side_by_side(members)
        if combination_type == "svd":
            rank = max(k.r for k, _, _ in members) if svd_rank is None else svd_rank
            a, b = _truncated(a, b, min(rank, a.shape[-1], *kernel.matrix))
        kernels.append(kernel._replace(r=a.shape[-1], scaling=1.0))
        _kernels.insert(new, name, kernels[-1].pair(a, b))
    whole = tuple(name for name in leaves if any(name in one.whole for one in bases))
    for name in whole:
        changed = [found.get(name) for _, found in taken_apart]
        _kernels.insert(new, name, _moved(leaves[name], changed, weights))
    config = _config([one.config for one in bases], kernels)
    return AdapterBase(first.params, {}, config, tuple(kernels), whole=whole), new


def _side_by_side(
    members: Sequence[tuple[Kernel, Factors, jax.Array]],
) -> tuple[Kernel, jax.Array, jax.Array]:
    """Returns one kernel's factors of all adapters, the weights and scalings in those of inputs."""
    dtype = _tree.compute_dtype(*(x.dtype for _, factors, _ in members for x in factors.values()))
    left, right = [], []
    for kernel, factors, weight in members:
        a, b = (x.astype(dtype) for x in kernel.stacks(factors))
        left.append(weight.astype(dtype) * kernel.scaling * a)
        right.append(b)
    return members[0][0], jnp.concatenate(left, -1), jnp.concatenate(right, -2)


def _truncated(a: jax.Array, b: jax.Array, rank: int) -> Pair:
    """Returns factors of the best approximation of a b, (matrices, inputs, r), (.., r, outputs)."""
    left, upper = jnp.linalg.qr(a)
    right, lower = jnp.linalg.qr(jnp.swapaxes(b, -1, -2))
    core = _kernels.product(upper, jnp.swapaxes(lower, -1, -2))
    u, s, vt = _svd.leading(core, rank, "full")
    root = jnp.sqrt(s)
    new_a = _kernels.product(left, u) * root[:, None, :]
    return new_a, root[:, :, None] * _kernels.product(vt, jnp.swapaxes(right, -1, -2))


def _moved(leaf: Any, changed: Sequence[Any], weights: jax.Array) -> jax.Array:
    """Returns a leaf plus the weighted changes of those adapters that have it."""
    leaf = jnp.asarray(leaf)
    there = [(x, weight) for x, weight in zip(changed, weights) if x is not None]
    moves = _task_vectors.differences(leaf, [x for x, _ in there])
    dtype = moves[0].dtype
    total = sum(weight.astype(dtype) * move for move, (_, weight) in zip(moves, there))
    return (leaf.astype(dtype) + total).astype(jnp.result_type(*(x for x, _ in there)))


def _config(configs: Sequence[LoraConfig], kernels: Sequence[Kernel]) -> LoraConfig:
    """Returns the first config, of these kernels."""
    saved = {entry: None for config in configs for entry in config.modules_to_save or ()}
    biases = {config.bias for config in configs}
    bias = next((b for b in ("all", "lora_only") if b in biases), "none")
    axes = {_targets.exactly(k.name): k.axes for k in kernels if len(k.shape) > 2}
    config = dataclasses.replace(
        configs[0],
        use_rslora=False,
        bias=bias,
        modules_to_save=tuple(saved) or None,
        kernel_axes={name: _matrices.specification(own) for name, own in axes.items()} or None,
    )
    ranks = {kernel.name: kernel.r for kernel in kernels}
    return lora.of_kernels(config, ranks, ranks)


def _in_order(leaves: Mapping[str, Any], kernels: Sequence[Kernel]) -> list[str]:
    """Returns the names of the kernels in the order of the tree."""
    names = {kernel.name for kernel in kernels}
    return [name for name in leaves if name in names]


def _check_type(combination_type: str, svd_rank: int | None) -> None:
    if combination_type not in get_args(CombinationType):
        raise ValueError(
            f"combination_type must be 'cat' or 'svd', got {combination_type!r}: the others of "
            "peft multiply factors of one adapter with those of another; task_arithmetic, "
            "ties_merge and breadcrumbs_merge take whole parameters, as from merge_adapters"
        )
    if svd_rank is not None:
        _checks.check_positive_integer(svd_rank=svd_rank)
        if combination_type == "cat":
            raise ValueError("svd_rank is of combination_type='svd'; 'cat' adds up the ranks")


def _check_base(base: Any) -> None:
    require_apart(base, "join_adapters")
    if type(base.config) is not LoraConfig or base.config.use_dora:
        what = "DoRA" if getattr(base.config, "use_dora", False) else type(base.config).__name__
        raise ValueError(
            f"join_adapters joins LoRA, whose changes of a kernel add up, got adapters of {what}"
        )
    if base.gave_up:
        raise ValueError(
            "join_adapters: the start of these adapters has changed their base; convert them with "
            "to_plain_lora, so that all act on the same parameters"
        )


def _check_alike(bases: Sequence[AdapterBase], shapes: Mapping[str, tuple[int, ...]]) -> None:
    seen: dict[str, Kernel] = {}
    for index, base in enumerate(bases):
        own = {n: jnp.shape(leaf) for n, leaf in _kernels.named_leaves(base.params).items()}
        for name in [*shapes, *own]:
            if own.get(name) != shapes.get(name):
                raise ValueError(
                    f"join_adapters: base {index} has shape {own.get(name)} at '{name}', the first "
                    f"{shapes.get(name)}; all adapters must be of the same parameters"
                )
        for kernel in base.kernels:
            if seen.setdefault(kernel.name, kernel).axes != kernel.axes:
                raise ValueError(
                    f"join_adapters: base {index} has other axes for kernel '{kernel.name}', "
                    f"{kernel.axes} instead of {seen[kernel.name].axes}"
                )
    for name in seen:
        if any(name in base.whole for base in bases):
            raise ValueError(
                f"join_adapters: kernel '{name}' is trained whole in one adapter and has factors "
                "in another"
            )
