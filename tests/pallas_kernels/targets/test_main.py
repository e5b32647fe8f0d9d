from __future__ import annotations

import json

import pytest

from pallas_kernels.targets import __main__ as command_line
from pallas_kernels.targets.__main__ import format_report, main
from tests.pallas_kernels.targets import cases, needs

REPORT = {
    "function": "module:case",
    "chip": "h200",
    "jax_version": "1.2.3",
    "memory": {"argument": 4096, "output": 8},
    "traffic": {
        "total_bytes": 30_600,
        "kernels": [
            {"name": "a", "opcode": "copy", "operand_bytes": 5, "result_bytes": 5, "times": 60},
            {
                "name": "b",
                "opcode": "fusion",
                "operand_bytes": 300,
                "result_bytes": 3,
                "times": 100,
            },
        ],
    },
}
SGD = "tests.pallas_kernels.targets.cases:sgd"


def test_report_lists_the_largest_kernel_first():
    lines = format_report(REPORT).splitlines()
    assert lines[0] == "module:case on h200, jax 1.2.3"
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert names == ["argument", "output", "b", "a"]
    assert lines[-1].split()[-1] == "30,600"


def test_report_opens_with_the_route():
    lines = format_report(REPORT | {"routes": ["mosaic_tpu", "decode, chunked"]}).splitlines()
    assert lines[:2] == ["route: mosaic_tpu; decode, chunked", "module:case on h200, jax 1.2.3"]
    assert format_report(REPORT | {"routes": []}) == format_report(REPORT)


def test_a_missing_trip_count_is_asked_for_as_the_command_line_spells_it(capsys, monkeypatch):
    def compile_(*_, **__):
        raise ValueError(
            "loop 'while.66' depends on data; expected it as trip_counts={'while.66': n}"
        )

    monkeypatch.setattr(command_line, "compile_with_resources", compile_)
    assert main([SGD, "--chip", "h200"]) == 2
    assert "expected it as --trip-count while.66=N" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SGD, "--chip", "h300"], "chip='h300' is not known"),
        ([SGD], "--chip"),
        ([SGD, "--chip", "h200", "--trip-count", "x"], "'x' was given; expected LOOP=N"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, capsys):
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("chip", [needs.on("h200")])
def test_report_of_a_real_program(chip, capsys):
    assert main([SGD, "--chip", chip, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["traffic"]["total_bytes"] == 12 * cases.PARAMETERS
    assert main(["absent:case", "--chip", chip]) == 2
    assert main(["tests.pallas_kernels.targets.cases:refused", "--chip", chip]) == 1
