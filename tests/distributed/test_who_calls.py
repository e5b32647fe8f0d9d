"""Of several processes, those that hold replicas call, all of them, and are told if not."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_processes import ROOT, free_port

PROCESSES, LIMIT = 3, 150
pytestmark = pytest.mark.slow

# Replicas on processes 0 and 1 of three.
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np, optax

process, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"127.0.0.1:{port}", 3, process)
from jaxopt_lab import distributed
from jaxopt_lab.distributed import _processes

_processes.WAIT = 20.0
devices = [d for d in jax.devices() if d.process_index < 2]
replicas = distributed.device_replicas(devices=devices)
tx = optax.chain(distributed.sync_gradients("replica"), optax.sgd(0.1))


def attempt(what, fn, *args):
    try:
        print(what, "returned", fn(*args), flush=True)
    except Exception as error:
        print(what, type(error).__name__, str(error).splitlines()[0], flush=True)


if process < 2:
    state = replicas.init(tx, jnp.ones(3))
    print("init returned", state.params.shape, flush=True)
    if process == 0:
        attempt("alone", replicas.consensus, state.params)
    attempt("together", lambda: replicas.map(lambda x: jax.lax.psum(x, "replica"))(
        state.params).addressable_shards[0].data[0, 0])
    other = jnp.ones(3 + process)
    attempt("other shapes", replicas.init, tx, other)
else:
    attempt("outside", replicas.init, tx, jnp.ones(3))
    attempt("outside", replicas.consensus, np.ones((2, 3)))
from jax._src import distributed as runtime
runtime.global_state.client.wait_at_barrier("end", 100_000)
"""


def test_who_calls_what(tmp_path: Path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
        "PYTHONPATH": str(ROOT),
    }
    port, children = str(free_port()), []
    with contextlib.ExitStack() as stack:
        for process in range(PROCESSES):
            out = stack.enter_context(open(tmp_path / f"{process}", "w+"))
            children.append((subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(process), port], cwd=ROOT, env=environment,
                stdout=out, stderr=subprocess.STDOUT), out))  # fmt: skip
        try:
            for child, _ in children:
                child.wait(LIMIT)
        finally:
            for child, _ in children:
                child.kill()
                child.wait()
        printed = []
        for _, out in children:
            out.seek(0)
            printed.append(out.read())
    for text in printed[:2]:
        assert "init returned (2, 3)" in text, printed
        assert "together returned 2.0" in text, printed
        assert "other shapes ValueError the parameters of process" in text, printed
    assert (
        "alone RuntimeError Replicas.consensus has to be called by all of the processes [0, 1]"
        in printed[0]
    ), printed
    for function in ("init", "consensus"):
        assert (
            f"outside ValueError Replicas.{function} was called by process 2, which holds none"
            in printed[2]
        ), printed
