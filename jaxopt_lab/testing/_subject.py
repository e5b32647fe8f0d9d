"""What is checked: a transformation, its constructor if known, and one compiled step for all."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxopt_lab.testing._registry import NotApplicableError
from jaxopt_lab.testing._values import expect_same_types, kernel_and_bias, normal_like

DEVICES = 4


def training_step(transform: Any) -> Callable[[Any, Any, Any], tuple[Any, Any, Any]]:
    """`(params, state, gradients) -> (params, state, updates)`, not compiled."""

    def step(params: Any, state: Any, gradients: Any) -> tuple[Any, Any, Any]:
        updates, state = transform.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, updates

    return step


class Run(NamedTuple):
    """Where a few steps led."""

    params: Any
    state: Any
    updates: Any


class Obstacle(NamedTuple):
    """What stands in the way of every check that compiles a step."""

    what: str
    error: Exception


class Subject:
    """A transformation under test.

    The compiled step is shared: checks that use the same shapes and dtypes compile once.
    """

    constructor: Callable[..., Any] | None
    transform: optax.GradientTransformation

    def __init__(
        self,
        transform: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        asked_for: frozenset[str] = frozenset(),
    ):
        self.constructor = None
        self.asked_for = asked_for
        if isinstance(transform, optax.GradientTransformation):
            if args or kwargs:
                raise TypeError(
                    f"{type(transform).__name__} is ready-made and takes no arguments; got "
                    f"{args} {dict(kwargs)}"
                )
            self.args, self.kwargs = (), {}
            self.transform = transform
            self.name = getattr(transform.update, "__qualname__", "transformation").split(".")[0]
            return
        if not callable(transform):
            raise TypeError(
                "transform must be an optax.GradientTransformation or a function that makes one; "
                f"got {type(transform).__name__}"
            )
        while isinstance(transform, functools.partial):
            args, kwargs = (*transform.args, *args), {**transform.keywords, **kwargs}
            transform = transform.func
        self.constructor, self.args, self.kwargs = transform, args, dict(kwargs)
        made = transform(*args, **kwargs)
        if not isinstance(made, optax.GradientTransformation):
            raise TypeError(
                f"{transform!r} must return an optax.GradientTransformation; got "
                f"{type(made).__name__}"
            )
        self.transform = made
        texts = [repr(arg) for arg in args] + [f"{key}={arg!r}" for key, arg in kwargs.items()]
        self.name = f"{getattr(transform, '__name__', transform)}({', '.join(texts)})"

    @functools.cached_property
    def step(self) -> Any:
        """The compiled training step."""
        return jax.jit(training_step(self.transform))

    @functools.cached_property
    def obstacle(self) -> Obstacle | None:
        """Why a step cannot be traced, though it works eagerly, or cannot be compiled; if so."""
        params = kernel_and_bias()
        gradient = normal_like(params)
        try:
            state = self.transform.init(params)
        except Exception:
            return None
        try:
            traced = self.step.trace(params, state, gradient)
        except Exception as error:
            eager = self._eager_error()
            return None if eager else Obstacle("the update cannot be traced", error)
        try:
            traced.lower()
        except Exception as error:
            # An eager step compiles one operation at a time, and so knows the line.
            return Obstacle("the update cannot be compiled", self._eager_error() or error)
        return None

    def _eager_error(self) -> Exception | None:
        try:
            self.run(kernel_and_bias(), jit=False)
        except Exception as error:
            return error
        return None

    def run(self, params: Any, *gradients: Any, jit: bool = True) -> Run:
        """Inits eagerly and takes one step per gradient (two with normal ones if none is given)."""
        gradients = gradients or (normal_like(params, 10), normal_like(params, 20))
        step = self.step if jit else training_step(self.transform)
        state, updates = self.transform.init(params), None
        for gradient in gradients:
            params, state, updates = step(params, state, gradient)
        return Run(params, state, updates)

    def run_with_stable_types(self, params: Any, *gradients: Any) -> Run:
        """`run`, and the types of weights, updates and state are those before the first step."""
        run = self.run(params, *gradients)
        expect_same_types(run.updates, params, "updates")
        expect_same_types(run.params, params, "params")
        expect_same_types(run.state, self.transform.init(params), "state")
        return run

    def constructor_and_arguments(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        """The constructor, and its arguments by name with defaults included."""
        if self.constructor is None:
            raise NotApplicableError("needs the constructor, got a ready-made transformation")
        bound = inspect.signature(self.constructor).bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return self.constructor, bound.arguments

    def require_argument(self, *names: str) -> tuple[Callable[..., Any], dict[str, Any], list[str]]:
        """The constructor, its arguments, and those of `names` that it has."""
        constructor, arguments = self.constructor_and_arguments()
        found = [name for name in names if name in arguments]
        if not found:
            raise NotApplicableError(f"has no argument {' or '.join(names)}")
        return constructor, arguments, found

    def require_ready_made(self, check: str) -> None:
        """Returns if this is an optimizer whose updates are steps, not a rule for a chain."""
        if check in self.asked_for:
            return
        if self.constructor is None:
            raise NotApplicableError(
                "needs the constructor to tell a ready-made optimizer from a rule for a chain; "
                f"checks=[{check!r}] asks for it"
            )
        if "learning_rate" not in inspect.signature(self.constructor).parameters:
            raise NotApplicableError(
                "has no learning_rate: a rule for a chain; if it is an optimizer all the same, "
                f"checks=[{check!r}] asks for it"
            )

    def require_state_per_parameter(self, params: Any) -> Any:
        """The state for `params`, if a leaf of it is shaped like one of them."""
        state = self.transform.init(params)
        shapes = {np.shape(leaf) for leaf in jax.tree.leaves(params)}
        if not any(np.shape(leaf) in shapes for leaf in jax.tree.leaves(state)):
            raise NotApplicableError("keeps no state per parameter to tell the tree of init")
        return state


def require_devices() -> list[Any]:
    """The first four devices."""
    if jax.device_count() < DEVICES:
        raise NotApplicableError(
            f"needs {DEVICES} devices (set XLA_FLAGS=--xla_force_host_platform_device_count="
            f"{DEVICES} before jax starts), found {jax.device_count()}"
        )
    return jax.devices()[:DEVICES]
