"""The main job from its command line: results, resumption, interruption, bad input."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from experiments import compare
from experiments.parts import store as store_module
from experiments.parts import study as study_module
from experiments.parts.digits import convolution_by_matmul, digits
from experiments.parts.language_model import SIZES, LanguageModel, language_model
from experiments.parts.optimizers import Candidate
from experiments.parts.summary import default_target, row, steps_to, verdict
from experiments.parts.training import TrainLoop, train

TINY = ["--workload", "digits", "--optimizers", "adamw,lion", "--budget", "20", "--batch-size", "8",
        "--rates", "2", "--seeds", "2"]  # fmt: skip


def run(out: Path, *more: str) -> int:
    return compare.main([*TINY, "--out", str(out), *more])


def results(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())


def without_timing(content: dict) -> list:
    """The runs less what no two executions can share, wall-clock time."""
    return [{k: v for k, v in run.items() if k != "train_seconds"} for run in content["runs"]]


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every call of the command compiles anew; the tests repeat the same few programs."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for changed in (settings, before):
        for name, value in changed.items():
            jax.config.update(name, value)
        reset_cache()
        if changed is settings:
            yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "finished"
    assert run(out) == 0
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
    assert {"date", "argv", "device", "versions", "settings", "verdict"} <= content.keys()
    assert {"jax", "optax", "flax"} <= content["versions"].keys()
    assert len(content["runs"]) == 2 * (2 + 1)  # two rates, one more seed, two optimizers
    table = {line["optimizer"]: line for line in content["table"]}
    assert table["adamw"]["step_time_ratio"] == 1.0
    # Two moments or one, in float32; the rest is a counter or two of four bytes.
    parameters = content["settings"]["parameters"]
    assert 8 < table["adamw"]["state_bytes_per_parameter"] <= 8 + 8 / parameters
    assert 4 < table["lion"]["state_bytes_per_parameter"] <= 4 + 8 / parameters
    for name, line in table.items():
        at_best = [
            r["validation_loss"][-1]
            for r in content["runs"]
            if r["optimizer"] == name and r["learning_rate"] == line["learning_rate"]
        ]
        assert len(at_best) == line["seeds"] == 2
        assert line["final_loss"] == pytest.approx(np.mean(at_best), rel=1e-12)  # one rounding
        assert line["final_loss_spread"] == pytest.approx(np.std(at_best, ddof=1), rel=1e-9)


def test_report_is_self_contained(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r"https?://|<script|<link|src=(?!\"data:)", page)
    assert "lion" in page
    assert "state bytes / param." in page
    for name in ("curves.png", "rates.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_repeated(finished: Path, training_runs: list) -> None:
    before = results(finished)
    stamps = {path: path.stat().st_mtime_ns for path in (finished / "runs").iterdir()}
    assert run(finished) == 0
    assert training_runs == []
    assert stamps == {path: path.stat().st_mtime_ns for path in (finished / "runs").iterdir()}
    assert {**results(finished), "date": 0} == {**before, "date": 0}


def test_interrupted_then_continued_equals_uninterrupted(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    chunks, runs_before = 0, 2
    run_chunk = TrainLoop.run_chunk

    def interrupted_in_the_middle(self, *arguments):
        nonlocal chunks
        chunks += 1
        if chunks == 20 * runs_before + 10:
            raise KeyboardInterrupt
        return run_chunk(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(TrainLoop, "run_chunk", interrupted_in_the_middle)
        assert run(tmp_path) == 130
    assert "finished runs are kept" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").iterdir())) == runs_before
    assert not (tmp_path / "results.json").exists()

    trained = []
    monkeypatch.setattr(study_module, "train", lambda *a: trained.append(a) or train(*a))
    assert run(tmp_path) == 0
    assert len(trained) == 6 - runs_before
    assert without_timing(results(tmp_path)) == without_timing(results(finished))


def test_optimizers_seeds_and_target_can_be_added(
    finished: Path,
    tmp_path: Path,
    training_runs: list,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "my_rules.py").write_text(
        "import optax\ndef momentum(learning_rate):\n    return optax.sgd(learning_rate, 0.9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(finished, tmp_path / "out")
    more = ["--optimizer-from", "my_rules:momentum", "--seeds", "3", "--target", "2.25"]
    assert run(tmp_path / "out", *more) == 0
    # One more seed for each of the old two, and two rates and two more seeds of the new one.
    assert len(training_runs) == 2 + 4
    content = results(tmp_path / "out")
    assert content["target"] == 2.25
    line = content["table"][-1]
    assert line["optimizer"] == "my_rules:momentum"
    assert line["seeds"] == 3

    source = (tmp_path / "my_rules.py").read_text()
    (tmp_path / "my_rules.py").write_text(source.replace("0.9", "0.85"))
    monkeypatch.delitem(sys.modules, "my_rules")
    capsys.readouterr()
    assert run(tmp_path / "out", *more) == 2
    assert "made by other code of my_rules:momentum" in capsys.readouterr().err


def test_divergence_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "wild.py").write_text(
        "import optax\ndef explode(learning_rate):\n    return optax.scale(-1e30)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--optimizers", "adamw", "--rates", "1", "--optimizer-from", "wild:explode"]
    assert run(tmp_path / "out", *options) == 0
    line = results(tmp_path / "out")["table"][-1]
    assert line["final_loss"] is None
    assert line["seeds_diverged"] == line["seeds"] == 1
    assert "diverged" in capsys.readouterr().out
    assert "diverged" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizers", "adamw,adamz"], "unknown optimizer 'adamz'; known: adamw, lion"),
        (["--optimizer-from", "no_colon"], "expected module:function"),
        (["--optimizer-from", "no_such_module_here:f"], "ModuleNotFoundError"),
        (["--optimizer-from", "math:no_such"], "AttributeError"),
        (["--optimizer-from", "math:pi"], "not callable"),
        (["--optimizer-from", "math:sqrt"], "TypeError"),
        (["--optimizer-from", "builtins:repr"], "expected an optax.GradientTransformation"),
        (["--budget", "30"], "--budget 30: expected a multiple of 20"),
        (["--budget", "many"], "--budget: many is not a positive whole number"),
        (["--seeds", "0"], "--seeds: 0 is not a positive whole number"),
        (["--workload", "images"], "--workload: invalid choice"),
        (["--text", "x.txt"], "--text is for the language model"),
        (["--workload", "language_model", "--size", "7B"], "--size 7B: unknown"),
        (["--workload", "language_model", "--text", "no/such/file"], "cannot be read"),
    ],
)
def test_bad_options_are_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(tmp_path, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"a few words", "too few"), (b"\xff", "UTF-8")],
)
def test_bad_text_is_one_line(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "text").write_bytes(content)
    text = ["--workload", "language_model", "--text", str(tmp_path / "text")]
    assert run(tmp_path / "out", *text) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_unwritable_out_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert run(tmp_path / "file" / "out") == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert error.count("\n") == 1


def test_other_settings_are_refused(finished: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(finished, "--budget", "40") == 2
    error = capsys.readouterr().err
    assert "steps was 20, is 40" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["results.json", "settings.json", "runs"])
def test_half_written_file_costs_only_itself(
    finished: Path, name: str, capsys: pytest.CaptureFixture, training_runs: list
) -> None:
    path = finished / name
    path = sorted(path.glob("lion*"))[0] if path.is_dir() else path
    whole = path.read_bytes()
    others = {p: p.read_bytes() for p in finished.rglob("*.json") if p != path}
    path.write_bytes(whole[: len(whole) // 2])
    try:
        assert run(finished) == 2
        error = capsys.readouterr().err
        assert str(path) in error
        assert error.count("\n") == 1
        assert others == {p: p.read_bytes() for p in finished.rglob("*.json") if p != path}
        path.unlink()
        assert run(finished) == 0
        assert len(training_runs) == (1 if name == "runs" else 0)
    finally:
        path.write_bytes(whole)


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    store_module.write_json(path, {"kind": "x", "value": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(store_module.UserError, match="No space left"):
        store_module.write_json(path, {"kind": "x", "value": 2})
    assert store_module.read_json(path, "x")["value"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_language_model_learns_the_same_twice() -> None:
    workload = language_model(batch_size=4)
    validation_loss = jax.jit(workload.validation_loss)
    loop = TrainLoop(workload, optax.adamw, 40)
    first, second = (train(loop, validation_loss, 6e-3, 0) for _ in range(2))
    assert first["validation_loss"] == second["validation_loss"]  # bit for bit
    other = train(loop, validation_loss, 6e-3, 1)
    assert other["validation_loss"][0] != first["validation_loss"][0]
    # Uniform guessing costs log(vocabulary); knowing the frequencies of characters about 3.2.
    start, end = first["validation_loss"][0], first["validation_loss"][-1]
    assert start == pytest.approx(math.log(workload.identity["vocabulary"]), abs=1.0)
    assert end < 3.3


def test_language_model_is_causal() -> None:
    calls = []

    def attention_fn(q, k, v, is_causal):
        calls.append(q.shape)
        return jax.nn.dot_product_attention(q, k, v, is_causal=is_causal)

    size = SIZES["0.15M"]
    model = LanguageModel(size, 7, attention_fn=attention_fn, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(1), (1, 8), 0, 7)
    forward = jax.jit(model)
    before, after = forward(tokens), forward(tokens.at[0, 5].set((tokens[0, 5] + 1) % 7))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (before[:, 5:] != after[:, 5:]).any(-1).all()
    assert calls == [(1, 8, size.heads, size.width // size.heads)] * size.layers


def test_batches_change_with_the_step_and_not_with_the_optimizer() -> None:
    workload = digits(batch_size=8)
    validation_loss = jax.jit(workload.validation_loss)

    def losses(make_optimizer) -> list:
        return train(TrainLoop(workload, make_optimizer, 20), validation_loss, 0.0, 0)["train_loss"]

    # At rate 0 the weights stay, so that a loss tells which batch it is of.
    with_sgd, with_lion = losses(optax.sgd), losses(optax.lion)
    assert with_sgd == with_lion
    assert len(set(with_sgd[1:])) == 20


@pytest.mark.parametrize("strides", [(1, 1), (2, 2)])
def test_convolution_by_matmul_equals_xla(strides: tuple[int, int]) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 5))
    expected = jax.lax.conv_general_dilated(
        x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    # 27 products of order one, summed in another order in float32.
    np.testing.assert_allclose(
        convolution_by_matmul(x, kernel, strides, "SAME"), expected, atol=1e-5, rtol=0
    )


def curve(losses: list, seed: int = 0, rate: float = 1.0, status: str = "finished") -> dict:
    return {
        "seed": seed,
        "learning_rate": rate,
        "status": status,
        "steps": [10 * i for i in range(len(losses))],
        "validation_loss": losses,
        "state_bytes_per_parameter": 8.0,
    }


def test_steps_to_target_interpolates() -> None:
    assert steps_to([0, 10, 20, 30], [4.0, 3.0, 1.0, 2.0], 2.0) == 15.0
    assert steps_to([0, 10], [4.0, 3.0], 2.0) is None
    assert steps_to([0, 10], [4.0, 3.0], 5.0) == 0.0


def test_seconds_follow_the_ratio_within_a_round() -> None:
    """A machine that slows down between two turns of a round favours nobody."""
    seconds = {"adamw": [1.0, 9.0, 9.0, 1.0, 1.0], "other": [18.0, 18.0, 18.0, 2.0, 2.0]}
    line = row(Candidate("other", optax.sgd, 1.0, "", ""), [curve([4.0, 1.0])], 2.5, seconds)
    assert line["step_time_ratio"] == 2.0
    assert line["seconds_per_step"] == 2.0
    assert line["seconds_to_target"] == 10.0


def test_a_diverged_seed_leaves_no_steps_to_target() -> None:
    candidate = Candidate("adamw", optax.adamw, 1.0, "", "")
    runs = [curve([4.0, 1.0, 0.5]), curve([4.0, None], seed=1, status="diverged")]
    line = row(candidate, runs, 3.0, {"adamw": [0.1]})
    assert line["steps_to_target"] is None
    assert line["seeds_diverged"] == 1
    assert line["final_loss"] == 0.5


def test_default_target_is_at_nine_tenths_of_the_best_rate() -> None:
    worse = curve([5.0] * 21, rate=2.0)
    best = [curve([20.0 - i for i in range(21)]), curve([22.0 - i for i in range(21)], seed=1)]
    assert default_target([worse, *best]) == 3.0  # index 18 of 20: 2
    assert 4
    assert default_target([curve([1.0, None], status="diverged")]) is None


def test_steps_to_target_are_those_of_the_mean_over_seeds() -> None:
    candidate = Candidate("adamw", optax.adamw, 1.0, "", "")
    runs = [curve([4.0, 1.0]), curve([4.0, 3.0], seed=1)]
    seconds = {"adamw": [0.1, 0.3, 0.2]}
    line = row(candidate, runs, 3.0, seconds)
    assert line["steps_to_target"] == 5.0
    assert line["seconds_to_target"] == 1.0
    assert line["seeds_reaching_target"] == 2
    line = row(candidate, runs, 1.5, seconds)
    assert line["seeds_reaching_target"] == 1
    assert line["steps_to_target"] is None
    assert line["seconds_per_step"] == 0.2
    assert line["final_loss"] == 2.0


def test_verdict_calls_a_difference_only_what_exceeds_the_spread():
    def entry(name, loss, spread=0.01):
        return {
            "optimizer": name,
            "final_loss": loss,
            "final_loss_spread": spread,
            "steps_to_target": None,
            "learning_rate_at_edge": False,
        }

    rows = [entry("adamw", 1.0), entry("near", 1.015), entry("far", 1.03), entry("better", 0.9)]
    lines = "\n".join(verdict(rows, 0.5, "nats"))
    assert "Within the spread of the seeds of adamw: near." in lines
    assert "Worse than adamw in final loss: far." in lines
    diverged = [entry("adamw", None), entry("near", 1.0)]
    assert verdict(diverged, 0.5, "nats") == ["adamw diverged at every learning rate."]
