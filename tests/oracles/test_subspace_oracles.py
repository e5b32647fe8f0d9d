"""Options and identities of the subspace methods that the recorded trajectories leave open."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest

from . import badam, dct_adamw, frugal, galore, muon

# Between two float64 programs of this folder, numbers of order one in another order.
ROUNDING = 1e-12


def draws(shape: tuple[int, ...], count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    return [rng.standard_normal(shape) for _ in range(count)]


def orthonormal(n: int, rank: int, seed: int) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, rank)))[0]


def assert_same(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> None:
    np.testing.assert_allclose(np.stack(found), np.stack(expected), rtol=0, atol=ROUNDING)


def test_svd_basis_signs_ties_and_zero() -> None:
    left, right = galore.svd_basis(np.array([[0.0, -2.0], [1.0, 0.0], [0.0, 0.0]]), 2, "both")
    np.testing.assert_array_equal(left, np.eye(3)[:, :2])
    np.testing.assert_array_equal(right, [[0, 1], [-1, 0]] * np.array([[1, 1], [-1, 1]]))
    column = galore.svd_basis(np.array([[-3.0], [3.0]]), 1, "in")
    np.testing.assert_allclose(column, np.sqrt([[0.5], [0.5]]) * [[1], [-1]])
    np.testing.assert_array_equal(galore.svd_basis(np.zeros((3, 4)), 2), np.eye(3)[:, :2])


@pytest.mark.parametrize(
    ("side", "mirrored"),
    [("smaller", "smaller"), ("larger", "larger"), ("in", "out"), ("both", "both")],
)
def test_galore_sides_mirror_under_transposition(side: galore.Side, mirrored: galore.Side) -> None:
    param, *grads = draws((4, 6), 7)
    options: dict[str, Any] = {
        "learning_rate": 0.1,
        "selection": 2,
        "update_gap": 3,
        "weight_decay": 0.1,
    }
    here = galore.trajectory(param, grads, side=side, **options)
    there = galore.trajectory(param.T, [g.T for g in grads], side=mirrored, **options)
    assert_same([theta.T for theta in there], here)


def test_galore_ties_go_to_the_axis_in() -> None:
    param, *grads = draws((4, 4), 4)
    sides: tuple[galore.Side, ...] = ("smaller", "larger", "in", "out")
    runs = {
        side: galore.trajectory(param, grads, learning_rate=0.1, selection=2, side=side)
        for side in sides
    }
    assert_same(runs["smaller"], runs["in"])
    assert_same(runs["larger"], runs["out"])
    assert np.max(np.abs(runs["in"][-1] - runs["out"][-1])) > 1e-3


def test_bases_stay_where_the_gradient_of_a_refresh_is_zero() -> None:
    param, *grads = draws((3, 5), 6)
    grads[3] = np.zeros((3, 5))
    first = galore.svd_basis(grads[0], 2)
    options: dict[str, Any] = {"learning_rate": 0.1, "update_gap": 3}
    assert_same(
        galore.trajectory(param, grads, selection=2, **options),
        galore.trajectory(param, grads, selection=lambda t: first, **options),
    )
    assert_same(
        frugal.trajectory(param, grads, kind="svd", selection=2, **options),
        frugal.trajectory(param, grads, kind="svd", selection=lambda t: first, **options),
    )
    options: dict[str, Any] = {"learning_rate": 0.1, "update_gap": 4}
    columns = dct_adamw.dct_choose(grads[0].T, 2, 1, "dct3")
    assert_same(
        dct_adamw.trajectory(param, grads, selection=2, **options),
        dct_adamw.trajectory(param, grads, selection=lambda t: columns, **options),
    )


@pytest.mark.parametrize("kind", ["columns", "rows", "randk", "svd", "leaf"])
def test_frugal_with_state_everywhere_is_adam(kind: frugal.Kind) -> None:
    param, *grads = draws((3, 4), 6)
    whole = {
        "columns": [2, 0, 1],
        "rows": [3, 1, 0, 2],
        "randk": np.indices((3, 4)).reshape(2, -1),
        "svd": np.eye(3),
        "leaf": True,
    }
    options: dict[str, Any] = {"learning_rate": 0.1, "weight_decay": 0.2, "b2": 0.95}
    found = frugal.trajectory(
        param, grads, kind=kind, selection=lambda t: whole[kind], on_refresh="keep", **options
    )
    assert_same(found, muon.adam_trajectory(param, grads, eps=1e-8, **options))


@pytest.mark.parametrize("side", ["in", "both"])
def test_frugal_does_not_sign_the_rounding_noise_of_a_complete_basis(side: galore.Side) -> None:
    param, *grads = draws((3, 4), 6)
    left, right = orthonormal(3, 3, seed=0), orthonormal(4, 4, seed=1)
    signed, nothing = (
        frugal.trajectory(
            param,
            grads,
            learning_rate=0.1,
            kind="svd",
            selection=lambda t: (left, right) if side == "both" else left,
            side=side,
            free_rule=rule,
        )
        for rule in ("sign", "none")
    )
    assert_same(signed, nothing)


def test_frugal_rounds_coordinates_down_and_the_rest_half_to_even() -> None:
    shape = (6, 10)
    # 0.45 of 6 is 2.7, of 60 is 27; 0.49 of 10 is 4.9, of 60 is 29.4.
    assert [frugal.size("columns", shape, x) for x in (0.0, 0.45, 1.0)] == [0, 2, 6]
    assert [frugal.size("rows", shape, x) for x in (0.0, 0.49, 1.0)] == [0, 4, 10]
    assert [frugal.size("randk", shape, x) for x in (0.0, 0.45, 0.49)] == [0, 27, 29]
    assert [frugal.size("svd", shape, x) for x in (0.25, 0.45, 0.75)] == [2, 3, 4]
    assert [frugal.size("svd", (5, 10), x) for x in (0.5, 0.7)] == [2, 4]
    sides: tuple[galore.Side, ...] = ("in", "out", "both", "larger")
    assert [frugal.size("svd", shape, 0.45, side) for side in sides] == [3, 4, 3, 4]
    active = [
        len(frugal.active_leaves(["a", "b", "c", "d", "e"], x, 0, "ascending"))
        for x in (0.0, 0.1, 0.5, 0.7, 1.0)
    ]
    assert active == [0, 0, 2, 4, 5]


@pytest.mark.parametrize("rule", ["sign", "sgd", "none"])
@pytest.mark.parametrize("kind", ["columns", "rows", "randk", "svd", "leaf"])
def test_frugal_without_state_is_its_free_rule(kind: frugal.Kind, rule: frugal.FreeRule) -> None:
    param, *grads = draws((3, 4), 6)
    nothing = {"randk": ([], []), "svd": np.zeros((3, 0)), "leaf": False}
    found = frugal.trajectory(
        param,
        grads,
        learning_rate=0.1,
        kind=kind,
        selection=lambda t: nothing.get(kind, []),
        free_rule=rule,
        full_scale=0.5,
        free_scale=0.3,
        weight_decay=0.2,
    )
    theta, expected = param, []
    for g in grads:
        step = {"sign": np.sign(g), "sgd": g, "none": 0 * g}[rule]
        theta = theta * (1 - 0.1 * 0.2) - 0.1 * 0.5 * 0.3 * step
        expected.append(theta)
    assert_same(found, expected)


def test_frugal_projects_moments_with_the_rotation_and_its_square() -> None:
    # Axis in of size two, rank one, from the first axis to a line at 60 degrees.
    turned = np.array([[0.5], [np.sqrt(0.75)]])
    found = frugal.trajectory(
        np.zeros((2, 1)),
        [np.array([[4.0], [0.0]]), np.array([[0.0], [0.0]])],
        learning_rate=1.0,
        kind="svd",
        side="in",
        selection=lambda t: np.eye(2)[:, :1] if t == 1 else turned,
        update_gap=1,
        on_refresh="project",
        b1=0.5,
        b2=0.75,
    )
    m, v = 0.5 * 0.5 * (0.5 * 4), 0.75 * 0.25 * (0.25 * 16)
    u = m / (1 - 0.5**2) / (np.sqrt(v / (1 - 0.75**2)) + 1e-8)
    assert_same([found[1] - found[0]], [-u * turned])


@pytest.mark.parametrize("side", ["in", "out", "both"])
def test_frugal_projection_of_moments_undoes_signs_and_order(side: galore.Side) -> None:
    param, *grads = draws((4, 5), 9)
    left, right = orthonormal(4, 3, seed=2), orthonormal(5, 3, seed=3)
    flips = (np.array([1, -1, 1]), np.array([-1, -1, 1]))

    def choose(t: int, still: bool) -> galore.BasisValue:
        turn = 0 if still else t
        a = np.roll(left * (flips[0] if turn % 2 else 1), turn, axis=1)
        b = np.roll(right * (flips[1] if turn % 2 else 1), -turn, axis=1)
        return (a, b) if side == "both" else a if side == "in" else b

    runs = {
        (still, rule): frugal.trajectory(
            param,
            grads,
            learning_rate=0.1,
            kind="svd",
            side=side,
            selection=lambda t, still=still: choose(t, still),
            update_gap=2,
            on_refresh=rule,
        )
        for still in (True, False)
        for rule in ("keep", "project")
    }
    assert_same(runs[False, "project"], runs[True, "keep"])
    assert np.max(np.abs(runs[False, "keep"][-1] - runs[True, "keep"][-1])) > 1e-3


@pytest.mark.parametrize("kind", ["columns", "rows", "randk"])
def test_frugal_projection_of_moments_matches_indices(
    kind: Literal["columns", "rows", "randk"],
) -> None:
    """Equal to a projection between bases of unit vectors, which on the whole leaf is "randk"."""
    param, *grads = draws((5, 5), 9)
    picks = {1: [0, 3, 4], 4: [3, 2, 0], 7: [1, 0, 2]}
    options: dict[str, Any] = {
        "learning_rate": 0.1,
        "update_gap": 3,
        "on_refresh": "project",
        "free_scale": 0.3,
    }
    if kind == "randk":
        flat = frugal.trajectory(
            param.reshape(-1, 1),
            [g.reshape(-1, 1) for g in grads],
            kind="svd",
            side="in",
            selection=lambda t: np.eye(25)[:, picks[t]],
            **options,
        )
        expected = [theta.reshape(5, 5) for theta in flat]
    else:
        expected = frugal.trajectory(
            param,
            grads,
            kind="svd",
            side="in" if kind == "columns" else "out",
            selection=lambda t: np.eye(5)[:, picks[t]],
            **options,
        )
    found = frugal.trajectory(
        param,
        grads,
        kind=kind,
        selection=lambda t: np.unravel_index(picks[t], (5, 5)) if kind == "randk" else picks[t],
        **options,
    )
    assert_same(found, expected)


def test_frugal_resets_a_block_that_stays_active() -> None:
    param, *grads = draws((3,), 9)
    options: dict[str, Any] = {"learning_rate": 0.1, "weight_decay": 0.1}
    found = frugal.blocks_trajectory(
        {"w": param},
        [{"w": g} for g in grads],
        selection=lambda t: {"w"},
        update_gap=4,
        **options,
    )
    assert_same([step["w"] for step in found], restarted_adam(param, grads, 4, **options))


def restarted_adam(
    param: np.ndarray, grads: list[np.ndarray], gap: int, **options: Any
) -> list[np.ndarray]:
    thetas = [param]
    for start in range(0, len(grads), gap):
        period = grads[start : start + gap]
        thetas += muon.adam_trajectory(thetas[-1], period, b2=0.999, eps=1e-8, **options)
    return thetas[1:]


def test_dct_basis_is_the_fft_of_reordered_rows() -> None:
    """Makhoul's algorithm: evens ascending, odds descending, FFT, twiddle, real part."""
    for n in (1, 2, 5, 8):
        (a,) = draws((3, n), 1)
        reordered = np.concatenate([a[:, ::2], a[:, 1::2][:, ::-1]], axis=1)
        twiddle = 2 * np.exp(-1j * np.pi * np.arange(n) / (2 * n))
        scale = np.where(np.arange(n) == 0, 1 / np.sqrt(4 * n), 1 / np.sqrt(2 * n))
        fft = np.real(np.fft.fft(reordered) * twiddle) * scale
        assert_same([a @ dct_adamw.dct_basis(n, "dct2")], [fft])
        assert_same([fft @ dct_adamw.dct_basis(n, "dct3")], [a])


