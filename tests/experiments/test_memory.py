"""The experiment on optimizer state from its command line: results, resumption, bad input."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from rich.console import Console

import jaxopt_lab
from experiments.harness import candidates, timing, training
from experiments.harness.environment import without_folders
from experiments.harness.progress import Progress
from experiments.harness.runs import Timing
from experiments.harness.store import Store
from experiments.harness.study import Study
from experiments.memory import methods
from experiments.memory.__main__ import DEFAULT
from experiments.memory.pictures import loss_by_state
from experiments.memory.summary import table, verdict
from experiments.workloads.language_model import language_model
from tests.experiments.tiny import SCRIPTS, results

LAB = Path(jaxopt_lab.__file__).parent
MEMORY = SCRIPTS["memory"]


@pytest.mark.slow
def test_differences_are_in_spreads_of_the_baseline(finished: Callable[..., Path]) -> None:
    content = results(finished("memory"))
    adamw, galore = content["table"]
    assert (adamw["optimizer"], galore["optimizer"]) == ("adamw", "galore-0.25")
    parameters = content["settings"]["parameters"]
    assert 8 < adamw["state_bytes_per_parameter"] <= 8 + 8 / parameters
    excess = galore["final_loss"] - adamw["final_loss"]
    in_spreads = excess / adamw["final_loss_spread"]
    assert galore["excess_in_spreads"] == pytest.approx(in_spreads, rel=1e-12)
    assert adamw["excess"] == 0


@pytest.mark.slow
def test_page_says_what_keeps_all_of_its_state(finished: Callable[..., Path]) -> None:
    settings = results(finished("memory"))["settings"]
    full = 2 * 16 * settings["vocabulary"] + 16 * 16 + 3 * 16  # embeddings, output layer, norms
    share = full / settings["parameters"]
    page = (finished("memory") / "report.html").read_text()
    assert f"{share:.1%} of the parameters, which is {8 * share:.2f} bytes a parameter" in page


@pytest.mark.slow
def test_other_code_is_refused(
    finished: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    def changed(name: str, *arguments: Any) -> candidates.Candidate:
        found = candidates.candidate(name, *arguments)
        return dataclasses.replace(found, fingerprint="x") if name != "adamw" else found

    folder = finished("memory")  # before other code is there
    monkeypatch.setattr(methods, "candidate", changed)
    assert MEMORY.run(folder) == 2
    assert "made by other code of galore-0.25" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lion-0.5", "unknown contender 'lion-0.5'"),
        ("frugal", "'frugal': expected a density in [0, 1], such as frugal-0.25"),
        ("frugal-1.5", "'frugal-1.5': expected a density in [0, 1]"),
        ("frugal-nan", "'frugal-nan': expected a density in [0, 1]"),
        ("galore-0", "'galore-0': expected a density in (0, 1]"),
    ],
)
def test_bad_contenders_are_one_line(
    name: str, message: str, out: Path, capsys: pytest.CaptureFixture
) -> None:
    assert message in MEMORY.refused(out, capsys, "--contenders", name)


def test_timing_of_other_code_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def counted(loops, peaks, baseline, on_chunk):
        measured.append(list(loops))
        return Timing(*({name: [0.1] for name in loops} for _ in range(2)))

    monkeypatch.setattr(timing, "measure", counted)
    monkeypatch.setattr(training, "TrainLoop", lambda *_: None)
    workload, console = language_model("tiny"), Console(quiet=True)
    adamw = candidates.baseline(workload)
    for fingerprint in ("x", "x", "y"):
        found = [adamw, dataclasses.replace(adamw, name="mine", fingerprint=fingerprint)]
        study = Study(workload, found, Store(tmp_path, {}), steps=20, rates=1, seeds=1)
        study.time(Progress(study.total_steps, console))
    assert measured == [["adamw", "mine"]] * 2


@pytest.mark.slow
def test_state_is_what_the_name_says() -> None:
    workload = language_model()
    params = jax.eval_shape(workload.init, jax.random.key(0))
    shape = methods.Shape(300, 64)
    found = {
        c.name: jaxopt_lab.state_bytes(c.make(optax.constant_schedule(0.1)), params)
        for c in methods.contenders(DEFAULT, workload, shape)
    }
    assert list(found) == list(DEFAULT)
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
    sources = methods.parse(name)[0].sources
    files = set(itertools.chain.from_iterable(map(candidates.source_files, sources)))
    assert {*(LAB / folder).glob("*.py"), *LAB.glob("_*.py")} <= files


def test_fingerprint_changes_with_any_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("a = 1\n")
    (tmp_path / "b.py").write_text("b = 1\n")
    before = candidates.fingerprint(tmp_path)
    assert candidates.fingerprint(tmp_path) == before
    (tmp_path / "b.py").write_text("b = 2\n")
    assert candidates.fingerprint(tmp_path) != before
    assert candidates.fingerprint(tmp_path, len) == candidates.fingerprint(tmp_path)  # built-in


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
    known = [candidates.Candidate(name, optax.sgd, 1.0, "", "") for name in losses]
    return table(known, runs, Timing({name: [0.1] for name in losses}, {}))


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
    losses = {name: (2.0 + 0.001 * i,) for i, name in enumerate(DEFAULT)}
    losses["sgd"] = (3.0,)
    states = dict.fromkeys(losses, 2.0) | {"adamw-int8": 2.05, "sgd": 0.0, "frugal-0.125": 2.1}
    figure = loss_by_state(lines_of(losses, states), "nats")
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
    (axes,) = loss_by_state(lines, "nats").axes
    assert [text.get_text() for text in axes.texts] == ["sgd"]
    (axes,) = loss_by_state(lines[:1], "nats").axes
    assert not axes.texts
