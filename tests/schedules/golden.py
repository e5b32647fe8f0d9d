"""The reference cases of schedules under tests/golden/adapters, and our schedule for each.

Cases are found by their names in whatever files of schedules there are; a name that maps to nothing
is an error.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import optax

from jaxopt_lab import schedules

ROOT = pathlib.Path(
    os.environ.get("JAXOPT_LAB_GOLDEN", pathlib.Path(__file__).parents[1] / "golden")
)
# Inputs, intermediate values that other cases imply, and the authors' numerical minimisation of the
# bound, which is another method.
NO_CASES = re.compile(
    r"uba_(T|eta_max|eta_min|phis)|ref_G_\w+|ref_(smooth|width)_.*|ref_lbfgs_(in|out)"
    r"|tf_(warmup|stable|decay)"
)
LENGTH = 205  # of every table that tests make, as long as the longest here: little is compiled
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Case:
    """A schedule and what it is at the steps from the first one on."""

    name: str
    schedule: optax.Schedule
    first: int
    expected: np.ndarray


def table(schedule: optax.Schedule, steps: int, first: int = 0, dtype: Any = int) -> np.ndarray:
    """The values at `steps` steps from the first one on, from a table of a common length."""
    size = max(steps, LENGTH)
    return schedules.as_table(schedule, (first + np.arange(size)).astype(dtype))[:steps]


def load() -> list[Case]:
    found = []
    for path in sorted((ROOT / "adapters").glob("*schedules*.npz")):
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
        for key in arrays:
            found += [
                dataclasses.replace(c, name=f"{path.stem}-{c.name}") for c in _of(key, arrays)
            ]
    return found


def medians() -> list[tuple[str, np.ndarray, int, np.ndarray]]:
    """(name, norms, width, smoothed norms) of the running median."""
    found = []
    for path in sorted((ROOT / "adapters").glob("*schedules*.npz")):
        with np.load(path) as file:
            for key in file.files:
                if match := re.fullmatch(r"ref_smooth_tau([\d.]+)_(\w+)", key):
                    tau, name = match.groups()
                    width = int(file[f"ref_width_tau{tau}"])
                    found.append((key, file[f"ref_G_{name}"], width, file[key]))
    return found


def _of(key: str, arrays: Arrays) -> Iterator[Case]:
    if NO_CASES.fullmatch(key):
        return
    for pattern, cases in _CASES.items():
        if match := re.fullmatch(pattern, key):
            for label, schedule, first, expected in cases(arrays, *match.groups()):
                yield Case(f"{key}{label}", schedule, first, expected)
            return
    raise KeyError(f"no schedule is mapped to the reference {key!r}")


Found = Iterator[tuple[str, optax.Schedule, int, np.ndarray]]


def _uba(arrays: Arrays, angle: Any, end: str | None) -> Found:
    expected = arrays[f"uba_{angle}{end or ''}"]
    total = int(arrays["uba_T"])
    for phi, row in zip(arrays["uba_phis"], expected, strict=True):
        bounds = float(arrays["uba_eta_max"]), float(arrays["uba_eta_min"])
        schedule = schedules.uba_schedule(*bounds, total, float(phi), angle)
        yield f"-phi{phi:g}", schedule, total if end else 0, np.atleast_1d(row)


def _chebyshev(arrays: Arrays, kappa: str) -> Found:
    expected, number = arrays[f"uba_cheb_kappa{kappa}"], float(kappa)
    yield (
        "",
        schedules.uba_schedule(1.0, 1 / number, expected.size, 2 * number, "chebyshev"),
        0,
        expected,
    )


def _refined(arrays: Arrays, what: str, kind: Any, name: str) -> Found:
    norms, expected = arrays[f"ref_G_{name}"], arrays[f"ref_{what}_{kind}_{name}"]
    smoothing = float(what.removeprefix("tau")) if what.startswith("tau") else 0.0
    kind = {"sgd": "l2", "l1": "l1"}[kind]
    schedule = schedules.refined_schedule(norms, norms.size, 1.0, kind, smoothing)
    yield "", schedule, 0, expected / expected.max()


def _lengths(arrays: Arrays) -> tuple[int, int, int]:
    warmup, stable, decay = (int(arrays[f"tf_{name}"]) for name in ("warmup", "stable", "decay"))
    return warmup, stable, decay


def _wsd(arrays: Arrays, shape: Any, ratio: str) -> Found:
    schedule = schedules.wsd_schedule(
        1.0,
        *_lengths(arrays),
        init_value=float(ratio),
        end_value=float(ratio),
        decay_shape="sqrt" if shape == "1-sqrt" else shape,
        zero_based_warmup=True,
    )
    yield "", schedule, 0, arrays[f"tf_wsd_{shape}_min{ratio}"]


def _plain_decay(arrays: Arrays, shape: Any) -> Found:
    warmup, stable, decay = _lengths(arrays)
    schedule = schedules.wsd_schedule(
        1.0, warmup, 0, stable + decay, decay_shape=shape, zero_based_warmup=True
    )
    # After its end transformers' cosine rises again.
    yield "", schedule, 0, arrays[f"tf_{shape}"][: warmup + stable + decay + 1]


def _inverse_sqrt(arrays: Arrays) -> Found:
    schedule = schedules.inverse_sqrt_schedule(1.0, _lengths(arrays)[0], zero_based_warmup=True)
    yield "", schedule, 0, arrays["tf_invsqrt"]


_CASES: dict[str, Callable[..., Found]] = {
    r"uba_(chebyshev|continuous)(_end)?": _uba,
    r"uba_cheb_kappa(\d+)": _chebyshev,
    r"ref_(raw|norm|tau[\d.]+)_(sgd|l1)_(\w+)": _refined,
    r"tf_wsd_([\w-]+)_min([\d.]+)": _wsd,
    r"tf_(linear|cosine)": _plain_decay,
    r"tf_invsqrt": _inverse_sqrt,
}