@pytest.mark.parametrize("kind", ["dct2", "dct3"])
def test_dct_choice_by_length_has_the_least_projection_error(kind: dct_adamw.Kind) -> None:
    q = dct_adamw.dct_basis(6, kind)
    for a in draws((4, 6), 5):
        errors = {
            columns: np.sum((a - a @ q[:, columns] @ q[:, columns].T) ** 2)
            for columns in itertools.combinations(range(6), 3)
        }
        chosen = dct_adamw.dct_choose(a, 3, 2, kind)
        assert tuple(sorted(chosen)) == min(errors, key=lambda columns: errors[columns])


def test_dct_norms_differ_and_ties_go_to_the_lower_index() -> None:
    q = dct_adamw.dct_basis(4, "dct2")
    spread, peaked = np.outer([1, 1, 1], q[:, 1]), np.outer([2, 0, 0], q[:, 3])
    assert dct_adamw.dct_choose(spread + peaked, 1, 1, "dct2") == [1]
    assert dct_adamw.dct_choose(spread + peaked, 1, 2, "dct2") == [3]
    np.testing.assert_array_equal(dct_adamw.dct_choose(np.zeros((2, 4)), 3, 2, "dct2"), [0, 1, 2])


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (4, 4)])
@pytest.mark.parametrize("error_feedback", [False, True])
def test_dct_of_full_rank_is_adam_in_the_turned_basis(
    shape: tuple[int, int], error_feedback: bool
) -> None:
    param, *grads = draws(shape, 7)
    q = dct_adamw.dct_basis(4, "dct2")
    tall = shape[0] > shape[1]  # the axis out is the smaller one; a tie projects in
    options: dict[str, Any] = {"learning_rate": 0.1, "weight_decay": 0.1}
    found = dct_adamw.trajectory(
        param, grads, selection=4, kind="dct2", error_feedback=error_feedback, **options
    )
    turned = muon.adam_trajectory(
        param @ q if tall else q.T @ param,
        [g @ q if tall else q.T @ g for g in grads],
        b2=0.999,
        eps=1e-8,
        **options,
    )
    assert_same(found, [x @ q.T if tall else q @ x for x in turned])


