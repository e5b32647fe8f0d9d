"""Each subspace rule beside its float64 numpy program.

Where a selection hangs on signs, on an order or on chance, both sides are given the same one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import optax

from tests.oracles import badam, dct_adamw, frugal, galore, muon, regimes
from tests.transforms import selections
from tests.transforms.oracle_runs import STEPS, Run, Streams, Trajectory

RATE = 0.1
_ADAM: dict[str, Any] = {"b1": 0.8, "b2": 0.99, "eps": 1e-4, "weight_decay": 0.1}
_FREE = {"sign": optax.scale_by_sign, "sgd": optax.identity, "none": optax.set_to_zero}
# Rounding of ten steps; a step is at most a tenth of the largest entry.
_FLOAT32 = 5e-6


@functools.cache
def all_runs() -> tuple[Run, ...]:
    """Every setting of every subspace rule."""
    return (*_galore(), *_dct(), *_frugal(), *_blocks(), *_badam())


@functools.cache
def _streams() -> dict[str, tuple[np.ndarray, list[np.ndarray]]]:
    """Matrices of three proportions, in regimes that a decomposition in float64 resolves."""
    wide, wide_grads = regimes.gradients("large_weights", (4, 7), STEPS)
    return {
        "tall": regimes.gradients("tiny", (6, 4), STEPS),
        "wide": (wide / 1e3, [10 * g for g in wide_grads]),
        "square": regimes.gradients("zeros_first", (5, 5), STEPS),
        "vector": regimes.gradients("wide_range", (3,), STEPS),
    }


def _split(
    program: Callable[..., Trajectory], whole: Callable[..., Trajectory]
) -> Callable[[Streams], dict[str, Trajectory]]:
    """Runs `program(name, parameter, gradients)` on the matrices and `whole` on the vector."""
    return lambda streams: {
        name: whole(*stream) if name == "vector" else program(name, *stream)
        for name, stream in streams.items()
    }


def _stored(make: Callable[[np.random.Generator, tuple[int, ...]], Any], gap: int) -> Any:
    """A draw for every matrix and every step at which it may be selected: name -> step -> value."""
    rng = np.random.default_rng(0)
    return {
        name: {t: make(rng, param.shape) for t in range(1, STEPS + 1) if gap == 1 or t % gap < 2}
        for name, (param, _) in _streams().items()
        if param.ndim == 2
    }


def _orthonormal(rng: np.random.Generator, size: int, rank: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((size, rank)))[0]


def _one_side(side: galore.Side, rank: int) -> Callable[..., np.ndarray]:
    def make(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        axis = ["in", "out"].index(galore.resolve_side(shape, side))
        return _orthonormal(rng, shape[axis], rank)

    return make


def _galore() -> list[Run]:
    def run(label: str, injected: Any = None, method: str = "full", **settings: Any) -> Run:
        side = settings.pop("side", "smaller")
        settings = {"update_gap": 4, "learning_rate": RATE, **settings}
        rank = settings.pop("rank", 2)
        projection = lambda subspace: subspace.svd(side, method)  # noqa: E731
        if injected is not None:
            choose = selections.lookup(injected)
            projection = lambda subspace: subspace.svd(side, choose=choose)  # noqa: E731

        def program(name: str, param: np.ndarray, grads: list[np.ndarray]) -> Trajectory:
            chosen = rank if injected is None else injected[name].__getitem__
            return galore.trajectory(param, grads, selection=chosen, side=side, **settings)

        adam = {k: v for k, v in settings.items() if k not in ("update_gap", "scale")}
        whole = functools.partial(galore.adam_trajectory, **adam)
        return Run(
            "galore_adamw",
            label,
            {**settings, "rank": rank},
            _split(program, whole),
            _streams(),
            None if injected is None else _FLOAT32,
            projection,
        )

    return [
        *(run(side, side=side) for side in ("smaller", "larger", "in", "out", "both")),
        run("decay", scale=0.7, update_gap=3, **_ADAM),
        run("every_step", update_gap=1, rank=1),
        run("gram", method="gram", update_gap=3, side="in"),
        run("gram_both", method="gram", side="both", rank=3),
        run("injected", _stored(_one_side("smaller", 2), 4), **_ADAM),
        run("injected_out", _stored(_one_side("out", 1), 3), side="out", rank=1, update_gap=3),
    ]


def _dct() -> list[Run]:
    def run(label: str, injected: bool = False, **settings: Any) -> Run:
        kind, norm = settings.pop("kind", 3), settings.pop("norm", 1)
        basis: dct_adamw.Kind = "dct2" if kind == 2 else "dct3"
        rank = settings.pop("rank", 2)
        settings = {"learning_rate": RATE, "update_gap": 4, **settings}
        draw = lambda rng, shape: rng.permutation(min(shape))[:rank]  # noqa: E731
        stored = _stored(draw, settings["update_gap"]) if injected else None
        choose = selections.lookup(stored) if stored else None

        def program(name: str, param: np.ndarray, grads: list[np.ndarray]) -> Trajectory:
            theirs = dict(settings)
            theirs["rotate_state"] = theirs.pop("rotate", True)
            chosen = stored[name].__getitem__ if stored else rank
            return dct_adamw.trajectory(
                param, grads, selection=chosen, norm=norm, kind=basis, **theirs
            )

        return Run(
            "dct_adamw",
            label,
            {**settings, "rank": rank},
            _split(program, _adam(settings)),
            _streams(),
            _FLOAT32 if injected else None,
            lambda subspace: subspace.dct(kind, norm, choose),
        )

    feedback: dict[str, Any] = {"error_feedback": True}
    return [
        run("dct3"),
        run("dct2", kind=2, update_gap=1),
        run("length", norm=2, update_gap=1, **_ADAM),
        run("length_dct2", norm=2, kind=2, rank=3),
        run("slots", rotate=False),
        run("feedback", update_gap=1, **feedback),
        run("feedback_length", norm=2, kind=2, rank=1, **feedback, **_ADAM),
        run("injected", injected=True, **_ADAM),
        run("injected_every_step", injected=True, kind=2, update_gap=1),
        run("injected_slots", injected=True, rotate=False, rank=3),
        run("injected_feedback", injected=True, rank=3, **feedback),
    ]


def _frugal() -> list[Run]:
    def run(label: str, kind: Any, stored: Any, projection: Any, **settings: Any) -> Run:
        settings = {"learning_rate": RATE, "update_gap": 4, **settings}
        density, side = settings.pop("density", 0.5), settings.pop("side", "smaller")
        rule = settings.pop("free", "sign")

        def program(name: str, param: np.ndarray, grads: list[np.ndarray]) -> Trajectory:
            theirs = dict(settings)
            theirs["full_scale"] = theirs.pop("projected_scale", 1.0)
            chosen: Any = frugal.size("svd", param.shape, density, side) if not stored else None
            if kind == "randk":
                chosen = lambda t: np.unravel_index(stored[name][t], param.shape)  # noqa: E731
            elif stored and side == "both":
                chosen = lambda t: tuple(stored[f"{name}/{x}"][t] for x in ("right", "left"))  # noqa: E731
            elif stored:
                chosen = stored[name].__getitem__
            return frugal.trajectory(
                param, grads, kind=kind, selection=chosen, side=side, free_rule=rule, **theirs
            )

        return Run(
            "frugal_adamw",
            label,
            {**settings, "density": density, "free": _FREE[rule]()},
            _split(program, _adam(settings)),
            _streams(),
            _FLOAT32 if stored else None,
            projection,
        )

    def coordinates(label: str, kind: Any, **settings: Any) -> Run:
        density, gap = settings.get("density", 0.5), settings.get("update_gap", 4)

        def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
            total = {"columns": shape[0], "rows": shape[1], "randk": shape[0] * shape[1]}[kind]
            return rng.permutation(total)[: frugal.size(kind, shape, density)]

        stored = _stored(draw, gap)
        choose = selections.lookup(stored)
        projections = {
            "columns": lambda subspace: subspace.columns("in", choose),
            "rows": lambda subspace: subspace.columns("out", choose),
            "randk": lambda subspace: subspace.entries(choose),
        }
        return run(label, kind, stored, projections[kind], **settings)

    def singular(label: str, injected: bool = False, **settings: Any) -> Run:
        side, gap = settings.get("side", "smaller"), settings.get("update_gap", 4)
        rank = lambda shape: frugal.size("svd", shape, settings.get("density", 0.5), side)  # noqa: E731
        if not injected:
            return run(label, "svd", None, lambda subspace: subspace.svd(side), **settings)
        if side != "both":
            stored = _stored(lambda rng, shape: _one_side(side, rank(shape))(rng, shape), gap)
            choose = selections.lookup(stored)
        else:
            ends = {
                end: _stored(lambda r, s, axis=axis: _orthonormal(r, s[axis], rank(s)), gap)
                for axis, end in enumerate(("right", "left"))
            }
            stored = {f"{name}/{end}": of[name] for end, of in ends.items() for name in of}
            choose = selections.pairs(stored)
        return run(
            label, "svd", stored, lambda subspace: subspace.svd(side, choose=choose), **settings
        )

    scales: dict[str, Any] = {"projected_scale": 0.7, "free_scale": 0.3}
    project: dict[str, Any] = {"on_refresh": "project"}
    keep: dict[str, Any] = {"on_refresh": "keep"}
    return [
        coordinates("columns", "columns"),
        coordinates("columns_keep", "columns", free="sgd", **scales, **keep, **_ADAM),
        coordinates("columns_project", "columns", update_gap=3, **project),
        coordinates("rows", "rows", density=0.6, update_gap=1, free="none"),
        coordinates("rows_project", "rows", free="sgd", **project, **_ADAM),
        coordinates("entries", "randk", density=0.3, free_scale=0.3, **_ADAM),
        coordinates("entries_project", "randk", update_gap=3, free="sgd", **project),
        singular("svd", update_gap=3, **scales, **_ADAM),
        singular("svd_keep", free="sgd", **keep),
        singular("svd_project", side="out", update_gap=3, free="none", **project),
        # What is not on the diagonal of U^T G V is rounding, which eps has to outweigh.
        singular("svd_both_project", side="both", **project, **_ADAM),
        singular("svd_injected", True, side="larger", density=0.4, **scales),
        singular("svd_injected_project", True, side="in", update_gap=3, free="sgd", **project),
        singular("svd_injected_both", True, side="both", density=0.6, **project, **_ADAM),
    ]


def _blocks() -> list[Run]:
    def run(label: str, order: Any, density: float, free: Any, **settings: Any) -> Run:
        settings = {"learning_rate": RATE, "update_gap": 4, "always_full": (), **settings}
        gap = settings["update_gap"]
        names = sorted(_streams())

        def oracle(streams: Streams) -> dict[str, Trajectory]:
            theirs = {k: v for k, v in settings.items() if k != "always_full"}
            theirs["full_scale"] = theirs.pop("projected_scale", 1.0)
            steps = frugal.blocks_trajectory(
                {name: streams[name][0] for name in names},
                [{name: streams[name][1][t] for name in names} for t in range(STEPS)],
                selection=lambda t: frugal.active_leaves(names, density, (t - 1) // gap, order),
                free_rule=free,
                **theirs,
            )
            return {name: [step[name] for step in steps] for name in names}

        hyperparams = {**settings, "density": density, "free": _FREE[free]()}
        return Run(
            "frugal_adamw",
            label,
            hyperparams,
            oracle,
            _streams(),
            _FLOAT32,
            lambda subspace: subspace.blocks(order),
        )

    return [
        run("blocks", "descending", 0.5, "sign"),
        run("blocks_up", "ascending", 0.25, "sgd", free_scale=0.3, projected_scale=0.7, **_ADAM),
        run("blocks_of_one_step", "descending", 0.25, "none", update_gap=1),
    ]


def _badam() -> list[Run]:
    def run(label: str, blocks: list[Any], order: Any = "descending", **settings: Any) -> Run:
        decayed = settings.pop("decayed", None)
        settings = {"learning_rate": RATE, "update_gap": 3, **settings}
        gap = settings["update_gap"]
        always = settings.get("always_full", ())

        def oracle(streams: Streams) -> dict[str, Trajectory]:
            theirs = {k: v for k, v in settings.items() if k in ("learning_rate", *_ADAM)}
            members = [[name for name in streams if name.startswith(start)] for start in blocks]
            steps = badam.trajectory(
                {name: param for name, (param, _) in streams.items()},
                [{name: grads[t] for name, (_, grads) in streams.items()} for t in range(STEPS)],
                selection=lambda t: badam.active_block(members, (t - 1) // gap, order),
                switch_every=gap,
                always_active=always,
                decayed=decayed,
                **theirs,
            )
            return {name: [step[name] for step in steps] for name in streams}

        ours = {**settings, "order": order}
        if decayed is not None:
            ours["mask"] = {name: name in decayed for name in _streams()}
        return Run("badam", label, ours, oracle, _streams(), _FLOAT32)

    sides = {"group": lambda name: "even" if name == "square" else "not"}
    return [
        run("leaves", ["square", "tall", "vector", "wide"]),
        run("ascending", ["square", "tall", "vector", "wide"], "ascending", **_ADAM),
        run(
            "masked", ["s", "t", "w"], always_full=("vector",), decayed={"tall", "vector"}, **_ADAM
        ),
        run("grouped", ["square", ("tall", "vector", "wide")], update_gap=1, **sides),
    ]


def _adam(settings: Mapping[str, Any]) -> Callable[..., Trajectory]:
    options = {"b2": 0.999, "eps": 1e-8}
    options |= {k: v for k, v in settings.items() if k in ("learning_rate", *_ADAM)}
    return functools.partial(muon.adam_trajectory, **options)
