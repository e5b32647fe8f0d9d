"""The routes by name, and which of them serves a call."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax

from pallas_kernels import _compat
from pallas_kernels.attention import core, cudnn, reference
from pallas_kernels.attention.problem import Operands, Route, Settings

KERNELS = ("mosaic_gpu", "mosaic_tpu", "triton", "chunked")
"""Routes with a backward pass of their own, each a module of this folder with a `ROUTE`."""

Implementation = Literal[
    "mosaic_gpu", "mosaic_tpu", "triton", "cudnn", "chunked", "reference", "xla"
]
NAMES: tuple[Implementation, ...] = tuple(x for x in get_args(Implementation) if x != "xla")

SAME = {"xla": "chunked"}
"""Other names of routes: what XLA compiles by itself, as `jax.nn` calls it."""

ORDER = {
    "cpu": ("chunked",),
    "gpu": ("mosaic_gpu", "triton", "chunked"),
    "tpu": ("mosaic_tpu", "chunked"),
}
"""What ``implementation=None`` tries, fastest first."""


class Explanation(NamedTuple):
    """Why a call takes the route that it takes.

    Attributes:
      chosen: The name of the route that serves the call, or None.
      refusals: For each route, the reason why it cannot serve, or None if it could.
    """

    chosen: str | None
    refusals: dict[str, str | None]

    def __str__(self) -> str:
        """A line a route."""
        lines = []
        for name, reason in self.refusals.items():
            mark = "->" if name == self.chosen else "  "
            lines.append(f"{mark} {name:<11}{'serves' if reason is None else reason}")
        return "\n".join(lines)


_TAKEN: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar("taken", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Gives the names of the routes that calls traced inside take, each once, in order."""
    taken: list[str] = []
    token = _TAKEN.set(taken)
    try:
        yield taken
    finally:
        _TAKEN.reset(token)


def record(name: str) -> None:
    """Tells `recorded` that a call takes a route."""
    taken = _TAKEN.get()
    if taken is not None and name not in taken:
        taken.append(name)


@functools.cache
def load(name: str) -> Route:
    """Imports a route of `KERNELS` on its first use: some backends are slow to import."""
    return importlib.import_module(f"pallas_kernels.attention.{name}").ROUTE


def run(
    name: str, settings: Settings, operands: Operands, residual: bool = True
) -> tuple[jax.Array, jax.Array | None]:
    """Returns output and lse by the route `name`; the lse is None where not asked for or had."""
    if name == "reference":
        return reference.attend(settings, operands)
    if name == "cudnn":
        return cudnn.attend(settings, operands), None
    return core.attend(load(name), settings, operands, residual)


def refusal(
    name: str, settings: Settings, operands: Operands, residual: bool, device: _compat.Device
) -> str | None:
    """Returns why `name` cannot serve the call, or None."""
    config_type = None
    if name not in ("chunked", "reference") and not all(isinstance(x, int) for x in operands.sizes):
        return f"has blocks of fixed sizes, and these are symbolic: {operands.sizes}"
    if name == "reference":
        reason = reference.refusal(settings, operands, device)
    elif name == "cudnn":
        reason = cudnn.refusal(settings, operands, device)
        if reason is None and residual:
            reason = "jax.nn gives its log-sum-exp no gradient"
    else:
        try:
            route = load(name)
        except ImportError as error:
            return f"this jax cannot import it: {error}"
        config_type = route.config_type
        reason = route.refusal(settings, operands, device)
    if reason is not None or settings.config is None:
        return reason
    parts = (settings.config, *(settings.config if isinstance(settings.config, tuple) else ()))
    if not all(getattr(x, "is_possible", True) for x in parts):
        raise ValueError(f"config={settings.config!r}; expected sizes that a kernel can have")
    if config_type is not None and isinstance(settings.config, config_type):
        return None
    expected = "no config" if config_type is None else f"a {config_type.__name__}"
    return f"config={settings.config!r}; expected {expected}"


def choose(implementation: Any, settings: Settings, operands: Operands, residual: bool) -> str:
    """Returns the name of the route for a call.

    Raises:
      ValueError: `implementation` names no route.
      NotImplementedError: None of the named routes can serve the call, with the reason of each.
    """
    names = _names(implementation)
    device = _compat.device()
    reasons = {}
    for name in names:
        reasons[name] = refusal(name, settings, operands, residual, device)
        if reasons[name] is None:
            record(name)
            return name
    said = "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(
        f"implementation={implementation!r} cannot serve this call on {device.kind}: {said}"
    )


def explain(
    implementation: Any, settings: Settings, operands: Operands, residual: bool
) -> Explanation:
    """Returns every route with its reason, and the one that `choose` takes."""
    device = _compat.device()
    refusals = {name: refusal(name, settings, operands, residual, device) for name in NAMES}
    chosen = next((name for name in _names(implementation) if refusals[name] is None), None)
    return Explanation(chosen, refusals)


def _names(implementation: Any) -> Sequence[str]:
    if implementation is None:
        return ORDER.get(_compat.device().platform, ("chunked",))
    if not isinstance(implementation, (str, Sequence)):
        raise TypeError(
            f"implementation={implementation!r}; expected the name of a route or a sequence of them"
        )
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    names = tuple(SAME.get(name, name) if isinstance(name, str) else name for name in names)
    for name in names:
        if not isinstance(name, str) or name not in NAMES:
            raise ValueError(
                f"implementation={implementation!r} names no route; expected one of or a sequence "
                f"of {', '.join(NAMES)}, or None"
            )
    if not names:
        raise ValueError("implementation is an empty sequence; expected at least one route")
    return names
