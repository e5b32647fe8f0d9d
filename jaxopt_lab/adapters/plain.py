r"""Adapters that changed their base, as plain LoRA of twice the rank on the original.

    K_0 + s a b = K + s (a b - a_0 b_0) = K + s [a, a_0] [b; -b_0]

Meng, Wang and Zhang, "PiSSA", NeurIPS 2024, arXiv:2404.02948, appendix C.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxopt_lab import _tree
from jaxopt_lab.adapters import _kernels
from jaxopt_lab.adapters.adapt import AdapterBase, parts, require_apart
from jaxopt_lab.adapters.lora import LoraConfig


def to_plain_lora(
    base: AdapterBase, adapters: Mapping[str, Any], initial: Mapping[str, Any]
) -> tuple[AdapterBase, dict[str, Any]]:
    r"""Converts adapters with a computed start (PiSSA, OLoRA, CorDA, LoRA-GA) to plain LoRA.

    .. math::
      K_0 + s\, a b = K + s\, [a, a_0]\, [b; -b_0]

    The result acts on the original parameters, so that it can be shared, and combined with others.

    Args:
      base: from `init_adapters`.
      adapters: the trained factors.
      initial: the factors that `init_adapters` returned with this base; keep them.

    Returns:
      A base with the original kernels, up to one rounding of their dtype, and factors of rank 2 r
      with the same scaling, for `apply_adapters` and `write_peft_folder`.

    Raises:
      TypeError: `base` is not from `init_adapters`.
      ValueError: adapters that are merged, not LoRA, of DoRA, or of another rank than `initial`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from jaxopt_lab import adapters
      >>> params = {"w": jnp.diag(jnp.array([4.0, 1.0]))}
      >>> config = adapters.LoraConfig(target_modules=["w"], r=1)
      >>> base, initial = adapters.init_adapters(params, config, init=adapters.pissa())
      >>> plain, factors = adapters.to_plain_lora(base, initial, initial)
      >>> jnp.diagonal(plain.params["w"]).round(5), factors["w"]["lora_a"].shape
      (Array([4., 1.], dtype=float32), (2, 2))
    """
    require_apart(base, "to_plain_lora")
    config = base.config
    if type(config) is not LoraConfig or config.use_dora:  # a PerpConfig is another function
        raise ValueError(
            "to_plain_lora converts LoRA: MiSS and PERP do not change their base, and the "
            "magnitudes of DoRA belong to the adapted kernel"
        )
    new: dict[str, Any] = {}
    restored = {}
    leaves = _kernels.named_leaves(base.params)
    (factors, whole), (first, _) = parts(base, adapters), parts(base, initial)
    for name, value in whole.items():
        _kernels.insert(new, name, value)
    for kernel in base.kernels:
        (a, b), (a_0, b_0) = (kernel.stacks(tree[kernel.name]) for tree in (factors, first))
        pair = kernel.pair(jnp.concatenate([a, a_0], -1), jnp.concatenate([b, -b_0], -2))
        _kernels.insert(new, kernel.name, pair)
        leaf = jnp.asarray(leaves[kernel.name])
        dtype = _tree.compute_dtype(leaf.dtype, a_0.dtype)
        start = {name: x.astype(dtype) for name, x in first[kernel.name].items()}
        kernel_before = leaf.astype(dtype) + kernel.scaling * kernel.change(start)
        restored[kernel.name] = kernel_before.astype(leaf.dtype)
    original = AdapterBase(
        _kernels.replace_leaves(base.params, restored),
        {},
        _of_rank(config, 2),
        tuple(kernel._replace(r=2 * kernel.r) for kernel in base.kernels),
        whole=base.whole,
    )
    return original, new


def _of_rank(config: LoraConfig, times: int) -> LoraConfig:
    """Returns the config with `times` the rank and the same scaling."""
    more = math.sqrt(times) if config.use_rslora else times
    return dataclasses.replace(
        config,
        r=times * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern={name: times * r for name, r in config.rank_pattern.items()},
        alpha_pattern={name: more * alpha for name, alpha in config.alpha_pattern.items()},
        init_lora_weights=True,
    )
