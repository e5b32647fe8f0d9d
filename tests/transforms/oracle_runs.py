"""Each rule beside its float64 numpy program: the settings in which the two are compared."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_lab
from tests.oracles import adabelief, adamp, diffgrad, exadam, lion, muon, regimes, sgdp

STEPS = 10
PER_STEP = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (2.8366, -3.0525, 1.2012))
Trajectory = list[np.ndarray]
Streams = Mapping[str, tuple[np.ndarray, list[np.ndarray]]]  # name -> parameter, gradients


@dataclasses.dataclass(frozen=True)
class Run:
    """One setting of one rule."""

    rule: str  # name of the ready-made transformation
    label: str
    hyperparams: Mapping[str, Any]
    oracle: Callable[[Streams], dict[str, Trajectory]]
    streams: Streams
    float32_tolerance: float | None  # None if rounding decides what is selected
    projection: Callable[[Any], Any] | None = None  # made from the module `subspace`

    def __str__(self) -> str:
        return f"{self.rule}-{self.label}"

    def transformation(self, namespace: Any) -> optax.GradientTransformation:
        """Builds the rule from `namespace`, this package or a copy of it."""
        hyperparams = dict(self.hyperparams)
        if self.projection is not None:
            hyperparams["projection"] = self.projection(namespace.subspace)
        return getattr(namespace, self.rule)(**hyperparams)


def leaf_by_leaf(program: Callable[..., Trajectory]) -> Callable[[Streams], dict[str, Trajectory]]:
    """Runs a program of one leaf on each of them."""
    return lambda streams: {name: program(*stream) for name, stream in streams.items()}


def deviation(run: Run, dtype: Any, namespace: Any = jaxopt_lab) -> float:
    """Returns the largest error of any step, relative to the largest entry its leaf ever has.

    A scalar may pass close to zero, where its own value is no measure of the rounding.
    """
    tx = run.transformation(namespace)
    params = {name: jnp.asarray(param, dtype) for name, (param, _) in run.streams.items()}
    grads = {name: jnp.asarray(np.stack(grads), dtype) for name, (_, grads) in run.streams.items()}

    @jax.jit
    def trajectory(params, grads):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    worst = 0.0
    found, right = trajectory(params, grads), run.oracle(run.streams)
    for name, (param, _) in run.streams.items():
        expected = np.stack(right[name])
        error = np.abs(np.asarray(found[name], np.float64) - expected).max()
        scale = max(np.abs(param).max(), np.abs(expected).max())
        worst = max(worst, float(error / scale) if np.isfinite(error) else np.inf)
    return worst


@functools.cache
def all_runs() -> tuple[Run, ...]:
    """Every setting of every rule of one leaf, on five regimes and, at thresholds, on more."""
    runs: list[Run] = []

    def add(rule: str, label: str, oracle: Any, streams: Any = None, **hyperparams: Any) -> None:
        hyperparams = {"learning_rate": 0.1, **hyperparams}
        program = functools.partial(oracle.trajectory, **hyperparams)
        oracle = leaf_by_leaf(program)
        if rule in ("adamp", "sgdp"):
            hyperparams["dimension_numbers"] = _last_axis_is_output
        runs.append(Run(rule, label, hyperparams, oracle, streams or _regimes(), 5e-6))

    add("lion", "default", lion)
    add("lion", "decay", lion, b1=0.95, b2=0.98, weight_decay=0.1)
    add("lion", "b1_above_b2", lion, b1=0.9, b2=0.5)
    add("lion", "no_memory", lion, b1=0.5, b2=0.0)
    add("adabelief", "plain", adabelief)
    add("adabelief", "decoupled", adabelief, eps=1e-8, weight_decay=0.1)
    add("adabelief", "coupled", adabelief, eps=1e-8, weight_decay=0.1, weight_decouple=False)
    add("adabelief", "fixed", adabelief, eps=1e-8, weight_decay=0.01, fixed_decay=True)
    add("adabelief", "amsgrad", adabelief, b2=0.9, eps=1e-8, amsgrad=True)
    add("adabelief", "rectify", adabelief, rectify=True)
    add("adabelief", "rectify_amsgrad", adabelief, b2=0.9, eps=1e-8, rectify=True, amsgrad=True)
    add("adabelief", "no_sgd", adabelief, b2=0.99, eps=1e-8, rectify=True, degenerated_to_sgd=False)
    add("exadam", "v1", exadam)
    add("exadam", "v2", exadam, b1=0.8, b2=0.99, eps=1e-4, dynamic_step_size=False)
    add("exadam", "decay", exadam, weight_decay=0.1)
    add("diffgrad", "default", diffgrad)
    add("diffgrad", "l2", diffgrad, b2=0.99, eps=1e-4, weight_decay=0.1)
    for label, settings in {
        "default": {},
        "decay": {"weight_decay": 0.5, "wd_ratio": 0.3, "delta": 0.3},
        "nesterov": {"b1": 0.8, "b2": 0.99, "nesterov": True, "eps": 1e-4},
    }.items():
        add("adamp", label, adamp, **settings)
        add("adamp", f"{label}_orthogonal", adamp, _orthogonal(adamp, settings), **settings)
    for label, settings in {
        "heavyball": {"momentum": 0.9, "weight_decay": 0.1, "wd_ratio": 0.3},
        "published": {"momentum": 0.9, "dampening": 0.3, "project_momentum": True},
        "nesterov": {"momentum": 0.7, "nesterov": True, "weight_decay": 0.01, "delta": 0.3},
    }.items():
        add("sgdp", label, sgdp, **settings)
        add("sgdp", f"{label}_orthogonal", sgdp, _orthogonal(sgdp, settings), **settings)
    runs += _muon_runs()
    return tuple(runs)


def _last_axis_is_output(params: Any) -> Any:
    """The axes that the programs take, of leaves whose names say nothing of theirs."""

    def numbers(x: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if x.ndim < 2:
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), -1)

    return jax.tree.map(numbers, params)


def _regimes() -> dict[str, tuple[np.ndarray, list[np.ndarray]]]:
    return {
        f"{regime}{'x'.join(map(str, shape))}": regimes.gradients(regime, shape, STEPS)
        for regime in regimes.REGIMES
        for shape in regimes.SHAPES
    }


def _orthogonal(oracle: Any, settings: dict[str, Any]) -> Any:
    """Gradients at chosen angles to the weights; the angles depend on the run that uses them."""
    streams = {}
    for mode in ("channel", "layer", "mixed"):
        for shape in ((6, 4), (3, 3, 4, 5)):
            param, make = regimes.orthogonal_gradients(shape, STEPS, mode=mode)
            _, grads = oracle.trajectory(
                param, make, learning_rate=0.1, steps=STEPS, return_grads=True, **settings
            )
            streams[f"{mode}{len(shape)}"] = param, grads
    return streams


def _muon_runs() -> list[Run]:
    def run(label: str, ours: dict[str, Any], matrix: dict[str, Any], adam: dict[str, Any]) -> Run:
        def program(param: np.ndarray, grads: list[np.ndarray]) -> Trajectory:
            if param.ndim == 2:
                axes = {"reduction_axes": (0,), "output_axes": (1,)}
                return muon.trajectory(param, grads, learning_rate=0.1, **axes, **matrix)
            return muon.adam_trajectory(param, grads, **{"learning_rate": 0.1, **adam})

        # The iteration raises the rounding of small singular values by up to 3.4445**5.
        oracle = leaf_by_leaf(program)
        return Run("muon", label, {"learning_rate": 0.1, **ours}, oracle, _regimes(), 2e-5)

    stacked = {
        "dimension_numbers": {"kernel": optax.contrib.MuonDimensionNumbers(1, (0, 3))},
        "learning_rate": 0.1,
        "consistent_rms": 0.2,
    }
    return [
        run("jordan", {}, {}, {}),
        run(
            "moonlight",
            {
                "consistent_rms": 0.2,
                "nesterov": False,
                "weight_decay": 0.1,
                "adam_eps": 1e-4,
                "adam_eps_in_root": False,
            },
            {"shape_factor": "moonlight", "nesterov": False, "weight_decay": 0.1},
            {"eps": 1e-4, "eps_placement": "before", "weight_decay": 0.1},
        ),
        run(
            "adam",
            {
                "beta": 0.9,
                "eps": 1e-3,
                "ns_steps": 3,
                "weight_decay": 0.1,
                "adam_weight_decay": 0.2,
                "adam_learning_rate": 0.01,
                "adam_b1": 0.8,
                "adam_b2": 0.9,
                "adam_eps": 1e-4,
            },
            {"momentum": 0.9, "ns_eps": 1e-3, "ns_steps": 3, "weight_decay": 0.1},
            {"learning_rate": 0.01, "b1": 0.8, "b2": 0.9, "eps": 1e-4, "weight_decay": 0.2},
        ),
        run(
            "three_polynomials",
            {"ns_coeffs": PER_STEP, "weight_decay": 0.1},
            {"ns_coeffs": PER_STEP, "ns_steps": 3, "weight_decay": 0.1},
            {"weight_decay": 0.1},
        ),
        Run(
            "muon",
            "stack_of_attention_kernels",
            stacked,
            leaf_by_leaf(
                functools.partial(
                    muon.trajectory,
                    learning_rate=0.1,
                    reduction_axes=(1,),
                    output_axes=(0, 3),
                    shape_factor="moonlight",
                )
            ),
            {"kernel": regimes.gradients("wide_range", (2, 5, 3, 4), STEPS)},
            2e-5,
        ),
    ]
