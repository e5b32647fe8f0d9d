"""One finished run of every experiment, made once and shared by all tests that only read it."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from matplotlib.figure import Figure

import experiments.merge_models.study as merging
from experiments.harness import timing, training
from experiments.harness.report import drawing
from tests.experiments.tiny import SCRIPTS, write_texts

DRAWN, VIEWS = Figure.savefig, drawing.views


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for all workers of the session, with the texts."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if base.name.startswith("popen-") else base) / "experiments"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "first.txt").exists():
            write_texts(folder)
    return folder


@pytest.fixture(scope="package", autouse=True)
def cheap(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every call of a command compiles anew: the same few programs. Few rounds and scales do."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("xla")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "ROUNDS", (1, 1))
        patch.setattr(merging, "SCALES", (0.3, 1.0))
        for changed in (settings, before):
            for name, value in changed.items():
                jax.config.update(name, value)
            reset_cache()
            if changed is settings:
                yield


@pytest.fixture(scope="session")
def finished(shared: Path) -> Callable[..., Path]:
    """The folder of a finished run, which a test must not change."""

    def of(name: str, variant: str = "", *more: str) -> Path:
        out = shared / f"{name}{variant}"
        with open(shared / f"{out.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (out / "results.json").exists():
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(Figure, "savefig", DRAWN)
                    patch.setattr(drawing, "views", VIEWS)
                    assert SCRIPTS[name].run(out, *more) == 0
        return out

    return of


@pytest.fixture(autouse=True)
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures are drawn for the finished runs alone."""
    content = {"png": b"\x89PNG", "svg": "<svg/>"}

    def save(figure: Figure, file: Any, format: str, **_: Any) -> None:
        file.write(content[format])

    monkeypatch.setattr(Figure, "savefig", save)
    monkeypatch.setattr(drawing, "views", lambda *_: iter(()))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A new folder for results, with the texts above it."""
    write_texts(tmp_path)
    return tmp_path / "out"


@pytest.fixture
def copied(finished: Callable[..., Path], out: Path) -> Callable[..., Path]:
    """A copy of a finished run."""

    def of(*which: str) -> Path:
        return shutil.copytree(finished(*which), out)

    return of


@pytest.fixture
def training_runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int]]:
    """Collects (peak rate, seed) of every run that is really trained."""
    trained, train = [], training.train

    def counted(loop, steps, evaluate, peak, seed, *rest):
        trained.append((peak, seed))
        return train(loop, steps, evaluate, peak, seed, *rest)

    monkeypatch.setattr(training, "train", counted)
    return trained
