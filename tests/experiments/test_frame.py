"""What every experiment does from its command line: results, files, resumption, bad input."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from experiments.harness import training
from tests.experiments.tiny import SCRIPTS, Script, results

STUDY_SCRIPTS = [script for script in SCRIPTS.values() if script.lost]


def of_each(scripts: Sequence[Script], *, trains: bool = False) -> pytest.MarkDecorator:
    """Parametrizes a test by `scripts`; if it trains models, the first alone is quick."""
    cases = [
        pytest.param(script, id=script.name, marks=pytest.mark.slow if trains and i else ())
        for i, script in enumerate(scripts)
    ]
    return pytest.mark.parametrize("script", cases)


EVERY = of_each([*SCRIPTS.values()])
EVERY_TRAINED = of_each([*SCRIPTS.values()], trains=True)
STUDIES = of_each(STUDY_SCRIPTS)
TRAINED_STUDIES = of_each(STUDY_SCRIPTS, trains=True)


@EVERY_TRAINED
def test_results_hold_table_and_origin(script: Script, finished: Callable[..., Path]) -> None:
    content = results(finished(script.name))
    assert content["kind"] == script.name
    assert {"date", "argv", "device", "versions", "settings", "verdict", "table"} <= content.keys()
    assert {"jax", "optax", "flax"} <= content["versions"].keys()
    assert re.fullmatch(r"\w+ \w+", content["platform"])  # no name of a kernel or a host


@TRAINED_STUDIES
def test_table_is_that_of_the_runs(script: Script, finished: Callable[..., Path]) -> None:
    content = results(finished(script.name))
    for line in content["table"]:
        of_name = [run for run in content["runs"] if run["optimizer"] == line["optimizer"]]
        best = [run for run in of_name if run["learning_rate"] == line["learning_rate"]]
        losses = [run["validation_loss"][-1] for run in best]
        assert [run["seed"] for run in best] == [0, 1]
        assert line["seeds"] == 2
        assert line["final_loss"] == pytest.approx(sum(losses) / 2, rel=1e-12)  # one rounding
        assert [line["final_loss_low"], line["final_loss_high"]] == sorted(losses)
        assert line["timing_rounds"] == 1
        assert line["cpu_time_ratio"] > 0
    assert content["table"][0]["step_time_ratio"] == 1.0


@EVERY_TRAINED
def test_files_are_complete_and_hold_no_path_of_the_machine(
    script: Script, finished: Callable[..., Path]
) -> None:
    out = finished(script.name)
    page = (out / "report.html").read_text()
    assert not re.search(r"https?://|<link|<img|src=|@import|url\((?!#)", page)
    assert len(page) < 1_000_000
    assert '<svg id="c0-' in page
    for file in ("results.json", *script.pictures):
        assert f'<a href="{file}">' in page
    for name in script.pictures:
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    for content in (page, (out / "results.json").read_text()):
        assert str(out.parent) not in content


@TRAINED_STUDIES
def test_finished_runs_are_found_again_and_not_repeated(
    script: Script,
    copied: Callable[..., Path],
    training_runs: list,
    capsys: pytest.CaptureFixture,
) -> None:
    out = copied(script.name)
    training_runs.clear()
    before = results(out)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert script.run(out) == 0
    total = len(before["table"]) * (before["rates"] + before["seeds"] - 1)
    assert f"found again: {total} of {total} runs" in capsys.readouterr().out
    assert training_runs == []
    assert stamps == {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    same = {**results(out), "date": 0, "argv": 0}
    assert same == {**before, "date": 0, "argv": 0}
    assert script.lost is not None
    pattern, again = script.lost
    (lost,) = (out / "runs").glob(pattern)
    lost.unlink()
    assert script.run(out) == 0
    assert f"found again: {total - 1} of {total} runs" in capsys.readouterr().out
    assert training_runs == again
    assert results(out)["table"] == before["table"]


@TRAINED_STUDIES
def test_interruption_is_said(
    script: Script, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    assert script.run(out, *(["--budget", "40"] if script.name == "finetune" else [])) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not list((out / "runs").iterdir())


@EVERY
def test_results_of_another_experiment_are_not_overwritten(
    script: Script, out: Path, capsys: pytest.CaptureFixture
) -> None:
    out.mkdir()
    (out / "results.json").write_text('{"kind": "something else"}')
    assert script.run(out) == 2
    assert f"no {script.name}" in capsys.readouterr().err


@EVERY
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "30"], "--budget 30: expected a multiple of 20"),
        (["--budget", "many"], "--budget: many is not a positive whole number"),
        (["--seeds", "0"], "--seeds: 0 is not a positive whole number"),
        (["--size", "7B"], "--size 7B: unknown; expected one of 0.15M, 1M"),
        (["--text", "no/such/file"], "--text no/such/file: cannot be read"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_bad_options_are_one_line(
    script: Script, options: list[str], message: str, out: Path, capsys: pytest.CaptureFixture
) -> None:
    assert message in script.refused(out, capsys, *options)


@EVERY
def test_an_unknown_method_is_named_beside_the_known(
    script: Script, out: Path, capsys: pytest.CaptureFixture
) -> None:
    option, unknown = script.methods
    error = script.refused(out, capsys, option, unknown)
    assert f"unknown {'contender' if script.name == 'memory' else ''}" in error
    assert f"{unknown!r}; known: " in error


@STUDIES
@pytest.mark.parametrize(
    ("names", "message"),
    [("x,,y", "'x,,y': a name is empty"), ("x,y, x", "'x,y, x': x occurs twice")],
)
def test_names_are_listed_once(
    script: Script, names: str, message: str, out: Path, capsys: pytest.CaptureFixture
) -> None:
    assert message in script.refused(out, capsys, script.methods[0], names)


@STUDIES
def test_list_names_every_method(script: Script, capsys: pytest.CaptureFixture) -> None:
    methods = __import__(f"experiments.{script.name}.methods", fromlist=["METHODS"]).METHODS
    assert script.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {name}" in printed for name in methods)


@STUDIES
def test_help_says_no_default_that_is_none(script: Script, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        script.main(["--help"])
    printed = capsys.readouterr().out
    assert "(default: None)" not in printed
    assert "(default: 20" in printed or "--budget" in printed
