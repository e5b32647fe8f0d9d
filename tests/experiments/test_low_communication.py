"""The experiment on communication from its command line: results, resumption, bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from experiments.harness import processes, training
from experiments.harness.store import write_tree
from experiments.low_communication import methods, study, summary
from experiments.low_communication.__main__ import DEFAULT
from experiments.low_communication.methods import METHODS, Setting, contenders, sent, sent_after
from experiments.workloads.language_model import language_model
from jaxopt_lab.distributed import WireBytes, simulated_replicas, wire_bytes
from tests.experiments.tiny import SCRIPTS, results

LOW = SCRIPTS["low_communication"]


@pytest.mark.slow
def test_losses_are_those_above_synchronous_training(finished: Callable[..., Path]) -> None:
    content = results(finished("low_communication"))
    sync, diloco = content["table"]
    assert (sync["optimizer"], diloco["optimizer"]) == ("sync", "diloco")
    assert sync["single_loss"] == pytest.approx(sync["final_loss"], rel=1e-6)  # equal replicas
    above = 100 * (diloco["final_loss"] / sync["final_loss"] - 1)
    assert diloco["percent_above_sync"] == pytest.approx(above, rel=1e-9)
    assert content["verdict"][1].startswith("diloco ends ")


@pytest.mark.slow
def test_bytes_are_those_of_the_traced_step(finished: Callable[..., Path], shared: Path) -> None:
    sync, diloco = results(finished("low_communication"))["table"]
    workload, setting = language_model("tiny", str(shared / "first.txt"), 2), Setting(20, 2, 5)
    params = jax.eval_shape(workload.init, jax.random.key(0))
    for line, candidate in zip((sync, diloco), contenders(["sync", "diloco"], setting, workload)):
        tx = optax.with_extra_args_support(candidate.make(optax.constant_schedule(0.1)))
        wire = wire_bytes(
            lambda p, g, tx=tx: tx.update(g, tx.init(p), p),
            params,
            params,
            axis_sizes={"replica": 2},
        )
        every = 1 if candidate.name == "sync" else 5
        assert line["bytes_per_step"] == wire.average(every)
        assert line["bytes_per_step_peak"] == wire.peak
    assert diloco["times_fewer_bytes"] == 5


WARM = ["--warm-start", "20", "--seeds", "1"]


@pytest.fixture
def warmed(finished: Callable[..., Path]) -> Path:
    return finished("low_communication", "-warm", *WARM)


@pytest.fixture
def warm_copy(warmed: Path, out: Path) -> Path:
    return shutil.copytree(warmed, out)


@pytest.fixture
def tiny_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    real, module = processes.run_processes, "tests.experiments.tiny"
    monkeypatch.setattr(processes, "run_processes", lambda _, *rest: real(module, *rest))


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], WARM])
def test_processes_give_the_losses_of_the_simulation(
    more: list[str],
    finished: Callable[..., Path],
    warmed: Path,
    out: Path,
    tiny_processes: None,
) -> None:
    of_one_device = results(warmed if more else finished("low_communication"))
    assert LOW.run(out, "--processes", "2", "--seeds", "1", *more) == 0
    simulated = [found for found in of_one_device["runs"] if found["seed"] == 0]
    for one, other in zip(results(out)["runs"], simulated, strict=True):
        assert one["optimizer"] == other["optimizer"]
        np.testing.assert_allclose(one["validation_loss"], other["validation_loss"], rtol=1e-4)


@pytest.mark.slow
def test_a_killed_process_ends_the_run(
    out: Path, tiny_processes: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("KILLED_PROCESS", "1")
    assert LOW.run(out, "--processes", "2") == 2
    assert capfd.readouterr().err == (
        "low_communication: error: process 1 of 2 was ended by SIGKILL; finished runs are kept, "
        "the same command goes on from here\n"
    )


@pytest.mark.slow
def test_a_mistake_is_one_line_from_processes_too(
    out: Path, tiny_processes: None, capfd: pytest.CaptureFixture
) -> None:
    assert LOW.run(out, "--processes", "2", "--methods", "dilocos") == 2
    error = capfd.readouterr().err
    assert error.startswith("low_communication: error: --methods: unknown method 'dilocos'; known")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--warm-start 30", "--warm-start 30: expected a multiple of 20"),
        ("--warm-start -20", "--warm-start: -20 is neither 0 nor a positive whole number"),
        ("--replicas 0", "--replicas: 0 is not a positive whole number"),
        ("--replicas 600", "--replicas 600: a replica's slice of the text has"),
        ("--processes 3", "--processes 3: does not divide --replicas 2"),
        ("--sync-every x", "--sync-every: x is not a positive whole number"),
    ],
)
def test_bad_options_are_one_line(
    options: str, message: str, out: Path, capsys: pytest.CaptureFixture
) -> None:
    assert message in LOW.refused(out, capsys, *options.split())


def test_the_default_run_has_every_method() -> None:
    assert sorted(DEFAULT) == sorted(METHODS)


def test_every_method_sends_what_it_should() -> None:
    workload, setting = language_model("tiny", None, 2), Setting(200, 8, 20)
    d = workload.identity["parameters"]
    found = {
        c.name: sent(setting, c.make, workload)
        for c in contenders(list(METHODS), setting, workload)
    }
    whole = 2 * 7 / 8 * 4 * d
    local = ("diloco", "noloco", "co2", "gossip")
    assert {name: wire.least for name, wire in found.items() if name in local} == dict.fromkeys(
        local, 0
    )
    for name in ("sync", "diloco", "co2", "one-bit-adam"):
        assert found[name].peak == whole
    assert found["noloco"].peak == found["gossip"].peak == 4 * d
    assert found["one-bit-adam"].least < whole / 25
    assert found["ef-int8"].peak < whole / 3.5
    assert found["ef21-top1"].peak == 7 * 8 * round(0.01 * d)


def test_bytes_and_modelled_time() -> None:
    setting, wire = Setting(200, 8, 20), WireBytes(())
    assert sent_after("sync", setting, wire, 200) == 0

    class Fixed(WireBytes):
        least, peak = 1.0, 11.0  # type: ignore[assignment]

    fixed = Fixed(())
    after = sent_after
    assert after("sync", setting, fixed, 200) == 200 * 11
    assert after("diloco", setting, fixed, 39) == 39 + 10
    assert after("one-bit-adam", setting, fixed, np.array([20, 200])).tolist() == [220, 200 + 400]
    seconds = summary.wall_seconds
    assert seconds("diloco", setting, fixed, 0.5, 100.0) == pytest.approx(100 + 3.0)
    # A round of co2 sends 30 bytes while it computes for 10 seconds.
    assert seconds("co2", setting, fixed, 0.5, 100.0) == pytest.approx(100)
    assert seconds("co2", setting, fixed, 0.5, 1.0) == pytest.approx(10 * 30)


def row(name: str, loss: float | None, above: float | None) -> dict:
    return {
        "optimizer": name, "final_loss": loss, "percent_above_sync": above,
        "final_loss_spread": None, "seeds": 1, "seeds_diverged": int(loss is None),
        "bytes_per_step": 1.0, "times_fewer_bytes": 20.0, "learning_rate_at_edge": False,
        "modelled_seconds": dict.fromkeys(summary.LINKS, 1.0),
        "modelled_quartiles": {link: [0.9, 1.05] for link in summary.LINKS},
    }  # fmt: skip


def test_verdict_says_what_the_runs_say() -> None:
    said = summary.verdict([
        row("sync", 2.0, 0.0), row("diloco", 2.04, 2.0), row("noloco", 2.05, 2.5),
        row("one-bit-adam", 2.03, 1.5), row("ef21-top1", None, None),
    ])  # fmt: skip
    assert said[1].startswith("diloco ends within 2% of sync: +2.00%, with 20.0 times fewer")
    assert said[2].startswith("noloco ends not within 2% of sync: +2.50%")
    assert said[3].startswith("one-bit-adam ends not within 1% of sync: +1.50%")
    assert "ef21-top1 diverged at every learning rate." in said
    alike = "the middle halves of the times of sync, diloco, noloco, one-bit-adam overlap."
    assert f"At 1 Gbit/s nothing is said about which ends its steps first: {alike}" in said
    said = summary.verdict([row("sync", None, None), row("diloco", 2.0, None)])
    assert said == ["sync diverged at every learning rate: there is nothing to compare with."]


def kept_weights(out: Path) -> tuple[list[np.ndarray], dict]:
    with np.load(out / methods.WARM_FILE) as file:
        leaves = [file[name] for name in file.files if name != "record"]
        return leaves, json.loads(str(file["record"]))


@pytest.mark.slow
def test_a_warm_start_is_a_run_of_sync_at_its_own_rate(
    warmed: Path, finished: Callable[..., Path]
) -> None:
    runs = results(finished("low_communication"))["runs"]
    (scratch,) = (r for r in runs if (r["optimizer"], r["seed"]) == ("sync", 0))
    content = results(warmed)
    end = content["warm_start"]["validation_loss"]
    assert content["warm_start"] == {"steps": 20, "learning_rate": 0.006, "validation_loss": end}
    assert end == scratch["validation_loss"][-1]
    assert content["settings"]["warm_start"] == 20
    assert len(content["runs"]) == 2
    for found in content["runs"]:
        assert found["learning_rate"] == 0.002
        assert found["validation_loss"][0] == pytest.approx(end, rel=1e-6)
        assert found["validation_loss"][-1] < end


@pytest.mark.slow
def test_all_seeds_start_from_the_warm_weights_with_batches_of_their_own(
    warm_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts, start = [], study.ReplicaLoop.start

    def seen(loop, peak, seed):
        state = start(loop, peak, seed)
        starts.append([np.asarray(leaf) for leaf in jax.tree.leaves(state.params)])
        return state

    monkeypatch.setattr(study.ReplicaLoop, "start", seen)
    assert LOW.run(warm_copy, *WARM, "--seeds", "2") == 0
    kept, _ = kept_weights(warm_copy)
    assert len(starts) == 4  # seed 1 of two methods, each after the start that compiles its loop
    for leaves in starts:
        for leaf, own in zip(leaves, kept, strict=True):
            np.testing.assert_array_equal(leaf, np.stack([own] * 2))
    first, second = (r for r in results(warm_copy)["runs"] if r["optimizer"] == "sync")
    assert first["validation_loss"][0] == second["validation_loss"][0]
    assert first["train_loss"][1] != second["train_loss"][1]


@pytest.mark.slow
def test_batches_of_the_warm_start_do_not_come_again(shared: Path) -> None:
    workload = language_model("tiny", str(shared / "first.txt"), 2)
    replicas = simulated_replicas(2, "replica")
    slices = methods.shards(workload, 2)

    def losses(steps: int, warm_start: int) -> list[float]:
        setting = Setting(steps, 2, 5, warm_start)
        (method,) = contenders(["sync"], setting, workload)
        loop = study.ReplicaLoop(workload, method.make, setting, replicas, slices)
        state, found = loop.start(0.0, 0), []
        while state.step < steps:
            state, loss = loop.run_chunk(state, 0.0, 0)  # at rate 0 only the batches differ
            found.append(loss)
        return found

    two_steps = np.reshape(losses(20, 20), (10, 2)).mean(1)
    assert two_steps == pytest.approx(losses(40, 0)[10:], rel=1e-5)


@pytest.mark.slow
def test_a_kept_warm_start_is_not_trained_again(
    warm_copy: Path,
    training_runs: list,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    before = results(warm_copy)
    monkeypatch.delattr(study, "write_tree")
    (lost,) = (warm_copy / "runs").glob("diloco*seed0.json")
    lost.unlink()
    assert LOW.run(warm_copy, *WARM) == 0
    assert "found again: 20 of 20 steps of the warm start" in capsys.readouterr().out
    assert training_runs == [(0.002, 0)]
    assert results(warm_copy)["table"] == before["table"]
    assert results(warm_copy)["warm_start"] == before["warm_start"]


@pytest.mark.slow
def test_a_warm_start_is_kept_before_any_run_is_finished(
    warmed: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    assert LOW.run(out, *WARM) == 130
    assert not list((out / "runs").iterdir())
    (leaves, record), (expected, of_the_whole) = kept_weights(out), kept_weights(warmed)
    assert record == of_the_whole
    for leaf, other in zip(leaves, expected, strict=True):
        np.testing.assert_array_equal(leaf, other)


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["0", "40"])
def test_another_warm_start_needs_another_folder(
    steps: str, warmed: Path, capsys: pytest.CaptureFixture
) -> None:
    assert LOW.run(warmed, *WARM, "--warm-start", steps) == 2
    assert f"warm_start was 20, is {steps}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changed", "moved", "message"),
    [
        ({}, 1e-3, "did not start from the weights in warm_start.npz"),
        ({"fingerprint": "0"}, 0.0, "warm_start.npz was made by other code"),
        ({"steps": 40}, 0.0, "warm_start.npz was made by other code or with other settings"),
    ],
)
def test_other_warm_weights_are_not_taken_for_these(
    changed: dict,
    moved: float,
    message: str,
    warm_copy: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    leaves, record = kept_weights(warm_copy)
    leaves[0] = leaves[0] + np.float32(moved)
    record["made_by"] |= changed
    write_tree(warm_copy / methods.WARM_FILE, leaves, record)
    assert LOW.run(warm_copy, *WARM) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_diverged_warm_start_is_an_error(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(study.Validation, "of_consensus", lambda *rest: float("nan"))
    assert LOW.run(out, *WARM) == 2
    assert capsys.readouterr().err == (
        "low_communication: error: --warm-start 20: diverged after 1 steps\n"
    )
    assert not (out / methods.WARM_FILE).exists()
