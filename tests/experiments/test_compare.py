"""The main job from its command line: results, resumption, interruption, bad input."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from experiments.compare.summary import default_target, table, verdict
from experiments.harness import store as store_module
from experiments.harness import training
from experiments.harness.candidates import Candidate
from experiments.harness.runs import Timing, steps_to
from experiments.harness.training import TrainLoop, train
from experiments.workloads.digits import convolution_by_matmul, digits
from experiments.workloads.language_model import SIZES, LanguageModel, language_model
from tests.experiments.tiny import SCRIPTS, results

COMPARE = SCRIPTS["compare"]


def without_timing(content: dict) -> list:
    """The runs less what no two executions can share, wall-clock time."""
    return [{k: v for k, v in run.items() if k != "train_seconds"} for run in content["runs"]]


@pytest.mark.slow
def test_interrupted_then_continued_equals_uninterrupted(
    finished: Callable[..., Path],
    out: Path,
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
        assert COMPARE.run(out) == 130
    assert "finished runs are kept" in capsys.readouterr().err
    assert len(list((out / "runs").iterdir())) == runs_before
    assert not (out / "results.json").exists()

    trained = []
    monkeypatch.setattr(training, "train", lambda *a: trained.append(a) or train(*a))
    assert COMPARE.run(out) == 0
    assert len(trained) == 6 - runs_before
    assert without_timing(results(out)) == without_timing(results(finished("compare")))


@pytest.mark.slow
def test_optimizers_seeds_and_target_can_be_added(
    copied: Callable[..., Path],
    tmp_path: Path,
    training_runs: list,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "my_rules.py").write_text(
        "import optax\ndef momentum(learning_rate):\n    return optax.sgd(learning_rate, 0.9)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    out = copied("compare")
    more = ["--optimizer-from", "my_rules:momentum", "--seeds", "3", "--target", "2.25"]
    assert COMPARE.run(out, *more) == 0
    # One more seed for each of the old two, and two rates and two more seeds of the new one.
    assert len(training_runs) == 2 + 4
    content = results(out)
    assert content["target"] == 2.25
    line = content["table"][-1]
    assert line["optimizer"] == "my_rules:momentum"
    assert line["seeds"] == 3

    source = (tmp_path / "my_rules.py").read_text()
    (tmp_path / "my_rules.py").write_text(source.replace("0.9", "0.85"))
    monkeypatch.delitem(sys.modules, "my_rules")
    capsys.readouterr()
    assert COMPARE.run(out, *more) == 2
    assert "made by other code of my_rules:momentum" in capsys.readouterr().err


def test_divergence_is_reported(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "wild.py").write_text(
        "import optax\ndef explode(learning_rate):\n    return optax.scale(-1e30)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    options = ["--optimizers", "adamw", "--rates", "1", "--optimizer-from", "wild:explode"]
    assert COMPARE.run(out, *options) == 0
    line = results(out)["table"][-1]
    assert line["final_loss"] is None
    assert line["seeds_diverged"] == line["seeds"] == 1
    assert "diverged" in capsys.readouterr().out
    assert "diverged" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b" \n", "is empty"), (b"a few words", "too few"), (b"\xff", "UTF-8")],
)
def test_bad_text_is_one_line(
    content: bytes, message: str, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "text").write_bytes(content)
    assert message in COMPARE.refused(out, capsys, "--text", str(tmp_path / "text"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--optimizer-from no_colon", "expected module:function"),
        ("--optimizer-from no_such_module_here:f", "ModuleNotFoundError"),
        ("--optimizer-from math:no_such", "AttributeError"),
        ("--optimizer-from math:pi", "not callable"),
        ("--optimizer-from math:sqrt", "TypeError"),
        ("--optimizer-from builtins:repr", "expected an optax.GradientTransformation"),
        ("--workload images", "--workload: invalid choice"),
        ("--workload digits", "--size is for the language model"),
    ],
)
def test_bad_options_are_one_line(
    options: str, message: str, out: Path, capsys: pytest.CaptureFixture
) -> None:
    assert message in COMPARE.refused(out, capsys, *options.split())


def test_unwritable_out_is_one_line(out: Path, capsys: pytest.CaptureFixture) -> None:
    (out.parent / "file").write_text("")
    assert "cannot be written" in COMPARE.refused(out.parent / "file" / "out", capsys)


def test_other_settings_are_refused(
    finished: Callable[..., Path], capsys: pytest.CaptureFixture
) -> None:
    assert COMPARE.run(finished("compare"), "--budget", "40") == 2
    error = capsys.readouterr().err
    assert "steps was 20, is 40" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", ["results.json", "settings.json", "runs"])
def test_half_written_file_costs_only_itself(
    copied: Callable[..., Path], name: str, capsys: pytest.CaptureFixture, training_runs: list
) -> None:
    out = copied("compare")
    path = out / name
    path = sorted(path.glob("lion*"))[0] if path.is_dir() else path
    whole = path.read_bytes()
    others = {p: p.read_bytes() for p in out.rglob("*.json") if p != path}
    path.write_bytes(whole[: len(whole) // 2])
    assert COMPARE.run(out) == 2
    error = capsys.readouterr().err
    assert str(path) in error
    assert error.count("\n") == 1
    assert others == {p: p.read_bytes() for p in out.rglob("*.json") if p != path}
    path.unlink()
    assert COMPARE.run(out) == 0
    assert len(training_runs) == (1 if name == "runs" else 0)


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


def evaluated(workload):
    """The validation loss of a loop's state."""
    validation_loss = jax.jit(workload.validation_loss)
    return lambda state: float(validation_loss(state.params, workload.data))


