"""The experiment on fine-tuning from its command line: results, resumption, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from experiments.finetune import methods, pictures, study, summary
from experiments.finetune.__main__ import DEFAULT
from experiments.harness import UserError
from experiments.harness.candidates import Candidate
from experiments.harness.progress import Progress
from experiments.harness.runs import Timing
from experiments.harness.store import read_tree, write_tree
from experiments.harness.workload import Workload
from experiments.workloads import texts
from experiments.workloads.language_model import read_text
from tests.experiments.tiny import SCRIPTS, TEXTS, results

FINETUNE = SCRIPTS["finetune"]


@pytest.fixture(scope="module")
def tiny() -> dict[str, Workload]:
    return texts.workloads("tiny", {name: TEXTS[name] for name in ("first", "second")})


@pytest.mark.slow
def test_table_says_what_is_trained_and_what_is_forgotten(finished: Callable[..., Path]) -> None:
    content = results(finished("finetune"))
    full, lora, other = content["table"]
    assert [line["optimizer"] for line in (full, lora, other)] == ["full", "lora", "lora-ga"]
    assert full["trained"] == content["settings"]["parameters"]
    assert lora["trained"] == other["trained"] == 4 * (4 * 32 + 2 * 80)  # rank x sides of kernels
    for line in content["table"]:
        own = [
            r for r in content["runs"]
            if (r["optimizer"], r["learning_rate"]) == (line["optimizer"], line["learning_rate"])
        ]  # fmt: skip
        assert line["first_loss"] == pytest.approx(np.mean([r["first_loss"][-1] for r in own]))
        assert 8 * line["trained"] < line["state_bytes"] <= 8 * line["trained"] + 8
    assert lora["part_of_lora"] == 1
    assert len(content["runs"]) == 3 * 2 + 2 * 3  # and three small rates, for LoRA and LoRA-GA
    assert [line["learning_rate"] for line in content["equal_rates"]] == [7.41e-5, 2.22e-4, 6.67e-4]


@pytest.mark.slow
def test_all_start_from_the_pretrained_model(finished: Callable[..., Path]) -> None:
    content = results(finished("finetune"))
    start = content["runs"][0]
    for one in content["runs"]:
        for name in ("validation_loss", "first_loss"):
            assert one[name][0] == pytest.approx(start[name][0], rel=1e-4)
        assert one["moved"][0] < 1e-4 < one["moved"][-1]
    last = content["pretraining"]["validation_loss"][-1]
    assert start["first_loss"][0] == pytest.approx(last, rel=1e-6)


@pytest.mark.slow
def test_memory_is_that_of_what_is_trained() -> None:
    found = {"size": "tiny", "rank": 8, **study.step_memory("tiny", 50)}
    steps = found["steps"]
    assert list(steps) == ["full", "lora", "lora-factored"]
    for one in steps.values():
        assert one["state_bytes"] == 8 * one["trained"] + 4
        assert one["temporary_bytes"] > 0
    assert steps["full"]["trained"] > steps["lora"]["trained"]
    (said,) = summary.memory_verdict(found)
    assert said.startswith("At size tiny and rank 8 LoRA trains")


@pytest.mark.slow
def test_other_weights_are_refused(
    copied: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    out = copied("finetune")
    path = out / "pretrained.npz"
    half = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(half)
    assert FINETUNE.run(out) == 2
    assert "pretrained.npz: no weights of a model of these settings" in capsys.readouterr().err
    assert path.read_bytes() == half


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--methods pissa-3", "unknown method 'pissa-3'"),
        ("--methods lora-ga-0", "'lora-ga-0': expected a positive gamma, such as lora-ga-64"),
        ("--methods lora-ga-x", "'lora-ga-x': expected a positive gamma"),
        ("--pretrain-budget 7", "--pretrain-budget 7: expected a multiple of 20"),
        ("--rank 0", "--rank: 0 is not a positive whole number"),
        ("--rank 17", "--rank 17: rank 17 is above the smaller side of kernel"),
        ("--rank 9", "--rank 9: lora_ga takes 2 r = 18 directions"),
        ("--memory-size 7B", "--memory-size 7B: unknown; expected none or one of"),
        ("--pretrain-text no/such/file", "--pretrain-text no/such/file: cannot be read"),
    ],
)
def test_bad_options_are_one_line(
    options: str, message: str, out: Path, capsys: pytest.CaptureFixture
) -> None:
    assert message in FINETUNE.refused(out, capsys, *options.split())


@pytest.mark.slow
def test_pretraining_goes_on_where_it_was(
    finished: Callable[..., Path],
    tiny: dict[str, Workload],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    progress = Progress(20, Console(quiet=True))
    path, written = tmp_path / "pretrained.npz", []

    def stopping(path: Path, tree: Any, record: dict) -> None:
        write_tree(path, tree, record)
        written.append(record["steps"][-1])
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(study, "write_tree", stopping)
    with pytest.raises(KeyboardInterrupt):
        study.pretrain(tiny["first"], 20, path, progress)
    weights, curve = study.pretrain(tiny["first"], 20, path, progress)
    assert written == list(range(1, 21))  # one step a chunk, none twice
    assert curve["steps"] == written
    expected, _ = study.pretrain(
        tiny["first"],
        20,
        finished("finetune") / "pretrained.npz",
        Progress(20, Console(quiet=True)),
    )
    jax.tree.map(np.testing.assert_array_equal, weights, expected)


def test_weights_of_other_shapes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.npz"
    assert read_tree(path, {"w": jnp.zeros(3)}) is None
    write_tree(path, {"w": jnp.arange(3.0)}, {"steps": [1]})
    tree, record = read_tree(path, {"w": jnp.zeros(3)})  # type: ignore[misc]
    assert tree["w"].tolist() == [0, 1, 2]
    assert record == {"steps": [1]}
    with pytest.raises(UserError, match="other shapes"):
        read_tree(path, {"w": jnp.zeros(4)})


def test_adapters_have_equally_many_parameters() -> None:
    workload = texts.workloads("0.15M", {"first": TEXTS["first"]})["first"]
    weights = jax.eval_shape(workload.init, jax.random.key(0))
    found = {name: methods.trainable(name, 4, weights) for name in DEFAULT}
    assert found.pop("full") == workload.identity["parameters"]
    assert set(found.values()) == {4 * 3 * (4 * 128 + 2 * 320)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in methods.METHODS if name != "full"])
def test_every_method_starts_at_the_same_function(name: str, tiny: dict[str, Workload]) -> None:
    workload = tiny["second"]
    params = workload.init(jax.random.key(0))
    base, trained = methods.begin(methods.METHODS[name], 4, workload, params, 0)
    found = methods.effective(base, trained)
    # OLoRA with LoRA's scaling, for one, would not.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, params)
    moved = [
        float(jnp.max(jnp.abs(a - b)))
        for a, b in zip(jax.tree.leaves(base.params), jax.tree.leaves(params), strict=True)  # type: ignore[union-attr]
    ]
    changes = name in ("lora-ga", "pissa", "olora", "corda")
    assert (max(moved) > 1e-3) == changes


def test_lora_plus_is_faster_in_b_alone(tiny: dict[str, Workload]) -> None:
    (candidate,) = (
        c for c in methods.contenders(["lora-plus"], tiny["second"]) if c.name == "lora-plus"
    )
    params = {"w": {"lora_a": jnp.zeros((2, 1)), "lora_b": jnp.zeros((1, 2))}}
    tx = candidate.make(optax.constant_schedule(0.1))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    of_a, of_b = (float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(updates))
    assert of_b / of_a == pytest.approx(methods.RATIO)


def test_one_alphabet_for_all_texts() -> None:
    alphabet = texts.Alphabet.of("a" * 10 + "b" * 12 + "c" * 9)
    assert len(alphabet) == 3
    assert alphabet.tokens("abcz").tolist() == [0, 1, 2, 2]
    assert alphabet.unknown_share("abcz") == 0.5
    assert texts.Alphabet.of("abc").tokens("abc").tolist() == [0, 0, 0]
    assert len(texts.standard_library()) > 1e6
    assert texts.Alphabet.of(read_text(None)).unknown_share(texts.standard_library()) < 0.01


def made_up(name: str, losses: Sequence[float], rate: float = 1.0, seed: int = 0) -> dict:
    return {
        "optimizer": name, "learning_rate": rate, "seed": seed, "status": "finished",
        "steps": [100 * i for i in range(len(losses))], "validation_loss": list(losses),
        "first_loss": [1.0] * len(losses), "moved": [0.0, 3.0 if name == "lora-ga" else 1.0],
        "state_bytes_per_parameter": 8.0,
    }  # fmt: skip


def rows_of(**curves: Sequence[float]) -> list[summary.Row]:
    runs = {name.replace("_", "-"): losses for name, losses in curves.items()}
    candidates = [Candidate(name, optax.sgd, 1.0, "", "") for name in runs]
    return summary.table(
        candidates,
        {name: [made_up(name, losses)] for name, losses in runs.items()},
        Timing({name: [0.1] for name in runs}, {}),
        dict.fromkeys(runs, 5) | {"full": 10},
        10,
    )


def test_steps_are_those_to_the_other_losses() -> None:
    full, lora, ga = rows_of(full=(4, 2, 1), lora=(4, 3, 2), lora_ga=(4, 2.5, 1.5))
    assert (lora["part_of_lora"], lora["steps_to_full"]) == (1, None)
    assert ga["steps_to_lora"] == 150
    assert ga["part_of_lora"] == 0.75
    assert (full["steps_to_lora"], full["steps_to_full"]) == (100, 200)


@pytest.mark.parametrize(
    ("curve", "said"),
    [
        ((4, 2, 1.5), "at LoRA's final loss after 50% of LoRA's steps: it saves at least half"),
        ((4, 2.1, 1.5), "after 58% of LoRA's steps: it saves less than half"),
        ((4, 3, 2.1), "lora-ga does not reach LoRA's final loss: it saves less than half"),
    ],
)
def test_verdict_on_lora_ga(curve: Sequence[float], said: str) -> None:
    rows = rows_of(full=(4, 2, 1), lora=(4, 3, 2), lora_ga=curve)
    lines = summary.verdict(rows, [], (4.0, 0.5))
    assert any(said in line for line in lines)
    assert lines[1].startswith("With 50.0% of the parameters LoRA makes 67% of full tuning's way")
    assert "full tuning's by +0.500" in lines[1]
    assert "Full tuning's final loss is reached by no adapter." in lines


def test_equal_rates_compare_the_runs_of_one_rate() -> None:
    runs = {
        "lora": [made_up("lora", (4, 3), 0.1), made_up("lora", (4, 2), 0.2),
                 made_up("lora", (4, 1), 0.2, seed=1)],
        "lora-ga": [made_up("lora-ga", (4, 2), 0.1), made_up("lora-ga", (4, 2.5), 0.2),
                    made_up("lora-ga", (4, 1), 0.3)],
    }  # fmt: skip
    low, high = summary.equal_rates(runs)
    assert (low["learning_rate"], low["part_of_lora"]) == (0.1, 0.5)
    assert (high["learning_rate"], high["part_of_lora"]) == (0.2, None)
    assert low["moved_as_far"] == 3
    rows = rows_of(full=(4, 2, 1), lora=(4, 3, 2), lora_ga=(4, 2, 1))
    said = " ".join(summary.verdict(rows, [low, high], (4.0, 0.5)))
    assert "0.1: 50%; 0.2: never" in said
    assert "3.0 times as far as LoRA at the smallest of these rates" in said
    assert pictures.shared_rates([low, high], 0.5, "nats").startswith(b"\x89PNG")


def test_names_are_moved_apart_and_stay_in_order() -> None:
    values = [1.0, 1.01, 1.02, 2.0, 2.9, 2.95, 2.99]
    places = pictures.spread(values, 0.1, 0.9, 3.0)
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(places))
    assert min(places) >= 0.9 - 1e-9
    assert max(places) <= 3.0 + 1e-9
    assert places[3] == 2.0
    assert pictures.spread([], 0.1, 0, 1) == []
