"""One process of a training run, with checkpoints that outlive it; `test_processes.py` starts it.

    python -m tests.distributed.process_worker FOLDER PROCESS PROCESSES PORT [STEP KIND]

With STEP it kills itself there: before the exchange of that step ("step"), or halfway through
writing the checkpoint that follows it ("write").
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from jaxopt_lab.distributed import (
    Replicas,
    TrainRounds,
    device_replicas,
    diloco,
    diloco_exchange,
    one_bit_adam,
    train_rounds,
)

STEPS, CHECKPOINT_EVERY, SYNC_EVERY, FREEZE_STEP = 12, 2, 3, 4
LOST_PEER = 3  # exit code
HEARTBEAT = 10  # seconds without a sign of life after which a process counts as dead


def loss(params: Any, batch: jax.Array) -> jax.Array:
    return jnp.mean((jnp.tanh(batch @ params["w"]) + params["b"] - 0.5) ** 2)


def batches(step: int, replicas: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(replicas, 5, 3)).astype(np.float32)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Checkpoints:
    """Files of one process for each step; a step counts if all processes have theirs.

    A file is written under a temporary name, synced and renamed: it is whole or not there.
    """

    def __init__(self, folder: Path, process: int, processes: int):
        self.folder, self.process, self.processes = folder, process, processes

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:04d}-process-{self.process}-of-{self.processes}.npz"

    def last(self) -> int:
        """The last step that all processes have written, or 0."""
        pattern = re.compile(rf"step-(\d+)-process-\d+-of-{self.processes}\.npz")
        found = [int(match[1]) for path in self.folder.iterdir()
                 if (match := pattern.fullmatch(path.name))]  # fmt: skip
        return max((step for step in found if found.count(step) == self.processes), default=0)

    def save(self, step: int, state: Any, die_halfway: bool = False) -> None:
        """Writes what this process holds of `state`."""
        temporary = self.path(step).with_suffix(".tmp")
        with open(temporary, "wb") as file:
            np.savez(file, *(_held(leaf) for leaf in jax.tree.leaves(state)))
            file.flush()
            if die_halfway:
                file.truncate(file.tell() // 2)
                die()
            os.fsync(file.fileno())
        os.replace(temporary, self.path(step))
        folder = os.open(self.folder, os.O_RDONLY)
        os.fsync(folder)  # the new name too
        os.close(folder)

    def load(self, step: int, like: Any) -> Any:
        """Reads the state of that step; `like` has its tree, shapes and shardings."""
        leaves, structure = jax.tree.flatten(like)
        with np.load(self.path(step)) as stored:
            return structure.unflatten(map(_put, stored.values(), leaves))


def _held(leaf: jax.Array) -> np.ndarray:
    """The rows of the replicas of this process, or all of an array that all processes have."""
    if leaf.is_fully_replicated:
        return np.asarray(leaf.addressable_data(0))
    shards = sorted(leaf.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return np.concatenate([np.asarray(shard.data) for shard in shards])


def _put(held: np.ndarray, like: jax.Array) -> jax.Array:
    if like.is_fully_replicated:
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: held[index])
    return jax.make_array_from_process_local_data(like.sharding, held, like.shape)


def methods(replicas: Replicas) -> dict[str, optax.GradientTransformation]:
    axis = replicas.axis_name
    return {
        "diloco": diloco(optax.adam(1e-2), sync_every=SYNC_EVERY, axis_name=axis),
        "one_bit_adam": one_bit_adam(1e-2, FREEZE_STEP, axis),
    }


def whole_rounds(replicas: Replicas) -> TrainRounds:
    """DiLoCo once more, a round at a time, with its outer state on the host."""
    exchange = diloco_exchange(axis_name=replicas.axis_name)
    return train_rounds(
        replicas, loss, optax.adam(1e-2), exchange, SYNC_EVERY, exchange_memory_kind="pinned_host"
    )


def train(checkpoints: Checkpoints, kill_at: int, kill_in: str) -> None:
    """Trains with all methods from the last checkpoint; prints the losses of its replicas."""
    replicas = device_replicas()
    txs, rounds = methods(replicas), whole_rounds(replicas)
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    states = {name: replicas.init(tx, params) for name, tx in txs.items()}
    states["rounds"] = rounds.init(params)
    steps = {name: replicas.train_step(loss, tx) for name, tx in txs.items()}
    done = checkpoints.last()
    if done:
        states = checkpoints.load(done, states)
    print(f"starts after step {done}", flush=True)
    for step in range(done + 1, STEPS + 1):
        batch = batches(step, replicas.count)[list(replicas.local)]
        if step == kill_at and kill_in == "step":
            die()
        for name in txs:
            states[name], losses = steps[name](states[name], replicas.shard(batch))
            report(step, name, replicas, _held(losses))
        if step % SYNC_EVERY == 0:
            of_round = range(step - SYNC_EVERY + 1, step + 1)
            batch = np.stack([batches(s, replicas.count) for s in of_round], axis=1)
            batch = replicas.shard(batch[list(replicas.local)])
            states["rounds"], losses = rounds.step(states["rounds"], batch)
            for s, values in zip(of_round, _held(losses).T, strict=True):
                report(s, "rounds", replicas, values)
        if step % CHECKPOINT_EVERY == 0:
            checkpoints.save(step, states, step == kill_at and kill_in == "write")


def report(step: int, name: str, replicas: Replicas, losses: np.ndarray) -> None:
    for replica, value in zip(replicas.local, losses, strict=True):
        print("loss", step, name, replica, float(value).hex(), flush=True)


def leave(folder: Path, process: int, processes: int, port: str) -> None:
    """Leaves the coordinator last: whoever is connected when it goes is ended by the runtime."""
    multihost_utils.sync_global_devices("end")
    if process == 0:
        limit = time.monotonic() + HEARTBEAT
        while len(list(folder.glob(f"left-{port}-*"))) < processes - 1 and time.monotonic() < limit:
            time.sleep(0.02)
        jax.distributed.shutdown()
    else:
        jax.distributed.shutdown()
        (folder / f"left-{port}-{process}").touch()


def main(folder: str, process: str, processes: str, port: str, *kill: str) -> int:
    checkpoints = Checkpoints(Path(folder), int(process), int(processes))
    if checkpoints.processes > 1:
        # Without it a lost peer is an error that can be caught, but the runtime aborts anyway.
        jax.config.update("jax_enable_recoverability", True)
        jax.distributed.initialize(
            f"127.0.0.1:{port}", int(processes), int(process), heartbeat_timeout_seconds=HEARTBEAT
        )
    try:
        train(checkpoints, *((int(kill[0]), kill[1]) if kill else (0, "")))
    except Exception as error:  # which one depends on the operation that was under way
        reason = str(error).splitlines()[0][:200]
        print(
            f"process {process}: lost a peer ({reason}); step {checkpoints.last()} is the last "
            "that all processes have: start all of them again to go on from there",
            file=sys.stderr,
            flush=True,
        )
        os._exit(LOST_PEER)  # no farewell to peers that do not answer
    if checkpoints.processes > 1:
        leave(checkpoints.folder, checkpoints.process, checkpoints.processes, port)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
