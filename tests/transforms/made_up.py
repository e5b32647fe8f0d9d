"""Files in the format of the reference trajectories, from the float64 programs of `tests/oracles`.

They have matrices and options that the recorded ones lack: the mapping must follow from what a file
says, not from the shapes that the open files happen to have.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from tests.oracles import frugal, galore, muon

STEPS, RECORDED = 30, (1, 2, 5, 10, 30)
_ADAM: dict[str, Any] = {"b1": 0.9, "b2": 0.99, "eps": 1e-6, "weight_decay": 0.05}
Trajectory = list[np.ndarray]
# (out, in), as PyTorch has them.
SHAPES = {"tall": (9, 5), "wide": (5, 8), "square": (6, 6)}
_SIDES: dict[str, galore.Side] = {
    "right": "in",
    "left": "out",
    "full": "both",
    "std": "smaller",
    "reverse_std": "larger",
}


def names() -> list[str]:
    """The names of the files."""
    return list(_files())


def write(root: pathlib.Path) -> None:
    """Writes the files below `root`."""
    (root / "optimizers").mkdir()
    for name, (shapes, method, arguments) in _files().items():
        method(_File(root, name, shapes), *arguments)


def _files() -> dict[str, tuple[dict[str, tuple[int, int]], Callable[..., None], tuple[Any, ...]]]:
    """name -> (shapes of the matrices, what runs and saves them, its arguments)."""
    found: dict[str, Any] = {}
    for label, shape in SHAPES.items():
        for side in _SIDES:
            found[f"galore_{side}_{label}"] = {"dense": shape}, _galore, (side,)
            found[f"frugal_svd_{side}_{label}"] = {"dense": shape}, _frugal_basis, (side,)
        for choice in ("columns", "rows", "randk"):
            found[f"frugal_{choice}_{label}"] = {"dense": shape}, _frugal_coordinates, (choice,)
    orders = [("mirror", 4, 0.5), ("mirror", 6, 0.67), ("ascending", 5, 0.4), ("random", 4, 0.5)]
    orders += [("descending", 6, 0.5), ("descending", 5, 0.4), ("random", 3, 1.0)]
    for order, count, density in orders:
        leaves = [f"dense{index or ''}" for index in range(count)]
        shapes = dict(zip(leaves, [*SHAPES.values()] * 2))
        found[f"frugal_{order}_{count}"] = shapes, _frugal_blocks, (order, density)
    return found


class _File:
    """One run: matrices of given shapes (out, in) and a vector."""

    def __init__(self, root: pathlib.Path, name: str, shapes: dict[str, tuple[int, int]]) -> None:
        self.path = root / "optimizers" / f"{name}.npz"
        self.rng = np.random.default_rng(len(name))
        self.names = list(shapes)
        self.arrays: dict[str, Any] = {}
        for key, shape in {**shapes, "bias": (4,)}.items():
            self.arrays[f"init/{key}"] = self.rng.normal(size=shape)
            self.arrays[f"grads/{key}"] = self.rng.normal(size=(STEPS, *shape))
            self.arrays[f"grads/{key}"][8] = 0

    def kernel(self, name: str) -> tuple[np.ndarray, list[np.ndarray]]:
        """A matrix (in, out) and its gradients."""
        return self.arrays[f"init/{name}"].T, [g.T for g in self.arrays[f"grads/{name}"]]

    def record(self, name: str, step: int, value: Any, end: str = "") -> None:
        """What is selected from a step on."""
        self.arrays[f"aux/projection/{name}{end}/from_step_{step}"] = np.asarray(value)

    def save(self, method: str, hyperparams: dict[str, Any], found: dict[str, Trajectory]) -> None:
        adam = galore.adam_trajectory if method == "galore" else muon.adam_trajectory
        bias = self.arrays["init/bias"], list(self.arrays["grads/bias"])
        options = {k: v for k, v in hyperparams.items() if k in _ADAM}
        found["bias"] = adam(*bias, learning_rate=hyperparams["lr"], **options)
        for name, thetas in found.items():
            for step in RECORDED:
                self.arrays[f"params/{step}/{name}"] = thetas[step - 1].T
        hyperparams |= {
            "projected_parameters": self.names,
            "parameter_order": [*self.names, "bias"],
            "steps": STEPS,
            "zero_gradient_steps": [9],
            "huge_gradient_steps": [],
        }
        meta = json.dumps({"method": method, "hyperparameters": hyperparams})
        np.savez(self.path, meta=meta, **self.arrays)


def _basis(file: _File, name: str, step: int, side: str, rank: int) -> galore.BasisValue:
    """Draws a basis, records it as the references store theirs, and returns it as columns."""
    rows, cols = file.arrays[f"init/{name}"].shape
    left = np.linalg.qr(file.rng.normal(size=(rows, rank)))[0]
    right = np.linalg.qr(file.rng.normal(size=(cols, rank)))[0]
    if side == "full":
        file.record(name, step, left, "/left")
        file.record(name, step, right.T, "/right")
        return right, left
    if side == "std":
        side = "right" if rows >= cols else "left"
    elif side == "reverse_std":
        side = "right" if rows < cols else "left"
    file.record(name, step, right.T if side == "right" else left)
    return right if side == "right" else left


def _galore(file: _File, side: str) -> None:
    gap, rank = 7, 3
    param, grads = file.kernel("dense")
    theta = galore.trajectory(
        param,
        grads,
        selection=lambda t: _basis(file, "dense", t, side, rank),
        side=_SIDES[side],
        update_gap=gap,
        scale=0.5,
        learning_rate=0.1,
        **_ADAM,
    )
    hyperparams = {**_ADAM, "lr": 0.1, "rank": rank, "scale": 0.5}
    hyperparams |= {"update_proj_gap": gap, "proj_type": side}
    file.save("galore", hyperparams, {"dense": theta})


def _frugal(file: _File, method: dict[str, Any], found: dict[str, Trajectory]) -> None:
    hyperparams = {**_ADAM, "lr": 0.1, "update_gap": 7, "inactive_update_rule": "sgd"}
    hyperparams |= {"inactive_lr_scale": 0.5, "proj_params_lr_scale": 0.7}
    file.save("frugal", {"reset_statistics": True, **hyperparams, **method}, found)


_OPTIONS: dict[str, Any] = {
    **_ADAM,
    "learning_rate": 0.1,
    "update_gap": 7,
    "free_rule": "sgd",
    "full_scale": 0.7,
    "free_scale": 0.5,
}


def _frugal_basis(file: _File, side: str) -> None:
    param, grads = file.kernel("dense")
    rank = frugal.size("svd", param.shape, 0.4, _SIDES[side])
    theta = frugal.trajectory(
        param,
        grads,
        kind="svd",
        selection=lambda t: _basis(file, "dense", t, side, rank),
        side=_SIDES[side],
        on_refresh="keep",
        **_OPTIONS,
    )
    method = {"projection": f"svd (side {side})", "density": 0.4, "reset_statistics": False}
    _frugal(file, method, {"dense": theta})


def _frugal_coordinates(file: _File, choice: Literal["columns", "rows", "randk"]) -> None:
    param, grads = file.kernel("dense")
    kept = frugal.size(choice, param.shape, 0.5)
    total = {"columns": param.shape[0], "rows": param.shape[1], "randk": param.size}[choice]

    def select(t: int) -> Any:
        places = file.rng.permutation(total)[:kept]
        if choice != "randk":
            file.record("dense", t, places)
            return places
        outputs, inputs = np.unravel_index(places, param.T.shape)
        file.record("dense", t, (outputs, inputs))
        return inputs, outputs

    theta = frugal.trajectory(param, grads, kind=choice, selection=select, **_OPTIONS)
    method = {"projection": "coordinates", "coord_choice": choice, "density": 0.5}
    _frugal(file, method, {"dense": theta})


def _active(file: _File, order: str, density: float) -> Callable[[int], set[str]]:
    names, count = file.names, round(len(file.names) * density)

    def active(t: int) -> set[str]:
        period = (t - 1) // 7
        if order == "random":
            found = {names[index] for index in file.rng.permutation(len(names))[:count]}
        elif order == "mirror":
            half = [(period * count // 2 + i) % (len(names) // 2) for i in range(count // 2)]
            found = {names[index] for i in half for index in (i, -1 - i)}
        else:
            walk = names if order == "ascending" else names[::-1]
            found = {walk[(period * count + i) % len(walk)] for i in range(count)}
        for name in names:
            file.record(name, t, name in found)
        return found

    return active


def _frugal_blocks(file: _File, order: str, density: float) -> None:
    kernels = {name: file.kernel(name) for name in file.names}
    steps = frugal.blocks_trajectory(
        {name: param for name, (param, _) in kernels.items()},
        [{name: grads[t] for name, (_, grads) in kernels.items()} for t in range(STEPS)],
        selection=_active(file, order, density),
        **_OPTIONS,
    )
    method = {"projection": "blocks", "block_order": order, "density": density}
    _frugal(file, method, {name: [step[name] for step in steps] for name in file.names})
