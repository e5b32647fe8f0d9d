"""The experiment on merging from its command line: results, resumption, bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import merge_models
from experiments.parts import merging, merging_summary, texts
from experiments.parts.weights import read_tree
from tests.experiments import tiny_texts

TINY = ["--budget", "20", "--pretrain-budget", "20", "--seeds", "2", "--size", "tiny"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tiny_texts.write(tmp_path_factory.mktemp("texts"))


def run(out: Path, paths: dict[str, Path], *more: str) -> int:
    given = [f"--text={paths[name]}" for name in ("second", "third")]
    first = f"--pretrain-text={paths['first']}"
    return merge_models.main([*TINY, *given, first, "--out", str(out), *more])


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, paths: dict[str, Path]) -> Path:
    out = tmp_path_factory.mktemp("merge") / "finished"
    assert run(out, paths) == 0
    return out


def test_results_hold_table_and_origin(finished: Path) -> None:
    content = results(finished)
    assert content["kind"] == "merge_models"
    assert {"date", "argv", "device", "versions", "settings", "verdict"} <= content.keys()
    rows = {row["model"]: row for row in content["table"]}
    assert list(rows) == [
        merging.BEFORE, "second", "third", merging.TOGETHER, "average", *merging.MERGES,
    ]  # fmt: skip
    assert rows[merging.BEFORE]["kept"] == 0
    for name in ("second", "third"):
        assert rows[name]["kept_by_task"][name] == pytest.approx(1)
        assert rows[name]["losses"][name] < rows[merging.BEFORE]["losses"][name]
    for row in rows.values():
        own = [row["losses"][name] for name in ("second", "third")]
        assert row["mean_loss"] == pytest.approx(np.mean(own))
    assert [row["scales"] for row in rows.values()][:5] == [[]] * 5
    for result in content["results"]:
        for rule in merging.MERGES:
            at = result["scales"].index(result["chosen"][rule])
            losses = result["losses"][rule]
            mean = np.mean([losses[name] for name in ("second", "third")])
            assert result["mean_by_scale"][rule][at] == pytest.approx(mean)


@pytest.mark.slow
def test_average_is_the_mean_of_the_weights(finished: Path, paths: dict[str, Path]) -> None:
    found = {"first": tiny_texts.FIRST, "second": tiny_texts.SECOND, "third": tiny_texts.THIRD}
    workloads = texts.workloads("tiny", found)
    like = jax.eval_shape(workloads["first"].init, jax.random.key(0))
    kept = [
        read_tree(finished / "runs" / f"{name}-seed0.npz", like) for name in ("second", "third")
    ]
    (one, _), (other, _) = (tree for tree in kept if tree is not None)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, other)
    windows = workloads["second"].data["validation"][1::2]
    loss = workloads["second"].validation_loss(mean, {"validation": windows})
    reported = results(finished)["results"][0]["losses"]["average"]["second"]
    assert float(loss) == pytest.approx(reported, rel=1e-4)


@pytest.mark.slow
def test_scale_is_chosen_on_other_windows(
    finished: Path, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = merging.MergeStudy._losses

    def even_ones_like_large_scales(self: Any, params: Any, part: int) -> dict[str, float]:
        calls.append(part)
        found = real(self, params, part)
        if part == 1:
            return found
        return {name: -float(len(calls)) for name in found}

    calls: list[int] = []
    monkeypatch.setattr(merging.MergeStudy, "_losses", even_ones_like_large_scales)
    for name in ("pretrained.npz", "settings.json"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "runs").mkdir()
    for path in (finished / "runs").glob("*seed0.npz"):
        (tmp_path / "runs" / path.name).write_bytes(path.read_bytes())
    assert run(tmp_path, paths, "--seeds", "1") == 0
    (result,) = results(tmp_path)["results"]
    assert set(result["chosen"].values()) == {merging.SCALES[-1]}


def test_files_are_complete_and_hold_no_path_of_the_machine(
    finished: Path, paths: dict[str, Path]
) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert (finished / "merged.png").read_bytes().startswith(b"\x89PNG")
    for content in (page, (finished / "results.json").read_text()):
        assert str(finished.parent) not in content
        assert str(paths["first"].parent) not in content


@pytest.mark.slow
def test_finished_models_are_not_trained_again(
    finished: Path, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = results(finished)
    trained = []
    loop = merging.FineTuneLoop

    def counted(workload: Any, *arguments: Any) -> Any:
        trained.append(workload)
        return loop(workload, *arguments)

    monkeypatch.setattr(merging, "FineTuneLoop", counted)
    (finished / "runs" / "merged-seed1.json").unlink()
    assert run(finished, paths) == 0
    assert trained == []
    assert {**results(finished), "date": 0} == {**before, "date": 0}
    (finished / "runs" / "merged-seed1.json").unlink()
    (finished / "runs" / "third-seed1.npz").unlink()
    assert run(finished, paths) == 0
    assert len(trained) == 1
    assert results(finished)["table"] == before["table"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "30"], "--budget 30: expected a multiple of 20"),
        (["--pretrain-budget", "30"], "--pretrain-budget 30: expected a multiple of 20"),
        (["--method", "lorra"], "unknown method 'lorra'"),
        (["--seeds", "0"], "--seeds: 0 is not a positive whole number"),
        (["--size", "7B"], "--size 7B: unknown"),
        (["--text", "no/such/file"], "cannot be read"),
        (["--pretrain-text", "no/such/file"], "--pretrain-text no/such/file: cannot be read"),
        (["--no-such-option"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    paths: dict[str, Path],
    capsys: pytest.CaptureFixture,
) -> None:
    assert run(tmp_path, paths, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("merge_models: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--packages", "email"], "--packages: expected two or more to merge, got email"),
        (["--packages", "email,email"], "--packages: a name occurs twice in email, email"),
        (["--packages", "email,no_such_package"], "no source of the packages no_such_package"),
        (["--packages", "email,../secret"], "'../secret' is not the name of a package"),
    ],
)
def test_bad_packages_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert merge_models.main([*TINY, *options, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("merge_models: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_results_of_another_experiment_are_not_overwritten(
    tmp_path: Path, paths: dict[str, Path], capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "results.json").write_text('{"kind": "memory"}')
    assert run(tmp_path, paths) == 2
    assert "no merge_models" in capsys.readouterr().err


def losses_of(**models: tuple[float, float]) -> dict:
    names = {"before": merging.BEFORE, "together": merging.TOGETHER}
    losses = {
        names.get(model, model): {"x": x, "y": y, merging.BEFORE: 1.0}
        for model, (x, y) in models.items()
    }
    losses |= dict.fromkeys(merging.MERGES, losses["average"])
    return {"seed": 0, "losses": losses, "chosen": dict.fromkeys(merging.MERGES, 0.5)}


def test_part_of_the_gain_and_verdict() -> None:
    given = losses_of(before=(4, 4), x=(2, 5), y=(4, 3), together=(2, 3), average=(3, 3.25))
    rows = merging_summary.table([given], ["x", "y"])
    by_name = {row["model"]: row for row in rows}
    assert by_name["average"]["kept_by_task"] == {"x": 0.5, "y": 0.75}
    assert by_name["x"]["kept"] == 0
    assert by_name[merging.TOGETHER]["kept"] == 1
    said = " ".join(merging_summary.verdict(rows, ["x", "y"]))
    assert "average has the lowest mean loss over the 2 texts: 3.1250, which keeps 62%" in said
    assert "The best single fine-tuned model, that of x, has a mean loss of 3.5000" in said
    assert "Not better" not in said
    given["losses"]["ties 0.2"] = {"x": 4.0, "y": 4.0, merging.BEFORE: 1.0}
    said = merging_summary.verdict(merging_summary.table([given], ["x", "y"]), ["x", "y"])
    assert "Not better than the best single model: ties 0.2." in said
    assert "Worse than the plain average: ties 0.2." in said
