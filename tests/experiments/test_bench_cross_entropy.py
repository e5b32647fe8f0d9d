"""`experiments.bench_cross_entropy`: what it measures, prints and writes."""

from __future__ import annotations

import json

import pytest

from experiments.bench_cross_entropy import methods, summary
from experiments.bench_cross_entropy.__main__ import main


def test_all_codes_have_one_loss_and_the_file_has_every_round(tmp_path, capsys):
    out = tmp_path / "found.json"
    assert main(["--rounds", "2", "--shape", "16,8,40,float32", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["kind"] == "bench_cross_entropy"
    (measured,) = record["shapes"]
    results = measured["results"]
    assert [*results] == [*methods.contenders()]
    for result in results.values():
        assert result["loss"] == pytest.approx(results[methods.BASE]["loss"], rel=1e-5)
        assert all(len(result[which]["seconds"]) == 2 for which in summary.PASSES)
    printed = capsys.readouterr().out
    assert all(name in printed for name in results)


def test_a_ratio_is_the_median_within_rounds():
    base, run = {"seconds": [1.0, 10.0, 4.0]}, {"seconds": [2.0, 10.0, 2.0]}
    assert summary.ratio(base, run) == 1
    assert summary.part({"temporary_bytes": 300}, {"temporary_bytes": 10}) == "1/30"


def test_a_wrong_shape_is_told_what_is_expected(capsys):
    assert main(["--shape", "16,8,float32"]) == 2
    assert "tokens,width,vocabulary,dtype" in capsys.readouterr().err
