"""The user's own task, named on the command line as module:function.

The function takes no arguments and returns a `harness.workload.Workload`, where every field is
described; `line.py` is one to copy. To what its `identity` says are added module:function, the
number of parameters, and a checksum of the file that defines the function.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from experiments.harness import EVALUATIONS, UserError, one_line
from experiments.harness.candidates import fingerprint
from experiments.harness.own import function_of
from experiments.harness.workload import Workload, parameter_count

OPTION = "--workload-from"


def own_workload(spec: str) -> Workload:
    """The task that `spec` names, each part of it traced once.

    Raises:
      UserError: the function fails, returns something else, or a part of it does not fit.
    """
    function = function_of(spec, OPTION)
    try:
        found = _part("the function", function)
        if not isinstance(found, Workload):
            expected = f"{Workload.__module__}.{Workload.__name__}"
            raise TypeError(f"expected an {expected}, got {type(found).__name__}")
        _check_fields(found)
        params = _check_functions(found)
    except (TypeError, ValueError) as error:
        raise UserError(f"{OPTION} {spec}: {one_line(error)}") from error
    identity = {
        **found.identity,
        "workload": spec,
        "parameters": parameter_count(params),
        "code": fingerprint(function),
    }
    return dataclasses.replace(found, identity=identity)


def _check_fields(workload: Workload) -> None:
    name, unit = workload.name, workload.loss_unit
    if not (isinstance(name, str) and re.fullmatch(r"[\w-]+", name)):
        raise ValueError(f"name must be letters, digits, - and _ (a folder has it), got {name!r}")
    if not (isinstance(unit, str) and unit):
        raise ValueError(f"loss_unit must be a text, got {unit!r}")
    rate, steps = workload.learning_rate, workload.steps
    if not (isinstance(rate, int | float) and 0 < rate < math.inf):
        raise ValueError(f"learning_rate must be a positive number, got {rate!r}")
    if not (isinstance(steps, int) and steps > 0 and steps % EVALUATIONS == 0):
        raise ValueError(f"steps must be a positive multiple of {EVALUATIONS}, got {steps!r}")
    kept = _part("identity", lambda: json.loads(json.dumps(dict(workload.identity))))
    if kept != dict(workload.identity):
        raise ValueError(f"identity must survive JSON unchanged, got {workload.identity!r}")


def _check_functions(workload: Workload) -> Any:
    """Traces each function on what the others return; returns the shapes of the parameters."""
    key = jax.random.key(0)
    params = _traced("init(key)", workload.init, key)
    if not jax.tree.leaves(params):
        raise ValueError("init(key) must return parameters, got a tree without arrays")
    for leaf in jax.tree.leaves(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"init(key) must return floating-point arrays, got {leaf.dtype}")
    batch = _traced("sample(data, key)", workload.sample, workload.data, key)
    arguments = {"loss": (params, batch), "validation_loss": (params, workload.data)}
    for name, given in arguments.items():
        call = f"{name}(params, {'batch' if name == 'loss' else 'data'})"
        value = _traced(call, getattr(workload, name), *given)
        if getattr(value, "shape", None) != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(f"{call} must return one floating-point number, got {value}")
    return params


def _traced(call: str, function: Callable[..., Any], *arguments: Any) -> Any:
    return _part(call, lambda: jax.eval_shape(function, *arguments))


def _part(what: str, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:  # the user's functions may raise anything
        raise ValueError(f"{what}: {type(error).__name__}: {one_line(error)}") from error
