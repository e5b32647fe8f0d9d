"""How far same-named optimizers of other libraries are from ours, on a CPU.

    python -m experiments.optimizer_differences

Each row moves a matrix (6, 5) and a bias by ten steps of equal gradients in float64, at a learning
rate of 0.01, with a rule of ours and that of a library that is installed: once with the defaults of
both, and once with the settings that make them as equal as they get. What is printed is the largest
difference over the largest movement, of the matrix and of the bias: the numbers in
docs/coming_from/torch.md and optax.md. Below them the states of 8 bits, for
docs/coming_from/bitsandbytes_torchao.md. PyTorch keeps a matrix as (outputs, inputs).
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxopt_lab
from jaxopt_lab import quantization, subspace

RATE = 0.01
Tree = dict[str, np.ndarray]


class Row(NamedTuple):
    """A rule in two libraries.

    Attributes:
      rule: its name.
      package: that of the other one, as it is imported.
      ours: makes our transformation, from settings beside the learning rate.
      theirs: makes the optimizer of the other, from the library, parameters and settings.
      same: our settings, and theirs, that make both as equal as they get.
    """

    rule: str
    package: str
    ours: Callable[..., Any]
    theirs: Callable[..., Any]
    same: tuple[dict[str, Any], dict[str, Any]] = ({}, {})


def start() -> Tree:
    rng = np.random.default_rng(0)
    return {"kernel": rng.normal(size=(6, 5)), "bias": rng.normal(size=5)}


def gradients(steps: int) -> list[Tree]:
    rng = np.random.default_rng(1)
    return [{"kernel": rng.normal(size=(6, 5)), "bias": rng.normal(size=5)} for _ in range(steps)]


def moved_here(tx: optax.GradientTransformation, steps: int) -> Tree:
    """The movement of an optax transformation, ours or optax's."""
    first = params = jax.tree.map(jnp.asarray, start())
    state, update = tx.init(params), jax.jit(tx.update)
    for grads in gradients(steps):
        updates, state = update(jax.tree.map(jnp.asarray, grads), state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(lambda a, b: np.asarray(b - a), first, params)


def moved_in_torch(make: Callable[[list[Any]], Any], steps: int) -> Tree:
    """The movement of a PyTorch optimizer of two parameters."""
    import torch

    first = start()
    kernel, bias = (torch.nn.Parameter(torch.from_numpy(x.copy())) for x in _torch(first))
    optimizer = make([kernel, bias])
    for grads in gradients(steps):
        kernel.grad, bias.grad = (torch.from_numpy(x.copy()) for x in _torch(grads))
        optimizer.step()
    return {
        "kernel": kernel.detach().numpy().T - first["kernel"],
        "bias": bias.detach().numpy() - first["bias"],
    }


def _torch(tree: Tree) -> tuple[np.ndarray, np.ndarray]:
    return tree["kernel"].T, tree["bias"]


def moved_in_keras(make: Callable[[Any], Any], steps: int) -> Tree:
    """The movement of an optimizer of Keras."""
    import keras

    first = start()
    variables = [keras.Variable(x, dtype="float64", name=name) for name, x in first.items()]
    optimizer = make(variables)
    for grads in gradients(steps):
        optimizer.apply([jnp.asarray(g) for g in grads.values()], variables)
    return {name: np.asarray(v) - first[name] for name, v in zip(first, variables)}


def plain(name: str, **fixed: Any) -> Callable[..., Any]:
    """Makes the PyTorch optimizer called `name`."""
    return lambda library, params, **options: getattr(library, name)(
        params, lr=RATE, **(fixed | options)
    )


def _by_groups(name: str, **fixed: Any) -> Callable[..., Any]:
    """Makes an optimizer that is told which parameters are matrices."""

    def make(library: Any, params: list[Any], **options: Any) -> Any:
        groups = [
            {"params": params[:1], "use_muon": True},
            {"params": params[1:], "use_muon": False},
        ]
        return getattr(library, name)(groups, lr=RATE, **(fixed | options))

    return make


def _rule(make: Callable[..., Any], **fixed: Any) -> Callable[..., Any]:
    return functools.partial(make, RATE, **fixed)


LAB = jaxopt_lab
ROWS = (
    Row("Lion", "optax", _rule(LAB.lion), lambda m, **o: m.lion(RATE),
        ({"weight_decay": 1e-3}, {})),
    Row("Lion", "pytorch_optimizer", _rule(LAB.lion), plain("Lion")),
    Row("Lion", "timm.optim", _rule(LAB.lion), plain("Lion")),
    Row("Lion", "keras", _rule(LAB.lion), lambda m, _, **o: m.optimizers.Lion(RATE)),
    Row("AdaBelief", "optax", _rule(LAB.adabelief), lambda m, **o: m.adabelief(RATE, **o),
        ({"eps": 1e-8}, {"eps": 1e-8, "eps_root": 1e-8})),
    Row("AdaBelief", "pytorch_optimizer", _rule(LAB.adabelief), plain("AdaBelief")),
    Row("AdaBelief", "timm.optim", _rule(LAB.adabelief), plain("AdaBelief"),
        ({"rectify": True}, {})),
    Row("AdaBelief", "torch_optimizer", _rule(LAB.adabelief), plain("AdaBelief"),
        ({"eps": 1e-8, "weight_decouple": False}, {})),
    Row("AdamP", "timm.optim", _rule(LAB.adamp), plain("AdamP")),
    Row("AdamP", "torch_optimizer", _rule(LAB.adamp), plain("AdamP")),
    Row("AdamP", "pytorch_optimizer", _rule(LAB.adamp), plain("AdamP")),
    Row("SGDP", "timm.optim", _rule(LAB.sgdp), plain("SGDP")),
    Row("SGDP", "pytorch_optimizer", _rule(LAB.sgdp), plain("SGDP")),
    Row("SGDP", "torch_optimizer", _rule(LAB.sgdp, momentum=0.9), plain("SGDP", momentum=0.9),
        ({"project_momentum": True}, {})),
    Row("EXAdam", "pytorch_optimizer", _rule(LAB.exadam), plain("EXAdam"),
        ({"dynamic_step_size": False}, {})),
    Row("diffGrad", "torch_optimizer", _rule(LAB.diffgrad), plain("DiffGrad")),
    Row("diffGrad", "pytorch_optimizer", _rule(LAB.diffgrad), plain("DiffGrad")),
    Row("Muon", "optax", _rule(LAB.muon), lambda m, **o: m.contrib.muon(RATE, **o),
        ({"nesterov": False, "eps": 1e-8, "adam_b2": 0.999, "adam_eps": 1e-8},
         {"nesterov": False})),
    Row("Muon", "pytorch_optimizer", _rule(LAB.muon), _by_groups("Muon", adamw_lr=RATE)),
    Row("Muon", "timm.optim", _rule(LAB.muon), plain("Muon"),
        ({}, {"nesterov": True, "ns_coefficients": "original", "adjust_lr_fn": "original"})),
    Row("Muon", "keras", _rule(LAB.muon), lambda m, _, **o: m.optimizers.Muon(RATE),
        ({"consistent_rms": 0.2, "weight_decay": 0.004, "adam_b2": 0.999, "adam_eps": 1e-7,
          "adam_eps_in_root": False}, {})),
    Row("GaLore", "optax", _rule(LAB.galore_adamw, rank=2, update_gap=100),
        lambda m, **o: m.contrib.galore(RATE, rank=2, update_proj_gap=100, **o),
        ({"projection": subspace.svd("larger"), "scale": 1.0, "eps": 1e-8}, {})),
)  # fmt: skip


def difference(ours: Tree, theirs: Tree) -> str:
    """The largest difference over the largest movement, of the matrix and of the bias."""
    parts = (np.abs(ours[n] - theirs[n]).max() / np.abs(ours[n]).max() for n in ("kernel", "bias"))
    return " / ".join(f"{x:.0e}" if x else "0" for x in parts)


def measured(row: Row, steps: int = 10) -> tuple[str, str]:
    """The differences of a row, at both defaults and with its settings."""
    library = importlib.import_module(row.package)
    found = []
    with jax.enable_x64(True):
        for ours, theirs in (({}, {}), row.same):
            if row.package == "optax":
                other = moved_here(row.theirs(library, **theirs), steps)
            else:
                run = moved_in_keras if row.package == "keras" else moved_in_torch
                other = run(lambda p, o=theirs: row.theirs(library, p, **o), steps)
            found.append(difference(moved_here(row.ours(**ours), steps), other))
    return found[0], found[1]


def eight_bits() -> dict[str, Callable[[Any], Any] | optax.GradientTransformation]:
    """AdamW with compact state by name: a function of PyTorch's parameter, or a transformation."""

    def bnb(weight: Any) -> Any:
        return importlib.import_module("bitsandbytes").optim.AdamW8bit([weight], **ADAMW)

    def torchao(name: str) -> Callable[[Any], Any]:
        return lambda w: getattr(importlib.import_module("torchao.optim"), name)([w], **ADAMW)

    inner = optax.adamw(ADAMW["lr"], weight_decay=ADAMW["weight_decay"])
    codecs = {
        "int8()": quantization.int8(),
        'int8(code="linear")': quantization.int8(code="linear"),
        "bfloat16()": quantization.bfloat16(),
    }
    return {
        "bitsandbytes AdamW8bit": bnb,
        "torchao AdamW8bit": torchao("AdamW8bit"),
        "torchao AdamW4bit": torchao("AdamW4bit"),
        **{name: quantization.quantize_state(inner, codec) for name, codec in codecs.items()},
    }


ADAMW = {"lr": 1e-2, "weight_decay": 0.01}
STEPS = (2, 10, 100)


def compact(made: Callable[[Any], Any] | optax.GradientTransformation) -> dict[int, np.ndarray]:
    """The movement of a weight (64, 64) after each of `STEPS`, in float32.

    Its gradients are spread over three decades inside a block.
    """
    rng = np.random.default_rng(0)
    first = rng.normal(size=(64, 64)).astype(np.float32)
    scale = 10 ** -rng.uniform(0, 3, (64, 64))
    grads = [(scale * rng.normal(size=(64, 64))).astype(np.float32) for _ in range(max(STEPS))]
    found = {}
    if isinstance(made, optax.GradientTransformation):
        params, state, update = (
            jnp.asarray(first),
            made.init(jnp.asarray(first)),
            jax.jit(made.update),
        )
        for step, g in enumerate(grads, start=1):
            updates, state = update(jnp.asarray(g), state, params)
            params = optax.apply_updates(params, updates)
            found[step] = np.asarray(params) - first
    else:
        import torch

        weight = torch.nn.Parameter(torch.from_numpy(first.copy()))
        optimizer = made(weight)
        for step, g in enumerate(grads, start=1):
            weight.grad = torch.from_numpy(g)
            optimizer.step()
            found[step] = weight.detach().numpy() - first
    return {step: found[step] for step in STEPS}


def apart(found: np.ndarray, exact: np.ndarray) -> str:
    """The difference over the movement: root mean squares and, in brackets, worst entries."""
    off = found - exact
    rms = np.sqrt(np.mean(off**2) / np.mean(exact**2))
    return f"{rms:.2g} ({np.abs(off).max() / np.abs(exact).max():.1g})"


def version(library: str) -> str:
    names = {"timm.optim": "timm", "torch_optimizer": "torch-optimizer"}
    return importlib.metadata.version(names.get(library, library))


def main() -> None:
    """Prints a line for each row whose library is installed, then the states of 8 bits."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    for row in ROWS:
        try:
            defaults, same = measured(row)
            print(f"| {row.rule} | {row.package} {version(row.package)} | {defaults} | {same} |",
                  flush=True)  # fmt: skip
        except Exception as error:  # some fail in ways of their own on versions they do not know
            print(f"{row.rule} of {row.package}: {type(error).__name__}: {error}")
    exact = compact(optax.adamw(ADAMW["lr"], weight_decay=ADAMW["weight_decay"]))
    for name, made in eight_bits().items():
        try:
            found = compact(made)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}")
            continue
        print(f"| {name} | {' | '.join(apart(found[s], exact[s]) for s in STEPS)} |", flush=True)


if __name__ == "__main__":
    main()
