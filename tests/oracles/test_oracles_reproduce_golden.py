"""The oracles against trajectories of the authors' programs and against published figures.

The reference files hold float64 runs in PyTorch layout; ``JAXOPT_LAB_GOLDEN`` names another root
that has them in its subfolder ``optimizers``. The subspace methods take the recorded choices of
columns, bases and blocks first, and then make their own wherever the result does not depend on the
signs and the order that a library's SVD and top-k happen to return.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from . import adabelief, adamp, dct_adamw, diffgrad, exadam, frugal, galore, lion, muon, sgdp

ROOT = Path(os.environ.get("JAXOPT_LAB_GOLDEN", Path(__file__).parents[1] / "golden"))
# Reference and oracle are both float64 and differ in the order of operations only: 4e-14 at most
# over these files. The rest of the limit is room for other builds of the linear algebra.
TOLERANCE = 1e-10

ELEMENTWISE: dict[str, Callable[..., list[np.ndarray]]] = {
    "lion": lion.trajectory,
    "adabelief": adabelief.trajectory,
    "adamp": adamp.trajectory,
    "sgdp": sgdp.trajectory,
    "exadam": exadam.trajectory,
    "diffgrad": diffgrad.trajectory,
}
FILES_PER_METHOD = {
    "lion": 2,
    "adabelief": 8,
    "adamp": 3,
    "sgdp": 4,
    "exadam": 4,
    "diffgrad": 2,
    "muon_keller": 2,
    "muon_moonlight": 1,
    "frugal": 9,
    "galore": 3,
    "dct_adamw": 5,
}
# The references name sides of a matrix (out, in), ours are those of its transpose.
SIDES: dict[str, galore.Side] = {
    "std": "smaller",
    "reverse_std": "larger",
    "right": "in",
    "left": "out",
    "full": "both",
}
FREE_RULES = {"sign_sgd": "sign", "sgd": "sgd", "no": "none"}
DCT_KINDS: dict[str, dct_adamw.Kind] = {"matmul": "dct3", "makhoul": "dct2"}
NOT_HYPERPARAMETERS = {
    "lr",
    "steps",
    "parameter_order",
    "huge_gradient_steps",
    "zero_gradient_steps",
}


def read_meta(path: Path) -> dict[str, Any]:
    with np.load(path) as data:
        return json.loads(str(data["meta"]))


def reference_files() -> list[tuple[Path, str]]:
    files = [(path, read_meta(path)["method"]) for path in sorted(ROOT.glob("optimizers/*.npz"))]
    return [(path, method) for path, method in files if method in FILES_PER_METHOD]


FILES = reference_files()


def to_jax_layout(x: np.ndarray) -> np.ndarray:
    """Maps an OIHW kernel to HWIO and an (out, in) matrix to (in, out)."""
    if x.ndim == 4:
        return x.transpose(2, 3, 1, 0)
    return x.T if x.ndim == 2 else x


def muon_trajectory(
    method: str, hyper: dict[str, Any], param: np.ndarray, grads: list[np.ndarray]
) -> list[np.ndarray]:
    """Runs rule (a) or (b) with the settings of a reference file, Adam on vectors."""
    keller = method == "muon_keller"
    if param.ndim < 2:
        prefix = "adam_" if keller else "adamw_"
        return muon.adam_trajectory(
            param,
            grads,
            learning_rate=hyper["adam_lr" if keller else "lr"],
            weight_decay=hyper["adam_weight_decay" if keller else "wd"],
            b1=hyper[prefix + "b1"],
            b2=hyper[prefix + "b2"],
            eps=hyper[prefix + "eps"],
            eps_placement="after" if keller else "before",
        )
    return muon.trajectory(
        param,
        grads,
        learning_rate=hyper["lr"],
        weight_decay=hyper["weight_decay" if keller else "wd"],
        reduction_axes=tuple(range(param.ndim - 1)),
        output_axes=(-1,),
        shape_factor="jordan" if keller else "moonlight",
        momentum_convention="ema" if keller else "sum",
        **{key: hyper[key] for key in ("momentum", "nesterov", "ns_coeffs", "ns_steps", "ns_eps")},
    )


def run_oracle(
    method: str, hyper: dict[str, Any], param: np.ndarray, grads: list[np.ndarray]
) -> list[np.ndarray]:
    if method in ELEMENTWISE:
        options = {key: x for key, x in hyper.items() if key not in NOT_HYPERPARAMETERS}
        return ELEMENTWISE[method](param, grads, learning_rate=hyper["lr"], **options)
    return muon_trajectory(method, hyper, param, grads)


Data = Mapping[str, np.ndarray]
Trajectories = dict[str, list[np.ndarray]]


def recorded_choice(data: Data, folder: str) -> Callable[[int], np.ndarray]:
    """Returns the function from a step to the array in force, of a folder of ``from_step_t``."""
    start = f"aux/{folder}/from_step_"
    choices = {int(key.removeprefix(start)): data[key] for key in data if key.startswith(start)}
    return lambda t: choices[max(step for step in choices if step <= t)]


def recorded_basis(
    data: Data, folder: str, side: galore.Side, shape: tuple[int, ...]
) -> Callable[[int], galore.BasisValue]:
    """As `recorded_choice`, for bases: rows (r, in) on the right, columns (out, r) on the left."""
    side = galore.resolve_side(shape, side)
    if side == "both":
        left, right = (recorded_choice(data, f"{folder}/{end}") for end in ("left", "right"))
        return lambda t: (right(t).T, left(t))
    found = recorded_choice(data, folder)
    return lambda t: found(t).T if side == "in" else found(t)


def adam_options(hyper: dict[str, Any]) -> dict[str, Any]:
    return {key: hyper[key] for key in ("b1", "b2", "eps", "weight_decay")} | {
        "learning_rate": hyper["lr"]
    }


def frugal_trajectories(
    hyper: dict[str, Any],
    data: Data,
    params: dict[str, np.ndarray],
    grads: dict[str, list[np.ndarray]],
    inject: bool,
) -> Trajectories:
    """Runs FRUGAL on the projected leaves of a reference file and Adam on the others."""
    projected = hyper["projected_parameters"]
    options = adam_options(hyper) | {
        "update_gap": hyper["update_gap"],
        "free_rule": FREE_RULES[hyper["inactive_update_rule"]],
        "full_scale": hyper["proj_params_lr_scale"],
        "free_scale": hyper["inactive_lr_scale"],
    }
    thetas = {
        name: muon.adam_trajectory(params[name], grads[name], **adam_options(hyper))
        for name in params
        if name not in projected
    }
    if hyper["projection"] == "blocks":
        flags = {name: recorded_choice(data, f"projection/{name}") for name in projected}
        gap, order = hyper["update_gap"], hyper["block_order"]

        def active(t: int) -> set[str]:
            if inject:
                return {name for name in projected if flags[name](t)}
            return frugal.active_leaves(projected, hyper["density"], (t - 1) // gap, order)

        steps = frugal.blocks_trajectory(
            {name: params[name] for name in projected},
            [{name: grads[name][i] for name in projected} for i in range(30)],
            selection=active,
            **options,
        )
        return thetas | {name: [step[name] for step in steps] for name in projected}
    basis = re.fullmatch(r"(?:svd|random|randperm) \(side (\w+)\)", hyper["projection"])
    for name in projected:
        kind = "svd" if basis else hyper["coord_choice"]
        side = SIDES[basis[1]] if basis else "smaller"
        rank = frugal.size(kind, params[name].shape, hyper["density"], side)
        folder = f"projection/{name}"
        if basis:
            recorded = recorded_basis(data, folder, side, params[name].shape)
            first = recorded(1)
            found = {b.shape[1] for b in (first if isinstance(first, tuple) else (first,))}
            chosen = recorded if inject else rank
        else:
            choice = recorded_choice(data, folder)
            found = {choice(1).shape[-1]}
            # PyTorch's pair (out, in) of index arrays.
            swapped = lambda t, choice=choice: (choice(t)[1], choice(t)[0])  # noqa: E731
            chosen = swapped if kind == "randk" else choice
        assert found == {rank}
        thetas[name] = frugal.trajectory(
            params[name],
            grads[name],
            kind=kind,
            selection=chosen,
            side=side,
            on_refresh="reset" if hyper["reset_statistics"] else "keep",
            **options,
        )
    return thetas


def galore_trajectories(
    hyper: dict[str, Any],
    data: Data,
    params: dict[str, np.ndarray],
    grads: dict[str, list[np.ndarray]],
    inject: bool,
) -> Trajectories:
    """Runs GaLore on the projected leaves of a reference file and its Adam on the others."""
    side = SIDES[hyper["proj_type"]]
    thetas = {}
    for name, param in params.items():
        if name not in hyper["projected_parameters"]:
            thetas[name] = galore.adam_trajectory(param, grads[name], **adam_options(hyper))
            continue
        bases = recorded_basis(data, f"projection/{name}", side, param.shape)
        thetas[name] = galore.trajectory(
            param,
            grads[name],
            selection=bases if inject else hyper["rank"],
            side=side,
            update_gap=hyper["update_proj_gap"],
            scale=hyper["scale"],
            **adam_options(hyper),
        )
    return thetas


def dct_trajectories(
    hyper: dict[str, Any],
    data: Data,
    params: dict[str, np.ndarray],
    grads: dict[str, list[np.ndarray]],
    inject: bool,
) -> Trajectories:
    """Runs DCT-AdamW on the matrices of a reference file and Adam on its vectors."""
    return {
        name: dct_adamw.trajectory(
            param,
            grads[name],
            selection=recorded_choice(data, f"indices/{name}") if inject else hyper["rank"],
            norm=hyper["ell_norm"],
            kind=DCT_KINDS[hyper["sim_type"]],
            update_gap=hyper["update_proj_gap"],
            rotate_state=hyper["rotate_subspace"],
            error_feedback=hyper["use_ef"],
            **adam_options(hyper),
        )
        if param.ndim == 2
        else muon.adam_trajectory(param, grads[name], **adam_options(hyper))
        for name, param in params.items()
    }


SUBSPACE: dict[str, Callable[..., Trajectories]] = {
    "frugal": frugal_trajectories,
    "galore": galore_trajectories,
    "dct_adamw": dct_trajectories,
}


def depends_on_injection(method: str, hyper: dict[str, Any]) -> bool:
    """Whether a reference run hangs on chance, or on signs or slots that its library chose."""
    if method == "frugal":
        if hyper["projection"] == "blocks":
            return hyper["block_order"] not in ("ascending", "descending")
        sign = not hyper["reset_statistics"] and hyper["update_gap"] < 30
        return sign or not hyper["projection"].startswith("svd")
    if method == "galore":
        return hyper["update_proj_gap"] < 30
    return not hyper["rotate_subspace"] and hyper["update_proj_gap"] < 30


def deviations(path: Path, method: str, inject: bool = True) -> dict[tuple[str, int], float]:
    """Returns the relative error of the oracle by leaf and recorded step."""
    hyper = read_meta(path)["hyperparameters"]
    with np.load(path) as file:
        data = {key: file[key] for key in file.files}
    recorded = sorted({int(key.split("/")[1]) for key in data if key.startswith("params/")})
    assert recorded == [1, 2, 5, 10, 30]
    names = hyper["parameter_order"]
    params = {name: to_jax_layout(data[f"init/{name}"]) for name in names}
    grads = {name: [to_jax_layout(g) for g in data[f"grads/{name}"]] for name in names}
    if method in SUBSPACE:
        thetas = SUBSPACE[method](hyper, data, params, grads, inject)
    else:
        thetas = {name: run_oracle(method, hyper, params[name], grads[name]) for name in names}
    assert {name: len(steps) for name, steps in thetas.items()} == dict.fromkeys(names, 30)
    errors = {}
    for name, t in itertools.product(names, recorded):
        expected = to_jax_layout(data[f"params/{t}/{name}"])
        error = np.abs(thetas[name][t - 1] - expected)
        errors[name, t] = float(np.max(error) / np.max(np.abs(expected)))
    return errors


def test_every_reference_file_is_present() -> None:
    found = Counter(method for _, method in FILES)
    if "JAXOPT_LAB_GOLDEN" in os.environ:  # another root has as many as it likes
        assert found, f"looked in {ROOT}"
    else:
        assert dict(found) == FILES_PER_METHOD, f"looked in {ROOT}"


@pytest.mark.parametrize(
    ("path", "method"), [pytest.param(*file, id=file[0].stem) for file in FILES]
)
def test_reproduces_recorded_trajectory(path: Path, method: str) -> None:
    for (name, t), error in deviations(path, method).items():
        assert error <= TOLERANCE, f"{name}, step {t}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("path", "method"),
    [
        pytest.param(path, method, id=path.stem)
        for path, method in FILES
        if method in SUBSPACE
        and not depends_on_injection(method, read_meta(path)["hyperparameters"])
    ],
)
def test_chooses_the_recorded_subspaces_by_itself(path: Path, method: str) -> None:
    for (name, t), error in deviations(path, method, inject=False).items():
        assert error <= TOLERANCE, f"{name}, step {t}: relative error {error:.1e}"


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem) for path, method in FILES if method == "galore"]
)
def test_svd_basis_spans_what_galore_recorded(path: Path) -> None:
    hyper = read_meta(path)["hyperparameters"]
    side = SIDES[hyper["proj_type"]]
    with np.load(path) as file:
        data = {key: file[key] for key in file.files}
    for name in hyper["projected_parameters"]:
        grads = [to_jax_layout(g) for g in data[f"grads/{name}"]]
        recorded = recorded_basis(data, f"projection/{name}", side, grads[0].shape)
        for t in range(1, 31, hyper["update_proj_gap"]):
            if not np.any(grads[t - 1]):
                continue
            pairs = galore.svd_basis(grads[t - 1], hyper["rank"], side), recorded(t)
            for found, basis in zip(*(x if isinstance(x, tuple) else (x,) for x in pairs)):
                signs = np.abs(found.T @ basis)  # the same vectors but for their signs
                np.testing.assert_allclose(signs, np.eye(hyper["rank"]), rtol=0, atol=TOLERANCE)
                assert np.all(found[np.argmax(np.abs(found), axis=0), range(hyper["rank"])] > 0)


def two_slopes(x: float) -> float:
    return 2 * x + 0.6 if x <= 0 else 2 * x - 0.4


def ripples(x: float) -> float:
    return -40.0 if x <= -0.9 else x * np.cos(8 * x) + np.sin(8 * x) + 3 * x**2


def terraces(x: float) -> float:
    for end, slope in ((-0.5, 2 * x), (-0.4, 1.0), (0.0, -7 / 8), (0.4, 7 / 8), (0.5, -1.0)):
        if x <= end:
            return slope
    return 2 * x


@pytest.mark.parametrize(
    ("slope", "last", "mean_of_last_20"),
    [(two_slopes, -0.3001, None), (ripples, -0.8121, -0.844), (terraces, 0.0136, None)],
)
def test_diffgrad_reproduces_published_one_dimensional_runs(
    slope: Callable[[float], float], last: float, mean_of_last_20: float | None
) -> None:
    # The published runs add eps after the bias correction of v, the optimizer file before it; at
    # gradients of order one the place of 1e-8 does not reach the digits printed.
    thetas = diffgrad.trajectory(
        np.array(-1.0),
        lambda t, theta: np.array(slope(float(theta))),
        learning_rate=0.1,
        b1=0.95,
        b2=0.999,
        eps=1e-8,
        steps=299,
    )
    assert abs(float(thetas[-1]) - last) <= 5e-5  # half of the last digit printed
    if mean_of_last_20 is not None:
        assert abs(float(np.mean(thetas[-20:])) - mean_of_last_20) <= 5e-4
