"""A task of one's own: what is asked of it, and what is said where it does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.compare.__main__ import main
from experiments.workloads.line import line
from experiments.workloads.own import own_workload
from tests.experiments.tiny import SCRIPTS, results

OWN = ["--workload-from", "experiments.workloads.line:line", "--optimizers", "adamw,lion"]


def test_own_task_is_compared(out: Path, capsys: pytest.CaptureFixture) -> None:
    few = ["--budget", "40", "--rates", "1", "--seeds", "2", "--out", str(out)]
    assert main([*OWN, *few]) == 0
    content = results(out)
    settings = content["settings"]
    assert settings["workload"] == "experiments.workloads.line:line"
    assert (settings["points"], settings["parameters"]) == (512, 9)
    adamw, _ = content["table"]
    assert adamw["learning_rate"] == 0.05
    start = content["runs"][0]["validation_loss"][0]
    assert adamw["final_loss"] < start / 2
    printed = capsys.readouterr().out
    assert "line: 9 parameters, 2 optimizers" in printed
    assert "squared error" in printed


def test_other_code_of_the_task_is_another_task(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for number in (1, 2):
        name = f"task_{number}"
        source = "from experiments.workloads.line import line as task\n"
        (tmp_path / f"{name}.py").write_text(f"{source}def own():\n    return task()  # {number}\n")
        found.append(own_workload(f"{name}:own").identity["code"])
    assert found[0] != found[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("name='a/b'", "name must be letters, digits, - and _ (a folder has it), got 'a/b'"),
        ("loss_unit=None", "loss_unit must be a text, got None"),
        ("learning_rate=-1.0", "learning_rate must be a positive number, got -1.0"),
        ("steps=30", "steps must be a positive multiple of 20, got 30"),
        ("identity={'x': (1, 2)}", "identity must survive JSON unchanged, got {'x': (1, 2)}"),
        ("identity={'x': object()}", "identity: TypeError: Object of type object is not JSON"),
        ("init=lambda key: {}", "init(key) must return parameters, got a tree without arrays"),
        ("init=lambda key: {'w': 1}", "init(key) must return floating-point arrays, got int32"),
        ("init=lambda: 0", "init(key): TypeError: "),
        ("sample=lambda data, key: data['none']", "sample(data, key): KeyError: 'none'"),
        ("loss=lambda p, batch: p['w']", "loss(params, batch) must return one floating-point numb"),
        ("loss=lambda p, batch: batch[0] @ batch[0]", "loss(params, batch): TypeError: "),
        ("validation_loss=lambda p, d: p['v']", "validation_loss(params, data): KeyError: 'v'"),
        ("validation_loss=lambda p, d: (p['b'], 0)", "validation_loss(params, data) must return"),
    ],
)
def test_a_part_that_does_not_fit_is_named(
    changes: str,
    message: str,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "my_task.py").write_text(
        "import dataclasses\nfrom experiments.workloads.line import line\n"
        f"def task():\n    return dataclasses.replace(line(), {changes})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "my_task", raising=False)
    said = refused(out, capsys, "--workload-from", "my_task:task")
    assert said.startswith(f"compare: error: --workload-from my_task:task: {message}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--workload-from no_colon", "--workload-from no_colon: expected module:function"),
        ("--workload-from no_such_module_here:f", "ModuleNotFoundError: No module named"),
        ("--workload-from math:pi", "not callable: float"),
        ("--workload-from math:sqrt", "the function: TypeError: "),
        ("--workload-from builtins:dict", "expected an experiments.harness.workload.Workload, got"),
        ("--workload-from a:b --size 1M", "--size cannot be chosen beside --workload-from"),
        ("--workload-from a:b --workload digits", "--workload cannot be chosen beside"),
        ("--workload-from a:b --batch-size 3", "--batch-size cannot be chosen beside"),
    ],
)
def test_what_is_no_task_is_one_line(
    options: str, message: str, out: Path, capsys: pytest.CaptureFixture
) -> None:
    assert message in refused(out, capsys, *options.split())


def refused(out: Path, capsys: pytest.CaptureFixture, *options: str) -> str:
    return SCRIPTS["compare"]._replace(options="--budget 20").refused(out, capsys, *options)


def test_the_example_has_held_out_points() -> None:
    data = line().data
    assert len(data["validation"][1]) + len(data["train"][1]) == 512
