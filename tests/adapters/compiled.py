"""Adapters and merges as one program a call: without jit every operation is compiled by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxopt_lab import adapters


def _compiled(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `fun(base, models, ...)` with its two trees traced and all else as it is."""

    @functools.wraps(fun)
    def call(base: Any, tuned: Any, *args: Any, **kwargs: Any) -> Any:
        return jax.jit(lambda base, tuned: fun(base, tuned, *args, **kwargs))(base, tuned)

    return call


task_vector = _compiled(adapters.task_vector)
task_arithmetic = _compiled(adapters.task_arithmetic)
ties_merge = _compiled(adapters.ties_merge)
breadcrumbs_merge = _compiled(adapters.breadcrumbs_merge)
apply_adapters = jax.jit(adapters.apply_adapters)
merge_adapters = jax.jit(adapters.merge_adapters)
unmerge_adapters = jax.jit(adapters.unmerge_adapters)


def init_adapters(params: Any, config: Any, key: Any = None, *, init: Any = None) -> Any:
    """As `adapters.init_adapters`."""
    make = lambda params, key: adapters.init_adapters(params, config, key, init=init)  # noqa: E731
    return jax.jit(make)(params, key)
