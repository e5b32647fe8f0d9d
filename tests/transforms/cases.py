"""The reference trajectories under tests/golden, and each one's settings as our arguments.

A case is found by listing the folder, and its own hyper-parameters are mapped by name, so that a
new file runs without a change here; a hyper-parameter or method that maps to nothing is an error.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_lab
from tests.transforms import selections

GOLDEN = pathlib.Path(
    os.environ.get("JAXOPT_LAB_GOLDEN", pathlib.Path(__file__).parents[1] / "golden")
)

# What describes the gradient stream and not the rule.
_STREAM = {"steps", "huge_gradient_steps", "zero_gradient_steps", "parameter_order"}


@dataclasses.dataclass(frozen=True)
class Case:
    """One reference run, in JAX layout (in, out) and HWIO."""

    name: str
    method: str
    hyperparams: Mapping[str, Any]
    init: dict[str, np.ndarray]
    grads: list[dict[str, np.ndarray]]  # one tree a step
    expected: dict[int, dict[str, np.ndarray]]  # parameters after step t
    huge: frozenset[int] = frozenset()  # steps whose gradient is 1e4 times the others'
    # What the reference selected: path such as "dense" or "dense/left" -> first step -> array, in
    # the reference's layout.
    selections: Mapping[str, dict[int, np.ndarray]] = dataclasses.field(default_factory=dict)


def names() -> list[str]:
    """The files of trajectories; others hold one pass of a layer or iterates of a minimiser."""
    return sorted(path.stem for path in (GOLDEN / "optimizers").glob("*.npz") if _is_one(path))


def _is_one(path: pathlib.Path) -> bool:
    with np.load(path) as file:
        return any(key.startswith("grads/") for key in file.files)


def load(name: str) -> Case:
    path = GOLDEN / "optimizers" / f"{name}.npz"
    run = meta(path)
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files if key != "meta"}
    init = {k.split("/")[1]: _to_jax(v) for k, v in arrays.items() if k.startswith("init/")}
    grads = {k.split("/")[1]: v for k, v in arrays.items() if k.startswith("grads/")}
    steps = len(next(iter(grads.values())))
    expected: dict[int, dict[str, np.ndarray]] = {}
    for key, value in arrays.items():
        if key.startswith("params/"):
            _, step, leaf = key.split("/")
            expected.setdefault(int(step), {})[leaf] = _to_jax(value)
    return Case(
        name=name,
        method=run["method"],
        hyperparams={k: v for k, v in run["hyperparameters"].items() if k not in _STREAM},
        init=init,
        grads=[{k: _to_jax(v[t]) for k, v in grads.items()} for t in range(steps)],
        expected=expected,
        huge=frozenset(run["hyperparameters"].get("huge_gradient_steps", ())),
        selections=_selections(arrays),
    )


def meta(path: pathlib.Path) -> dict[str, Any]:
    """What a file says of its run."""
    with np.load(path) as file:
        return json.loads(str(file["meta"]))


def rule_of(case: Case) -> str:
    """The name of our ready-made transformation for the case."""
    return METHODS[case.method][0]


def transformation(case: Case, namespace: Any = jaxopt_lab) -> optax.GradientTransformation:
    """Builds the case's optimizer from `namespace`, by default this package."""
    if case.method not in METHODS:
        raise KeyError(f"{case.name}: no rule is mapped to the method {case.method!r}")
    name, mapping = METHODS[case.method]
    unknown = set(case.hyperparams) - set(mapping)
    if unknown:
        raise KeyError(f"{case.name}: hyper-parameters {sorted(unknown)} map to no argument")
    arguments: dict[str, Any] = {}
    for key, value in case.hyperparams.items():
        target = mapping[key]
        arguments |= target(value, case, namespace) if callable(target) else {target: value}
    tx = getattr(namespace, name)(**arguments)
    return _one_replica(tx) if "axis_name" in arguments else tx


