"""The experiment on merging from its command line: results, resumption, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.harness.store import read_tree
from experiments.merge_models import methods, study, summary
from experiments.workloads import texts
from tests.experiments.tiny import SCRIPTS, TEXTS, results

MERGE = SCRIPTS["merge_models"]


@pytest.mark.slow
def test_table_is_that_of_the_models(finished: Callable[..., Path]) -> None:
    content = results(finished("merge_models"))
    rows = {row["model"]: row for row in content["table"]}
    assert list(rows) == [
        methods.BEFORE, "second", "third", methods.TOGETHER, "average", *methods.MERGES,
    ]  # fmt: skip
    assert rows[methods.BEFORE]["kept"] == 0
    for name in ("second", "third"):
        assert rows[name]["kept_by_task"][name] == pytest.approx(1)
        assert rows[name]["losses"][name] < rows[methods.BEFORE]["losses"][name]
    for row in rows.values():
        own = [row["losses"][name] for name in ("second", "third")]
        assert row["mean_loss"] == pytest.approx(np.mean(own))
    assert [row["scales"] for row in rows.values()][:5] == [[]] * 5
    for result in content["results"]:
        for rule in methods.MERGES:
            at = result["scales"].index(result["chosen"][rule])
            losses = result["losses"][rule]
            mean = np.mean([losses[name] for name in ("second", "third")])
            assert result["mean_by_scale"][rule][at] == pytest.approx(mean)


@pytest.mark.slow
def test_average_is_the_mean_of_the_weights(finished: Callable[..., Path]) -> None:
    out, workloads = finished("merge_models"), texts.workloads("tiny", TEXTS)
    like = jax.eval_shape(workloads["first"].init, jax.random.key(0))
    kept = [read_tree(out / "runs" / f"{name}-seed0.npz", like) for name in ("second", "third")]
    (one, _), (other, _) = (tree for tree in kept if tree is not None)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, one, other)
    windows = workloads["second"].data["validation"][1::2]
    loss = workloads["second"].validation_loss(mean, {"validation": windows})
    reported = results(out)["results"][0]["losses"]["average"]["second"]
    assert float(loss) == pytest.approx(reported, rel=1e-4)


@pytest.mark.slow
def test_scale_is_chosen_on_other_windows(
    copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = study.MergeStudy._losses

    def even_ones_like_large_scales(self: Any, params: Any, part: int) -> dict[str, float]:
        calls.append(part)
        found = real(self, params, part)
        if part == 1:
            return found
        return {name: -float(len(calls)) for name in found}

    calls: list[int] = []
    out = copied("merge_models")  # by the real losses, which other tests share
    monkeypatch.setattr(study.MergeStudy, "_losses", even_ones_like_large_scales)
    for path in (out / "runs").glob("merged*"):
        path.unlink()
    assert MERGE.run(out) == 0
    (result,) = results(out)["results"]
    assert set(result["chosen"].values()) == {study.SCALES[-1]}


@pytest.mark.slow
def test_finished_models_are_found_again_and_not_trained(
    copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = copied("merge_models")
    before, trained, loop = results(out), [], study.FineTuneLoop

    def counted(workload: Any, *arguments: Any) -> Any:
        trained.append(workload)
        return loop(workload, *arguments)

    monkeypatch.setattr(study, "FineTuneLoop", counted)
    assert MERGE.run(out) == 0
    printed = capsys.readouterr().out
    assert "found again: 20 of 20 steps of pre-training" in printed
    assert "found again: 1 of 1 seeds, with their merged models" in printed
    assert trained == []
    (out / "runs" / "merged-seed0.json").unlink()
    (out / "runs" / "third-seed0.npz").unlink()
    assert MERGE.run(out) == 0
    assert len(trained) == 1
    assert results(out)["table"] == before["table"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--pretrain-budget 30", "--pretrain-budget 30: expected a multiple of 20"),
        ("--pretrain-text no/such/file", "--pretrain-text no/such/file: cannot be read"),
        ("--rank 9 --method lora-ga", "--rank 9: lora_ga takes 2 r = 18 directions"),
    ],
)
def test_bad_options_are_one_line(
    options: str, message: str, out: Path, capsys: pytest.CaptureFixture
) -> None:
    assert message in MERGE.refused(out, capsys, *options.split())


@pytest.mark.parametrize(
    ("packages", "message"),
    [
        ("email", "--packages: expected two or more to merge, got email"),
        ("email,email", "--packages: 'email,email': email occurs twice"),
        ("email,no_such_package", "no source of the packages no_such_package"),
        ("email,../secret", "'../secret' is not the name of a package"),
    ],
)
def test_bad_packages_are_one_line(
    packages: str, message: str, out: Path, capsys: pytest.CaptureFixture
) -> None:
    script = MERGE._replace(options="--size tiny --budget 20 --pretrain-budget 20")
    assert message in script.refused(out, capsys, "--packages", packages)


def losses_of(**models: tuple[float, float]) -> dict:
    names = {"before": methods.BEFORE, "together": methods.TOGETHER}
    losses = {
        names.get(model, model): {"x": x, "y": y, methods.BEFORE: 1.0}
        for model, (x, y) in models.items()
    }
    losses |= dict.fromkeys(methods.MERGES, losses["average"])
    return {"seed": 0, "losses": losses, "chosen": dict.fromkeys(methods.MERGES, 0.5)}


def test_part_of_the_gain_and_verdict() -> None:
    given = losses_of(before=(4, 4), x=(2, 5), y=(4, 3), together=(2, 3), average=(3, 3.25))
    rows = summary.table([given], ["x", "y"])
    by_name = {row["model"]: row for row in rows}
    assert by_name["average"]["kept_by_task"] == {"x": 0.5, "y": 0.75}
    assert by_name["x"]["kept"] == 0
    assert by_name[methods.TOGETHER]["kept"] == 1
    said = " ".join(summary.verdict(rows, ["x", "y"]))
    assert "average has the lowest mean loss over the 2 texts: 3.1250, which keeps 62%" in said
    assert "The best single fine-tuned model, that of x, has a mean loss of 3.5000" in said
    assert "Not better" not in said
    given["losses"]["ties 0.2"] = {"x": 4.0, "y": 4.0, methods.BEFORE: 1.0}
    said = summary.verdict(summary.table([given], ["x", "y"]), ["x", "y"])
    assert "Not better than the best single model: ties 0.2." in said
    assert "Worse than the plain average: ties 0.2." in said