def named(xs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    return dict(zip("abcd", xs, strict=True))


def badam_inputs() -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    arrays = draws((3, 2), 4 * 13)
    return named(arrays[:4]), [named(arrays[i : i + 4]) for i in range(4, 52, 4)]


def test_badam_with_one_block_is_adam_until_the_switch_and_then_starts_again() -> None:
    params, grads = badam_inputs()
    options: dict[str, Any] = {"learning_rate": 0.1, "weight_decay": 0.2}
    for gap in (12, 5):
        steps = badam.trajectory(
            params, grads, selection=lambda t: set("abcd"), switch_every=gap, **options
        )
        for name, param in params.items():
            expected = restarted_adam(param, [g[name] for g in grads], gap, **options)
            assert_same([step[name] for step in steps], expected)


def test_badam_freezes_inactive_leaves_and_restarts_every_state() -> None:
    params, grads = badam_inputs()
    asked = []

    def selection(t: int) -> set[str]:
        asked.append(t)
        return badam.active_block(["ab", "c"], (t - 1) // 4, "descending")

    steps = badam.trajectory(
        params,
        grads,
        learning_rate=0.1,
        selection=selection,
        switch_every=4,
        always_active="d",
        decayed={"a", "d"},
        weight_decay=0.2,
    )
    assert asked == [1, 5, 9]
    for name, periods in {"a": [1], "b": [1], "c": [0, 2], "d": [0, 1, 2]}.items():
        decay = 0.2 if name in "ad" else 0.0
        theta, expected = params[name], []
        for period in range(3):
            part = [g[name] for g in grads[4 * period : 4 * period + 4]]
            moved = restarted_adam(theta, part, 4, learning_rate=0.1, weight_decay=decay)
            expected += moved if period in periods else [theta] * 4
            theta = expected[-1]
        found = [step[name] for step in steps]
        assert_same(found, expected)
        for t in range(1, 12):  # frozen means bit for bit
            assert (t // 4 in periods) != np.array_equal(found[t], found[t - 1])


def test_badam_is_frugal_without_a_free_rule_and_without_decay() -> None:
    params, grads = badam_inputs()

    def selection(t: int) -> set[str]:
        return badam.active_block(["a", "bc", "d"], (t - 1) // 3, "ascending")

    found = badam.trajectory(params, grads, learning_rate=0.1, selection=selection, switch_every=3)
    expected = frugal.blocks_trajectory(
        params, grads, learning_rate=0.1, selection=selection, update_gap=3, free_rule="none"
    )
    for name in params:
        assert_same([step[name] for step in found], [step[name] for step in expected])


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (galore.trajectory, {"selection": 3}, "rank must be in"),
        (galore.trajectory, {"selection": lambda t: np.eye(3)}, "do not fit a kernel"),
        (galore.trajectory, {"selection": 1, "side": "left"}, "side must be"),
        (galore.trajectory, {"selection": 1, "eps": 0}, "eps must be positive"),
        (frugal.trajectory, {"selection": 1, "kind": "rows"}, "a rank for svd only"),
        (frugal.trajectory, {"selection": 1, "kind": "row"}, "kind must be"),
        (
            frugal.trajectory,
            {"selection": 1, "kind": "svd", "free_rule": "same"},
            "free_rule must be one of",
        ),
        (
            frugal.trajectory,
            {"selection": 1, "kind": "svd", "on_refresh": "drop"},
            "on_refresh must be",
        ),
        (frugal.trajectory, {"selection": 1, "kind": "svd", "eps": 0}, "eps must be positive"),
        (dct_adamw.trajectory, {"selection": 3}, "rank must be in"),
        (dct_adamw.trajectory, {"selection": 1, "norm": 3}, "norm must be 1 or 2"),
        (dct_adamw.trajectory, {"selection": 1, "kind": "dct1"}, "kind must be dct2 or dct3"),
        (dct_adamw.trajectory, {"selection": 1, "eps": 0}, "eps must be positive"),
    ],
)
def test_subspace_oracles_refuse(
    rule: Callable[..., Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rule(np.ones((2, 3)), [np.ones((2, 3))], learning_rate=0.1, **options)


@pytest.mark.parametrize("rule", [frugal.blocks_trajectory, badam.trajectory])
def test_block_oracles_refuse_unknown_leaves(rule: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"\['x'\], the leaves are \['w'\]"):
        rule({"w": np.ones(2)}, [{"w": np.ones(2)}], learning_rate=0.1, selection=lambda t: {"x"})
