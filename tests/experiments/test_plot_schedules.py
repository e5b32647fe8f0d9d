"""The picture of the schedules from its command line: files, table, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from experiments.plot_schedules import methods, pictures, summary
from experiments.plot_schedules.__main__ import main
from jaxopt_lab import schedules


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("schedules") / "new" / "folder"
    assert main(["--steps", "40", "--out", str(out)]) == 0
    return out


@pytest.mark.slow
def test_files(finished: Path) -> None:
    assert (finished / "schedules.png").read_bytes().startswith(b"\x89PNG")
    text = (finished / "schedules.json").read_text()
    assert str(finished) not in text
    found = json.loads(text)
    assert found["kind"] == "schedules"
    assert len(found["rates"]) == 6
    curves = {name: rates for panel in found["rates"].values() for name, rates in panel.items()}
    assert [row["schedule"] for row in found["table"]] == list(curves)
    assert all(len(rates) == len(found["updates_shown"]) == 40 for rates in curves.values())
    cosine = schedules.as_table(schedules.uba_schedule(1.0, 0.01, 40, 2.0), 40)
    # Six digits are written.
    np.testing.assert_allclose(curves["phi = 2, the cosine"], cosine, rtol=1e-5)
    assert curves["from 0.01"][0] == 0.01
    assert curves["from 0.01"][-1] > 0.02
    assert min(found["gradient_norms"]) > 0


@pytest.mark.slow
def test_table(finished: Path) -> None:
    found = json.loads((finished / "schedules.json").read_text())["table"]
    rows = {row["schedule"]: row for row in found}
    assert rows["linear decay"]["half_way"] == pytest.approx(0.5)
    assert rows["refined for Adam (l1)"]["last"] == 0
    assert rows["stable for ever"]["last"] == 1
    assert summary.row("x", np.array([1.0, 2.0, 0.0]))["mean_over_highest"] == 0.5


def test_every_curve_is_in_a_legend() -> None:
    norms = np.linspace(2, 1, 40)
    panels = {**methods.tables(40, norms), "adaptive": {"from 1": np.ones(40)}}
    drawn = pictures.figure(panels, norms)
    for axes, found in zip(drawn.axes, panels.values(), strict=True):
        legend = axes.get_legend()
        assert legend is not None
        names = [text.get_text() for text in legend.get_texts()]
        assert [name for name in names if not name.startswith("gradient norm")] == list(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "10"], "--steps 10: expected 40 or more"),
        (["--steps", "no"], "no is not a positive whole number"),
        (["--phi", "3"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main([*options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("plot_schedules: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_made(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot be written" in capsys.readouterr().err
