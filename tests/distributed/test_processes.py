"""Real processes over the loopback address: same numbers, clear ends, and restarts to the bit."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.distributed import process_worker
from tests.distributed.process_worker import LOST_PEER, STEPS

ROOT = Path(__file__).parents[2]
PROCESSES = 4
LIMIT = 150  # seconds for a whole run on a busy machine; nothing here may hang
END_WITHIN = 60  # seconds after the first process has gone

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str
    seconds_after_first: float


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def run(folder: Path, processes: int, devices: int, kill: Sequence[object] = ()) -> list[Ended]:
    """Starts the workers, of which `kill` = (process, step, kind) says which dies, and waits."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    port, children = free_port(), []
    with contextlib.ExitStack() as stack:
        for process in range(processes):
            arguments = [
                folder,
                process,
                processes,
                port,
                *(kill[1:] if process in kill[:1] else ()),
            ]
            out, err = (stack.enter_context(open(folder / f"{process}.{end}", "w+"))
                        for end in ("out", "err"))  # fmt: skip
            command = [sys.executable, "-m", "tests.distributed.process_worker"]
            children.append(
                (subprocess.Popen([*command, *map(str, arguments)], cwd=ROOT, env=environment,
                                  stdout=out, stderr=err), out, err)
            )  # fmt: skip
        try:
            ends = _ends([child for child, _, _ in children])
        finally:
            for child, _, _ in children:
                child.kill()
                child.wait()
        found = []
        for (child, out, err), end in zip(children, ends, strict=True):
            out.seek(0)
            err.seek(0)
            found.append(Ended(child.returncode, out.read(), err.read(), end - min(ends)))
    return found


def _ends(children: list[subprocess.Popen]) -> list[float]:
    """Waits for all; returns when each ended."""
    ends: dict[int, float] = {}
    limit = time.monotonic() + LIMIT
    while len(ends) < len(children):
        now = time.monotonic()
        assert now < limit, f"still running after {LIMIT} s"
        ends |= {i: now for i, c in enumerate(children) if i not in ends and c.poll() is not None}
        time.sleep(0.02)
    return [ends[i] for i in range(len(children))]


def losses(found: list[Ended]) -> dict[tuple[int, str, int], float]:
    lines = [m for one in found for m in re.findall(r"loss (\d+) (\w+) (\d) (\S+)$", one.out, re.M)]
    return {(int(s), name, int(i)): float.fromhex(value) for s, name, i, value in lines}


def state(folder: Path, step: int = STEPS) -> list[np.ndarray]:
    """All arrays that the processes have written after that step."""
    found = []
    for process in range(PROCESSES):
        with np.load(process_worker.Checkpoints(folder, process, PROCESSES).path(step)) as stored:
            found += list(stored.values())
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    """A run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    found = run(folder, PROCESSES, 1)
    assert [one.code for one in found] == [0] * PROCESSES, found[0].err
    return folder, found


def test_processes_agree_with_devices_of_one_process(whole, tmp_path):
    (alone,) = run(tmp_path, 1, PROCESSES)
    assert alone.code == 0, alone.err
    expected, found = losses([alone]), losses(whole[1])
    assert expected.keys() == found.keys()
    assert len(found) == 3 * STEPS * PROCESSES
    for key, value in found.items():
        assert value == pytest.approx(expected[key], rel=1e-5), key  # sums in another order
        if key[1] == "rounds":  # DiLoCo as the steps train it
            assert value == pytest.approx(found[key[0], "diloco", key[2]], rel=1e-5), key


def test_killed_processes_end_the_run_clearly_and_restarts_lose_nothing(whole, tmp_path):
    """A worker dies while it writes, and after a restart the coordinator within a step."""

    def start(*kill: object) -> tuple[int, list[Ended]]:
        found = run(tmp_path, PROCESSES, 1, kill)
        begun = {re.findall(r"starts after step (\d+)$", one.out, re.M)[0] for one in found}
        assert len(begun) == 1, "the processes do not agree on where to start"
        return int(begun.pop()), found

    began, found = start(2, 8, "write")
    assert began == 0
    assert found[2].code == -signal.SIGKILL
    half = process_worker.Checkpoints(tmp_path, 2, PROCESSES).path(8)
    assert half.with_suffix(".tmp").exists()
    assert not half.exists()
    for process in (0, 1, 3):
        assert found[process].code == LOST_PEER, found[process].err
        assert f"process {process}: lost a peer" in found[process].err
        assert "step 6 is the last that all processes have" in found[process].err
        assert found[process].seconds_after_first < END_WITHIN

    # The runtime ends every process that loses the coordinator, whatever the program does.
    began, found = start(0, 11, "step")
    assert began == 6
    assert found[0].code == -signal.SIGKILL
    for one in found[1:]:
        assert one.code in (LOST_PEER, -signal.SIGABRT), one.err
        assert one.err.strip()
        assert one.seconds_after_first < END_WITHIN

    began, found = start()
    assert began == 10
    assert [one.code for one in found] == [0] * PROCESSES, found[0].err
    for expected, reached in zip(state(whole[0]), state(tmp_path), strict=True):
        np.testing.assert_array_equal(reached, expected)
    before = losses(whole[1])
    assert {key: before[key] for key in losses(found)} == losses(found)
