"""How long steps are timed, and what is said of seconds."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.compare.summary import verdict
from experiments.harness import timing
from experiments.harness.runs import Timing, fastest, ratio_text, times


class Loop:
    """A loop that counts its rounds."""

    chunk_steps = 1

    def __init__(self) -> None:
        self.rounds = 0

    def start(self, peak: float, seed: int) -> None:
        del peak, seed

    def run_chunk(self, state: Any, peak: float, seed: int) -> tuple[Any, float]:
        self.rounds += 1
        return state, 0.0


@pytest.mark.parametrize(("enough", "rounds"), [(True, 2), (False, 5)])
def test_rounds_go_on_until_the_ratios_have_settled(
    enough: bool, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "ROUNDS", (2, 5))
    monkeypatch.setattr(timing, "settled", lambda *_: enough)
    loops = {"adamw": Loop(), "lion": Loop()}
    measured = timing.measure(loops, dict.fromkeys(loops, 0.1), "adamw")
    for name, loop in loops.items():
        assert loop.rounds == rounds + 1  # the first is dropped
        assert len(measured.wall[name]) == len(measured.cpu[name]) == rounds


def test_settled_is_a_small_standard_error_of_the_median() -> None:
    def is_settled(own: list[float]) -> bool:
        return timing.settled(Timing({"adamw": [1.0] * len(own), "lion": own}, {}), "adamw")

    assert is_settled([2.0] * 7)
    assert is_settled([1.96, 2.0, 2.04] * 3)  # 0.93 / 3 times 4%
    assert not is_settled([1.8, 2.0, 2.2] * 3)  # 0.93 / 3 times 20%, which is above 2%
    assert is_settled([1.8, 2.0, 2.2] * 30)  # 0.93 / sqrt(90) times 20%


def test_quartiles_are_those_of_the_ratios_within_a_round() -> None:
    wall = {"adamw": [1.0, 2.0, 1.0, 4.0, 1.0], "lion": [1.0, 4.0, 3.0, 16.0, 5.0]}
    found = times("lion", Timing(wall, {"adamw": [2.0] * 5, "lion": [1.0] * 5}), "adamw")
    assert found["step_time_ratio"] == 3
    assert found["step_time_quartiles"] == [2, 4]
    assert found["seconds_per_step"] == 3  # times adamw's median
    assert (ratio_text(found), ratio_text(found, "cpu")) == (
        "3.00 (2.00 to 4.00)", "0.50 (0.50 to 0.50)",
    )  # fmt: skip
    assert ratio_text(times("lion", Timing(wall, {}), "adamw"), "cpu") == "-"


def test_only_what_is_measured_is_said_of_time() -> None:
    assert fastest({"a": (0.9, 1.0, 1.05), "b": (1.1, 1.2, 1.3)}) == ("a", None)
    name, reason = fastest({"a": (0.9, 1.0, 1.05), "b": (1.04, 1.2, 1.3), "c": (2, 2, 2)})
    assert (name, reason) == ("a", "the middle halves of the times of a, b overlap")
    name, reason = fastest({"a": (0.8, 1.0, 1.05), "b": (2.0, 2.0, 2.0)})
    assert (name, reason) == (
        "a",
        "the middle half of the times of a spans 0.80 to 1.05 of their median, more than 20% of it",
    )


@pytest.mark.parametrize(
    ("steps", "quartiles", "said"),
    [
        (50.0, [1.1, 1.3], "muon reaches it in the fewest seconds: 6 (adamw: 10)."),
        (80.0, [1.1, 1.3], "Nothing is said about the fewest seconds: the middle halves"),
        (50.0, [0.7, 1.3], "Nothing is said about the fewest seconds: the middle half of the tim"),
    ],
)
def test_seconds_are_put_in_order_only_where_they_are_apart(
    steps: float, quartiles: list[float], said: str
) -> None:
    def row(name: str, steps: float, ratio: float, quartiles: list[float]) -> dict[str, Any]:
        return {
            "optimizer": name, "final_loss": 1.0, "final_loss_spread": None,
            "learning_rate_at_edge": False, "steps_to_target": steps,
            "seconds_to_target": 0.1 * ratio * steps, "seconds_per_step": 0.1 * ratio,
            "step_time_ratio": ratio, "step_time_quartiles": quartiles,
        }  # fmt: skip

    rows = [row("adamw", 100.0, 1.0, [1.0, 1.0]), row("muon", steps, 1.2, quartiles)]
    lines = verdict(rows, 1.5, "nats")
    assert lines[0].startswith("muon reaches the target of 1.5000 nats in the fewest steps: ")
    assert lines[1].startswith(said)
