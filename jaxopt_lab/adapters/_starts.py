"""How low-rank factors start, by the names that `peft` gives to `init_lora_weights`."""

from __future__ import annotations

import difflib
import math
import re

import jax
import jax.numpy as jnp

from jaxopt_lab.adapters import _kernels
from jaxopt_lab.adapters._kernels import Kernel
from jaxopt_lab.adapters.adapt import Initializer
from jaxopt_lab.adapters.olora import olora
from jaxopt_lab.adapters.pissa import pissa

Pair = tuple[jax.Array, jax.Array]
_NITER = re.compile(r"pissa_niter_(\d+)")
# Names of peft that say too little, and what to do.
_ELSEWHERE = {
    "eva": "it needs activations: config, init = adapters.eva(adapters.estimate_scatter(...), "
    "config), and init_adapters(..., init=init)",
    "corda": "it needs activations: init_adapters(..., init=adapters.corda("
    "adapters.estimate_covariances(...)))",
    "lora_ga": "it needs gradients: init_adapters(..., init=adapters.lora_ga("
    "adapters.estimate_gradients(...)))",
    "loftq": "it makes up for the rounding of a quantised base, and bases here are not quantised; "
    "a start from the kernel itself is 'pissa'",
    "mica": "it trains one factor beside another that is frozen, which is the optimizer's matter; "
    "give the start as a function, init_adapters(..., init=...)",
}


def check(name: bool | str) -> None:
    """Refuses what is no start that a config alone can make.

    Raises:
      TypeError: neither a bool nor text.
      ValueError: the message has the way that there is, or the nearest name.
    """
    if not isinstance(name, (bool, str)):
        raise TypeError(f"init_lora_weights must be True, False or a name, got {name!r}")
    if isinstance(name, bool) or name in _DRAWN or computed(name) is not None:
        return
    if name in _ELSEWHERE:
        raise ValueError(f"init_lora_weights={name!r} is no start by name here: {_ELSEWHERE[name]}")
    known = [*_DRAWN, "pissa", "pissa_niter_16", "olora", *_ELSEWHERE]
    near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.0)[0]
    raise ValueError(
        f"init_lora_weights must be True, False, {', '.join(map(repr, _DRAWN))}, 'pissa', "
        f"'pissa_niter_N' or 'olora', got {name!r}; the nearest is {near!r}, and a start of one's "
        "own is init_adapters(..., init=...)"
    )


def computed(name: bool | str) -> Initializer | None:
    """Returns the start of this name that is computed from the kernel, or None."""
    if name == "pissa":
        return pissa("full")
    if name == "olora":
        return olora()
    found = _NITER.fullmatch(str(name))
    return pissa("randomized", power_iterations=int(found.group(1))) if found else None


def drawn(name: bool | str) -> Initializer:
    """Returns the start of this name that is drawn."""
    return {True: _uniform, False: _both_uniform}[name] if isinstance(name, bool) else _DRAWN[name]


def _uniform(kernel: Kernel, matrices: jax.Array, key: jax.Array) -> Pair:
    count, fan_in, fan_out = matrices.shape
    if kernel.is_embedding:
        # The factor that is looked up starts at zero: an adapted embedding costs no rounding.
        b = jax.random.normal(key, (count, kernel.r, fan_out), matrices.dtype)
        return jnp.zeros((count, fan_in, kernel.r), matrices.dtype), b
    bound = 1 / math.sqrt(fan_in)
    a = jax.random.uniform(key, (count, fan_in, kernel.r), matrices.dtype, -bound, bound)
    return a, jnp.zeros((count, kernel.r, fan_out), matrices.dtype)


def _both_uniform(kernel: Kernel, matrices: jax.Array, key: jax.Array) -> Pair:
    """Neither factor is zero, so that the function starts changed."""
    count, fan_in, fan_out = matrices.shape
    shapes = (count, fan_in, kernel.r), (count, kernel.r, fan_out)
    keys = jax.random.split(key)
    if kernel.is_embedding:
        a, b = (jax.random.normal(k, s, matrices.dtype) for k, s in zip(keys, shapes))
        return a, b
    a, b = (
        jax.random.uniform(k, s, matrices.dtype, -1 / math.sqrt(s[1]), 1 / math.sqrt(s[1]))
        for k, s in zip(keys, shapes)
    )
    return a, b


def _gaussian(kernel: Kernel, matrices: jax.Array, key: jax.Array) -> Pair:
    count, fan_in, fan_out = matrices.shape
    if kernel.is_embedding:
        return _uniform(kernel, matrices, key)
    a = jax.random.normal(key, (count, fan_in, kernel.r), matrices.dtype) / kernel.r
    return a, jnp.zeros((count, kernel.r, fan_out), matrices.dtype)


def _orthogonal(kernel: Kernel, matrices: jax.Array, key: jax.Array) -> Pair:
    count, fan_in, fan_out = matrices.shape
    if kernel.r % 2:
        raise ValueError(
            f"init_lora_weights='orthogonal' halves the rank, which must be even; kernel "
            f"'{kernel.name}' has r={kernel.r}"
        )
    rotation, left, right = jax.random.split(key, 3)
    half, dtype = kernel.r // 2, matrices.dtype
    q = jnp.linalg.qr(jax.random.normal(rotation, (count, kernel.r, kernel.r), dtype))[0]
    a = _kernels.product(jax.random.normal(left, (count, fan_in, half), dtype), q[:, 0::2])
    odd = jnp.swapaxes(q[:, 1::2], -1, -2)
    b = _kernels.product(odd, jax.random.normal(right, (count, half, fan_out), dtype))
    return a / 10, b / 10


_DRAWN: dict[str, Initializer] = {"gaussian": _gaussian, "orthogonal": _orthogonal}