def test_language_model_learns_the_same_twice(out: Path) -> None:
    text = (out.parent / "first.txt").read_text()
    workload = language_model("tiny", str(out.parent / "first.txt"))
    loop, evaluate = TrainLoop(workload, optax.adamw, 60), evaluated(workload)
    first, second = (train(loop, 60, evaluate, 3e-2, 0)[0] for _ in range(2))
    assert first["validation_loss"] == second["validation_loss"]  # bit for bit
    other = train(loop, 60, evaluate, 3e-2, 1)[0]
    assert other["validation_loss"][0] != first["validation_loss"][0]
    # What guessing uniformly costs, and what knowing the frequencies of the characters does.
    counts = np.array(list(Counter(text).values()))
    frequencies = counts / counts.sum()
    start, end = first["validation_loss"][0], first["validation_loss"][-1]
    assert start == pytest.approx(math.log(len(counts)), abs=1.0)
    assert end < -(frequencies * np.log(frequencies)).sum()


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


@pytest.mark.slow
def test_batches_change_with_the_step_and_not_with_the_optimizer() -> None:
    workload = digits(batch_size=8)
    evaluate = evaluated(workload)

    def losses(make_optimizer) -> list:
        loop = TrainLoop(workload, make_optimizer, 20)
        return train(loop, 20, evaluate, 0.0, 0)[0]["train_loss"]

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


def row(name: str, runs: list, target: float, seconds: dict) -> dict:
    candidate = Candidate(name, optax.sgd, 1.0, "", "")
    return table([candidate], {name: runs}, target, Timing(seconds, {}))[0]


def test_steps_to_target_interpolates() -> None:
    assert steps_to([0, 10, 20, 30], [4.0, 3.0, 1.0, 2.0], 2.0) == 15.0
    assert steps_to([0, 10], [4.0, 3.0], 2.0) is None
    assert steps_to([0, 10], [4.0, 3.0], 5.0) == 0.0


def test_seconds_follow_the_ratio_within_a_round() -> None:
    """A machine that slows down between two turns of a round favours nobody."""
    seconds = {"adamw": [1.0, 9.0, 9.0, 1.0, 1.0], "other": [18.0, 18.0, 18.0, 2.0, 2.0]}
    line = row("other", [curve([4.0, 1.0])], 2.5, seconds)
    assert line["step_time_quartiles"] == [2.0, 2.0]  # of 2, 2, 2, 2 and 18
    assert line["cpu_time_ratio"] is None
    assert line["step_time_ratio"] == 2.0
    assert line["seconds_per_step"] == 2.0
    assert line["seconds_to_target"] == 10.0


def test_a_diverged_seed_leaves_no_steps_to_target() -> None:
    runs = [curve([4.0, 1.0, 0.5]), curve([4.0, None], seed=1, status="diverged")]
    line = row("adamw", runs, 3.0, {"adamw": [0.1]})
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
    runs = [curve([4.0, 1.0]), curve([4.0, 3.0], seed=1)]
    seconds = {"adamw": [0.1, 0.3, 0.2]}
    line = row("adamw", runs, 3.0, seconds)
    assert line["steps_to_target"] == 5.0
    assert line["seconds_to_target"] == 1.0
    assert line["seeds_reaching_target"] == 2
    line = row("adamw", runs, 1.5, seconds)
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
