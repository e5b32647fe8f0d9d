"""Real processes of one script on this machine, which talk over the loopback address."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO

from experiments.harness import UserError

HEARTBEAT = 10
"""Seconds without a sign of life after which the runtime counts a process as dead."""
_PLACE = "EXPERIMENT_PROCESS"  # "process processes port", set for the children alone


def run_processes(module: str, arguments: Sequence[str], processes: int, devices: int) -> None:
    """Runs `python -m module` in so many processes of so many CPU devices each.

    The first one prints. If one ends early the others, which could only wait for it, are ended.

    Raises:
      UserError: a process ended with an error; its own message, or how it ended.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    port, children = _free_port(), []
    with tempfile.TemporaryFile("w+") as errors:
        try:
            for process in range(processes):
                environment = os.environ | {
                    "JAX_PLATFORMS": "cpu",
                    "XLA_FLAGS": flags.strip(),
                    _PLACE: f"{process} {processes} {port}",
                }
                children.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *arguments],
                        env=environment,
                        stdout=None if process == 0 else subprocess.DEVNULL,
                        stderr=errors if process == 0 else subprocess.DEVNULL,
                    )
                )
            _wait(children, errors)
        finally:
            for child in children:
                child.kill()
                child.wait()


def join_processes() -> bool:
    """In a child of `run_processes`: joins the others. Returns whether this is one."""
    if not is_child():
        return False
    import jax

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    process, processes, port = os.environ[_PLACE].split()
    jax.distributed.initialize(
        f"127.0.0.1:{port}", int(processes), int(process), heartbeat_timeout_seconds=HEARTBEAT
    )
    return True


def is_child() -> bool:
    """Whether `run_processes` started this process."""
    return _PLACE in os.environ


def _end_with(parent: int) -> None:
    """Ends this process once its parent is gone, whatever it is doing."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def _wait(children: list[subprocess.Popen], errors: IO[str]) -> None:
    while True:
        codes = [child.poll() for child in children]
        if all(code == 0 for code in codes):
            return
        for process, code in enumerate(codes):
            if code:
                # The code of a mistake in the input is 2; its one line is the last.
                errors.seek(0)
                said = errors.read().rpartition(": error: ")[2].strip() if code == 2 else ""
                raise UserError(said or _ended(process, len(children), code))
        time.sleep(0.05)


def _ended(process: int, processes: int, code: int) -> str:
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
    return (
        f"process {process} of {processes} {how}; finished runs are kept, the same command goes "
        "on from here"
    )


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
