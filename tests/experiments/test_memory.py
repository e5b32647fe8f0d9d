"""The experiment on optimizer state from its command line: results, resumption, bad input."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

import jaxopt_lab
from experiments import memory
from experiments.parts import budgets, optimizers
from experiments.parts import study as study_module
from experiments.parts.budget_summary import table, verdict
from experiments.parts.environment import without_folders
from experiments.parts.figures import loss_by_state_figure
from experiments.parts.language_model import language_model
from experiments.parts.progress import Progress
from experiments.parts.store import Store
from experiments.parts.training import train

LAB = Path(jaxopt_lab.__file__).parent
TINY = ["--contenders", "galore-0.25", "--budget", "20", "--batch-size", "2", "--rates", "1",
        "--seeds", "2"]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("The quick brown fox jumps over the lazy dog; nothing else happens.\n" * 120)
    return path


def run(out: Path, text: Path, *more: str) -> int:
    return memory.main([*TINY, f"--text={text}", "--out", str(out), *more])


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    out = tmp_path_factory.mktemp("memory") / "finished"
    assert run(out, text) == 0
    return out


@pytest.fixture
def training_runs(monkeypatch: pytest.MonkeyPatch) -> list:
    """Collects (peak rate, seed) of every run that is really trained."""
    trained = []

    def counted(loop, validation_loss, peak, seed, on_chunk):
        trained.append((peak, seed))
        return train(loop, validation_loss, peak, seed, on_chunk)

    monkeypatch.setattr(study_module, "train", counted)
    return trained


def test_results_hold_table_runs_and_origin(finished: Path) -> None:
    content = results(finished)
    assert content["kind"] == "memory"
    assert {"date", "argv", "device", "versions", "settings", "verdict"} <= content.keys()
    assert len(content["runs"]) == 2 * 2
    lines = {line["optimizer"]: line for line in content["table"]}
    assert list(lines) == ["adamw", "galore-0.25"]
    parameters = content["settings"]["parameters"]
    assert 8 < lines["adamw"]["state_bytes_per_parameter"] <= 8 + 8 / parameters
    for name, line in lines.items():
        losses = [r["validation_loss"][-1] for r in content["runs"] if r["optimizer"] == name]
        assert line["final_loss_low"] == min(losses)
        assert line["final_loss_high"] == max(losses)
        assert line["final_loss"] == pytest.approx(np.mean(losses), rel=1e-12)  # one rounding
    excess = lines["galore-0.25"]["final_loss"] - lines["adamw"]["final_loss"]
    spread = lines["adamw"]["final_loss_spread"]
    assert lines["galore-0.25"]["excess_in_spreads"] == pytest.approx(excess / spread, rel=1e-12)
    assert lines["adamw"]["excess"] == 0


def test_files_are_complete_and_hold_no_path_of_the_machine(finished: Path, text: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    for name in ("budget.png", "curves.png", "rates.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    settings = results(finished)["settings"]
    full = 2 * 64 * settings["vocabulary"] + 64 * 64 + 7 * 64  # embeddings, output layer, norms
    share = full / settings["parameters"]
    assert f"{share:.1%} of the parameters, which is {8 * share:.2f} bytes a parameter" in page
    for content in (page, (finished / "results.json").read_text()):
        assert str(finished.parent) not in content
        assert str(text.parent) not in content
    assert f"--text={text.name}" in results(finished)["argv"]


def test_finished_runs_are_not_repeated(finished: Path, text: Path, training_runs: list) -> None:
    before = results(finished)
    assert run(finished, text) == 0
    assert training_runs == []
    assert {**results(finished), "date": 0} == {**before, "date": 0}
    (lost,) = (finished / "runs").glob("galore*seed1.json")
    lost.unlink()
    assert run(finished, text) == 0
    assert training_runs == [(0.018, 1)]
    assert results(finished)["table"] == before["table"]


def test_other_code_is_refused(
    finished: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def changed(name: str, *arguments: Any) -> optimizers.Candidate:
        found = optimizers.candidate(name, *arguments)
        return dataclasses.replace(found, fingerprint="x") if name != "adamw" else found

    monkeypatch.setattr(budgets, "candidate", changed)
    assert run(finished, text) == 2
    assert "made by other code of galore-0.25" in capsys.readouterr().err


def test_timing_of_other_code_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def counted(loops, peaks, rounds, on_chunk):
        measured.append(list(loops))
        return {name: [0.1] * rounds for name in loops}

    monkeypatch.setattr(study_module, "interleaved_seconds_per_step", counted)
    monkeypatch.setattr(study_module, "TrainLoop", lambda *_: None)
    workload, console = language_model(), Console(quiet=True)
    adamw = optimizers.known_candidate("adamw", workload)
    for fingerprint in ("x", "x", "y"):
        found = [adamw, dataclasses.replace(adamw, name="mine", fingerprint=fingerprint)]
        study = study_module.Study(workload, found, Store(tmp_path, {}), steps=20, rates=1, seeds=1)
        study.time(Progress(study.total_steps, console))
    assert measured == [["adamw", "mine"]] * 2


def test_interrupted_is_said(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(study_module, "TrainLoop", interrupted)
    assert run(tmp_path, text) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--contenders", "adamw,adamz"], "unknown contender 'adamz'; known: adamw, adamw-int8"),
        (["--contenders", "lion-0.5"], "unknown contender 'lion-0.5'"),
        (["--contenders", "frugal"], "'frugal': expected a density in [0, 1], such as frugal-0.25"),
        (["--contenders", "frugal-1.5"], "'frugal-1.5': expected a density in [0, 1]"),
        (["--contenders", "frugal-nan"], "'frugal-nan': expected a density in [0, 1]"),
        (["--contenders", "galore-0"], "'galore-0': expected a density in (0, 1]"),
        (["--budget", "30"], "--budget 30: expected a multiple of 20"),
        (["--seeds", "0"], "--seeds: 0 is not a positive whole number"),
        (["--size", "7B"], "--size 7B: unknown"),
        (["--text", "no/such/file"], "cannot be read"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], message: str, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(tmp_path, text, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("memory: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_results_of_another_experiment_are_not_overwritten(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "results.json").write_text('{"kind": "compare"}')
    assert run(tmp_path, text) == 2
    assert "no memory" in capsys.readouterr().err


def test_list_names_every_contender(capsys: pytest.CaptureFixture) -> None:
    assert memory.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in budgets.names())


def test_state_is_what_the_name_says() -> None:
    workload = language_model()
    params = jax.eval_shape(workload.init, jax.random.key(0))
    shape = budgets.Shape(300, 64)
    found = {
        c.name: jaxopt_lab.state_bytes(c.make(optax.constant_schedule(0.1)), params)
        for c in budgets.contenders(budgets.DEFAULT, workload, shape)
    }
    assert list(found) == list(budgets.DEFAULT)
    per_parameter = {name: state.bytes_per_parameter for name, state in found.items()}
    # Every matrix is encoded: a scale for 256 codes and exact norms are the little that is more.
    assert 2 < per_parameter["adamw-int8"] < 2.06
    assert 4 < per_parameter["adamw-bf16"] < 4.02
    assert per_parameter["sgd"] < 1e-3
    split = [p.name for p in found["adamw"].parameters if p.name.startswith("blocks")]
    moments = {
        name: sum(
            p.fields["mu"] + p.fields["nu"]
            for p in state.parameters
            if p.name in split and p.fields.keys() >= {"mu", "nu"}
        )
        for name, state in found.items()
        if name.endswith("-0.25") or name == "adamw"
    }
    norms = 6 * 64 * 8
    expected = (moments["adamw"] - norms) / 4 + norms
    assert {name: m for name, m in moments.items() if name != "adamw"} == dict.fromkeys(
        ("frugal-0.25", "galore-0.25", "dct-0.25"), expected
    )


@pytest.mark.parametrize(
    ("name", "folder"),
    [("adamw-int8", "quantization"), ("adamw-bf16", "quantization"), ("badam", "subspace")]
    + [(f"{name}-0.25", "subspace") for name in ("frugal", "galore", "dct")],
)
def test_fingerprint_covers_the_folder_of_the_method(name: str, folder: str) -> None:
    sources = budgets.parse(name)[0].sources
    files = set(itertools.chain.from_iterable(map(optimizers._files, sources)))
    assert {*(LAB / folder).glob("*.py"), *LAB.glob("_*.py")} <= files


def test_fingerprint_changes_with_any_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "b.py").write_text("b = 1\n")
    before = optimizers.fingerprint(tmp_path)
    assert optimizers.fingerprint(tmp_path) == before
    (tmp_path / "b.py").write_text("b = 2\n")
    assert optimizers.fingerprint(tmp_path) != before
    assert optimizers.fingerprint(tmp_path, len) == optimizers.fingerprint(tmp_path)  # built-in


@pytest.mark.parametrize(
    ("argument", "kept"),
    [
        ("/home/me/text", "text"),
        ("--text=/home/me/text", "--text=text"),
        ("/home/a=b/text", "text"),
        ("results/memory", "results/memory"),
        ("--seeds", "--seeds"),
    ],
)
def test_folders_of_the_machine_are_left_out(argument: str, kept: str) -> None:
    assert without_folders(argument) == kept


def lines_of(
    losses: Mapping[str, Sequence[float]], states: Mapping[str, float] | None = None
) -> list:
    """The table of made-up final losses, one for each seed; a NaN diverged."""
    states = states or {}
    runs = {
        name: [
            {
                "seed": seed,
                "learning_rate": 1.0,
                "status": "diverged" if np.isnan(loss) else "finished",
                "steps": [0, 10],
                "validation_loss": [4.0, None if np.isnan(loss) else loss],
                "state_bytes_per_parameter": states.get(name, 1.0),
            }
            for seed, loss in enumerate(found)
        ]
        for name, found in losses.items()
    }
    known = [optimizers.Candidate(name, optax.sgd, 1.0, "", "") for name in losses]
    return table(known, runs, {name: [0.1] for name in losses})


ADAMW = (1.9, 2.0, 2.1)  # mean 2, standard deviation 0.1


def test_verdict_on_compact_state() -> None:
    lines = lines_of(
        {"adamw": ADAMW, "adamw-int8": (2.0, 2.1, 2.17), "adamw-bf16": (2.0, 2.1, 2.3)}
    )
    assert lines[1]["excess_in_spreads"] == pytest.approx(0.9)
    said = verdict(lines)
    assert said[0].startswith("adamw ends at 2.0000; its spread over 3 seeds")
    assert said[1].startswith("adamw-int8 reaches adamw's loss within its spread over seeds: 2.09")
    assert said[2].startswith("adamw-bf16 does not reach adamw's loss within its spread")
    (_, said) = verdict(lines_of({"adamw": ADAMW, "adamw-int8": (1.8, 1.8, 1.8)}))[:2]
    assert said.startswith("adamw-int8 ends below adamw by more than its spread over seeds: 1.8000")
    (_, said) = verdict(lines_of({"adamw": ADAMW, "adamw-int8": (np.nan,)}))[:2]
    assert said == "adamw-int8 does not reach adamw's loss: it diverged."


NOT_BETWEEN = (
    "frugal-0.25 does not lie between galore-0.25 and full adamw, as it does in its paper: it ends "
)


@pytest.mark.parametrize(
    ("frugal", "galore", "start", "end"),
    [
        (2.2, 2.4, "frugal-0.25 lies between galore-0.25 and full adamw, as in its paper", "ter."),
        (2.05, 2.4, "frugal-0.25 lies between", "the difference to adamw is within the spread."),
        (2.02, 2.07, "frugal-0.25 lies", "to adamw and to galore-0.25 is within the spread."),
        (1.8, 2.4, NOT_BETWEEN + "below full adamw (2.0000, 1.8000, 2.4000 with", "parameter)."),
        (2.4, 2.2, NOT_BETWEEN + "above galore-0.25 (", ")."),
        (1.8, 1.7, NOT_BETWEEN + "below full adamw and above galore-0.25 (", "within the spread."),
        (2.2, np.nan, "Of its paper's order adamw, frugal-0.25, galore-0.25 nothing", "diverged."),
    ],
)
def test_verdict_on_frugal(frugal: float, galore: float, start: str, end: str) -> None:
    lines = lines_of({"adamw": ADAMW, "frugal-0.25": (frugal,), "galore-0.25": (galore,)})
    said = verdict(lines)[1]
    assert said.startswith(start)
    assert said.endswith(end)


def test_verdict_lists_the_best_for_their_state_and_what_diverged() -> None:
    losses = {"adamw": ADAMW, "sgd": (3.0,), "lion": (3.1, np.nan), "badam": (2.0,), "dct": (2.5,)}
    states = {"adamw": 8.0, "sgd": 0.0, "lion": 4.0, "badam": 3.0, "dct": 3.0}
    said = verdict(lines_of(losses, states))
    assert said[-2] == (
        "Nothing with as little state ends as low as sgd (0.00 bytes a parameter, 3.0000), "
        "badam (3.00 bytes a parameter, 2.0000)."
    )
    assert said[-1].startswith("lion: 1 of 2 seeds diverged")


def test_verdict_without_a_spread_or_a_baseline() -> None:
    said = verdict(lines_of({"adamw": (2.0,), "adamw-int8": (2.0,)}))
    assert said[0].startswith("One seed of adamw has no spread")
    assert not any("reach" in line for line in said)
    said = verdict(lines_of({"adamw": (np.nan,), "adamw-int8": (2.0,)}))
    assert said == ["adamw diverged at every learning rate: there is nothing to compare with."]


def test_labels_of_the_figure_do_not_overlap() -> None:
    # Most in one crowd, and one so far to the right that its name has no room beside it.
    losses = {name: (2.0 + 0.001 * i,) for i, name in enumerate(budgets.DEFAULT)}
    losses["sgd"] = (3.0,)
    states = dict.fromkeys(losses, 2.0) | {"adamw-int8": 2.05, "sgd": 0.0, "frugal-0.125": 2.1}
    figure = loss_by_state_figure(lines_of(losses, states), "nats")
    figure.draw_without_rendering()
    (axes,) = figure.axes
    texts = [text for text in axes.texts if text.get_text()]
    assert [text.get_text() for text in texts] == list(losses)
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    frame = axes.get_window_extent()
    assert all(frame.contains(*box.min) and frame.contains(*box.max) for box in boxes)


def test_figure_leaves_out_what_diverged() -> None:
    lines = lines_of({"adamw": (np.nan,), "sgd": (2.0,)})
    (axes,) = loss_by_state_figure(lines, "nats").axes
    assert [text.get_text() for text in axes.texts] == ["sgd"]
    (axes,) = loss_by_state_figure(lines[:1], "nats").axes
    assert not axes.texts
