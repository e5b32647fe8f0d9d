"""How many bytes of device memory does one update step move, compiled for a chip that is not here?

`python -m experiments.update_traffic` compiles the step (update and apply_updates, parameters and
state donated, float32) of every rule for an H200 and adds up operands and results of its kernels: a
figure that does not depend on the machine that compiles. It needs the extra `aot`, in an
environment of its own.
"""

from __future__ import annotations

import argparse
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

import jaxopt_lab
from experiments.harness.environment import write_figures
from jaxopt_lab import quantization
from pallas_kernels import targets

SHAPES = {"up": (1024, 4096), "down": (4096, 1024), "bias": (4096,)}

# Gradient, parameter and state read once, parameter and state written once. AdamP and SGDP need
# sums over the old arrays before the update and must read everything twice.
FLOOR = {
    "adamw": 28,
    "lion": 20,
    "adabelief": 28,
    "adabelief_rectified": 28,
    "exadam": 28,
    "diffgrad": 36,
    "adamp": 40,
    "sgdp": 32,
    "frugal_adamw": 16,
    "bfloat16_adamw": 20,
    "int8_linear_adamw": 16.1,
    "int8_dynamic_adamw": 16.1,
    "fused_int8_linear_adamw": 16.1,
    "fused_int8_dynamic_adamw": 16.1,
}


def _case(make: Callable[..., optax.GradientTransformation], **arguments: Any) -> Any:
    tx = make(1e-3, **arguments)

    def step(params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    return step, (params, jax.eval_shape(tx.init, params), params), (0, 1)


def adamw() -> Any:
    return _case(optax.adamw)


def lion() -> Any:
    return _case(jaxopt_lab.lion, weight_decay=0.1)


def adabelief() -> Any:
    return _case(jaxopt_lab.adabelief, weight_decay=0.1)


def adabelief_rectified() -> Any:
    return _case(jaxopt_lab.adabelief, weight_decay=0.1, rectify=True)


def exadam() -> Any:
    return _case(jaxopt_lab.exadam, weight_decay=0.1)


def diffgrad() -> Any:
    return _case(jaxopt_lab.diffgrad, weight_decay=0.1)


def adamp() -> Any:
    return _case(jaxopt_lab.adamp, weight_decay=0.1)


def sgdp() -> Any:
    return _case(jaxopt_lab.sgdp, momentum=0.9, nesterov=True, weight_decay=0.1)


def frugal_adamw() -> Any:
    # Counted with the refresh, whose random columns are nothing beside the matrices.
    return _case(jaxopt_lab.frugal_adamw, weight_decay=0.1)


def bfloat16_adamw() -> Any:
    return _case(_quantized_adamw, codec=quantization.bfloat16())


def int8_linear_adamw() -> Any:
    return _case(_quantized_adamw, codec=quantization.int8(code="linear"))


def int8_dynamic_adamw() -> Any:
    return _case(_quantized_adamw, codec=quantization.int8())


def _quantized_adamw(learning_rate: float, codec: quantization.Codec) -> Any:
    return quantization.quantize_state(optax.adamw(learning_rate), codec)


def fused_int8_linear_adamw() -> Any:
    return _fused_case(quantization.int8(code="linear"))


def fused_int8_dynamic_adamw() -> Any:
    return _fused_case(quantization.int8())


def _fused_case(codec: quantization.Codec) -> Any:
    _, arguments, donated = _case(_quantized_adamw, codec=codec)
    step = quantization.fused_step(optax.adamw(1e-3), codec)
    return lambda params, state, grads: step(grads, state, params), arguments, donated


def bytes_per_parameter(rule: str, chip: str = "h200") -> float:
    """Compiles the step of a rule in FLOOR in a child process and counts."""
    report = targets.compile_in_child(f"experiments.update_traffic:{rule}", chip)
    return report["traffic"]["total_bytes"] / sum(map(math.prod, SHAPES.values()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--chip", default="h200", choices=sorted(targets.CHIPS))
    parser.add_argument("--out", type=pathlib.Path, help="write the figures to this JSON file")
    options = parser.parse_args(argv)
    reason = targets.missing_compiler(options.chip)
    if reason is not None:
        parser.error(reason)
    os.environ.update(targets.ENVIRONMENT)  # keeps jax from looking for the chip in this process
    table = Table("step", "bytes per parameter", "floor")
    found = {}
    for rule, floor in FLOOR.items():
        found[rule] = bytes_per_parameter(rule, options.chip)
        table.add_row(rule, f"{found[rule]:.2f}", str(floor))
    Console().print(table)
    figures = {"chip": options.chip, "bytes_per_parameter": found, "floor": FLOOR}
    write_figures(options.out, "update_traffic", **figures)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