def _one_replica(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs a transformation on an axis of size 1, from the second call on.

    The references' first call makes buffers and throws its gradient away.
    """

    def alone(function: Any) -> Any:
        def called(*args: Any) -> Any:
            stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], args)
            return jax.tree.map(lambda x: x[0], jax.vmap(function, axis_name=_AXIS)(*stacked))

        return called

    def init(params: Any) -> Any:
        return jnp.zeros((), jnp.int32), alone(tx.init)(params)

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        calls, inner = state
        found = alone(tx.update)(updates, inner, params)
        kept = jax.tree.map(jnp.zeros_like, updates), inner
        updates, inner = jax.tree.map(lambda new, old: jnp.where(calls > 0, new, old), found, kept)
        return updates, (calls + 1, inner)

    return optax.GradientTransformation(init, update)


def _selections(arrays: Mapping[str, np.ndarray]) -> dict[str, dict[int, np.ndarray]]:
    found: dict[str, dict[int, np.ndarray]] = {}
    for key, value in arrays.items():
        if key.startswith("aux/"):
            *path, step = key.split("/")[2:]
            found.setdefault("/".join(path), {})[int(step.removeprefix("from_step_"))] = value
    return found


def _to_jax(array: np.ndarray) -> np.ndarray:
    """PyTorch's (out, in, ...) to JAX's (..., in, out)."""
    return np.transpose(array, (*range(2, array.ndim), 1, 0)) if array.ndim > 1 else array


def _same(*keys: str) -> dict[str, str]:
    return {key: key for key in keys}


def _ns_eps_of_a_sum(value: float, case: Case, namespace: Any) -> dict[str, Any]:
    del namespace
    # Moonlight sums gradients where we average them: its momentum is ours over 1 - momentum, and
    # so the same epsilon weighs 1 - momentum times as much.
    return {"eps": value * (1 - case.hyperparams["momentum"])}


def _always_full(value: list[str], case: Case, namespace: Any) -> dict[str, Any]:
    del namespace
    return {"always_full": {name: name not in value for name in case.init}}


def _dct_projection(value: str, case: Case, namespace: Any) -> dict[str, Any]:
    assert value == "dct"
    return {"projection": selections.dct(case.hyperparams, case.selections, namespace.subspace)}


_AXIS = "replica"
_FREE = {"sign_sgd": optax.scale_by_sign, "sgd": optax.identity, "no": optax.set_to_zero}
_ADAM = _same("b1", "b2", "eps", "weight_decay") | {"lr": "learning_rate"}
_SGDP = _same(
    "momentum",
    "weight_decay",
    "dampening",
    "nesterov",
    "eps",
    "delta",
    "wd_ratio",
    "project_momentum",
) | {"lr": "learning_rate"}

Target = str | Callable[[Any, Case, Any], dict[str, Any]]
METHODS: dict[str, tuple[str, Mapping[str, Target]]] = {
    "lion": ("lion", _same("b1", "b2", "weight_decay") | {"lr": "learning_rate"}),
    "adabelief": (
        "adabelief",
        _ADAM | _same("amsgrad", "rectify", "degenerated_to_sgd", "weight_decouple", "fixed_decay"),
    ),
    "adamp": ("adamp", _ADAM | _same("delta", "wd_ratio", "nesterov")),
    "sgdp": ("sgdp", _SGDP),
    "exadam": ("exadam", _ADAM | _same("dynamic_step_size")),
    "diffgrad": ("diffgrad", _ADAM),
    "onebit_adam": (
        "one_bit_adam",
        _ADAM
        | {
            # The call without a step counts, and the variance is that of the calls up to it.
            "freeze_step": lambda value, case, namespace: {
                "freeze_step": value - 1,
                "axis_name": _AXIS,
            },
            "bias_correction": lambda value, case, namespace: {},  # unused by the authors' code
        },
    ),
    "frugal": (
        "frugal_adamw",
        _ADAM
        | _same("density", "update_gap")
        | {
            "inactive_lr_scale": "free_scale",
            "proj_params_lr_scale": "projected_scale",
            "inactive_update_rule": lambda value, case, namespace: {"free": _FREE[value]()},
            "reset_statistics": lambda value, case, namespace: {
                "on_refresh": "reset" if value else "keep"
            },
            "projected_parameters": _always_full,
            "projection": lambda value, case, namespace: {
                "projection": selections.frugal(
                    value, case.hyperparams, case.init, case.selections, namespace.subspace
                )
            },
            "coord_choice": lambda value, case, namespace: {},  # read with the projection
            "block_order": lambda value, case, namespace: {},
        },
    ),
    "galore": (
        "galore_adamw",
        _ADAM
        | _same("rank", "scale")
        | {
            "update_proj_gap": "update_gap",
            "projected_parameters": _always_full,
            "proj_type": lambda value, case, namespace: {
                "projection": selections.singular(
                    value, case.selections, case.init, namespace.subspace
                )
            },
        },
    ),
    "dct_adamw": (
        "dct_adamw",
        _ADAM
        | _same("rank")
        | {
            "update_proj_gap": "update_gap",
            "rotate_subspace": "rotate",
            "use_ef": "error_feedback",
            "proj": _dct_projection,
            "sim_type": lambda value, case, namespace: {},
            "ell_norm": lambda value, case, namespace: {},
        },
    ),
    "muon_keller": (
        "muon",
        _same("nesterov", "ns_coeffs", "ns_steps", "weight_decay")
        | _same("adam_b1", "adam_b2", "adam_eps", "adam_weight_decay")
        | {
            "lr": "learning_rate",
            "adam_lr": "adam_learning_rate",
            "momentum": "beta",
            "ns_eps": "eps",
        },
    ),
    "muon_moonlight": (
        "muon",
        _same("nesterov", "ns_coeffs", "ns_steps")
        | {
            "lr": "learning_rate",
            "wd": "weight_decay",
            "momentum": lambda value, case, namespace: {
                "beta": value,
                "consistent_rms": 0.2,
                "adam_eps_in_root": False,
            },
            "ns_eps": _ns_eps_of_a_sum,
            "adamw_b1": "adam_b1",
            "adamw_b2": "adam_b2",
            "adamw_eps": "adam_eps",
        },
    ),
}
