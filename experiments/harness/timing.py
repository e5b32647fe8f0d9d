"""How long a step takes: the compiled loops take turns until their ratios are known."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from experiments.harness.runs import WIDE, Timing, ratio_quartiles
from experiments.harness.training import Loop

ROUNDS = (7, 15)
"""At least and at most so many rounds are measured."""
Call = tuple[Callable[..., Any], Sequence[Any]]
"""A function and its arguments."""
SETTLED = 0.02
"""No more rounds once the standard error of every median ratio is below this part of it."""


def measure(
    loops: Mapping[str, Loop],
    peaks: Mapping[str, float],
    baseline: str,
    on_chunk: Callable[[int, str], None] = lambda steps, name: None,
) -> Timing:
    """Seconds per step of each loop, one chunk of each in turn, until the ratios have settled.

    Taking turns gives every loop the same share of whatever else the machine does, so that the
    ratio of two loops within a round is trustworthy where absolute times are not. A first round is
    run and dropped; at most one loop's state is alive at a time. Beside the wall time stands the
    processor time of all threads of this process, which does not count waiting for a core.
    """
    wall: dict[str, list[float]] = {name: [] for name in loops}
    cpu: dict[str, list[float]] = {name: [] for name in loops}
    timing = Timing(wall, cpu)
    least, most = ROUNDS
    if jax.process_count() > 1:
        most = least  # all processes have to stop after the same round
    for round_ in range(most + 1):
        for name, loop in loops.items():
            state = loop.start(peaks[name], 0)
            began, used = time.perf_counter(), time.process_time()
            jax.block_until_ready(loop.run_chunk(state, peaks[name], 0))
            seconds = time.perf_counter() - began, time.process_time() - used
            on_chunk(loop.chunk_steps, name)
            if round_ > 0:
                for kept, spent in zip((wall, cpu), seconds, strict=True):
                    kept[name].append(spent / loop.chunk_steps)
        if round_ >= least and settled(timing, baseline):
            break
    return timing


def how(baseline: str) -> str:
    """How steps are timed, in sentences."""
    return (
        f"The compiled loops take turns, for {ROUNDS[0]} to {ROUNDS[1]} rounds, until the standard "
        f"error of every median ratio is below {SETTLED:.0%} of it. The time of a step relative to "
        f"{baseline}'s is the median of the ratios within a round, with their quartiles, and "
        f"seconds are that ratio times {baseline}'s median, without compilation and evaluation. "
        "CPU time is that of all threads of the process. The sentences say which is fastest only "
        f"where its quartiles are within {WIDE:.0%} of the median of each other and below those of "
        "all others."
    )


def settled(timing: Timing, baseline: str) -> bool:
    """Whether more rounds would move no median ratio by more than `SETTLED` of it.

    The standard error of a median of n is about 0.93 / sqrt(n) times the distance of the quartiles,
    where the middle of the distribution is that of a normal one.
    """
    for seconds in timing.wall.values():
        low, ratio, high = ratio_quartiles(seconds, timing.wall[baseline])
        if 0.93 * (high - low) / len(seconds) ** 0.5 > SETTLED * ratio:
            return False
    return True


def seconds_of(program: Callable[[], Any]) -> float:
    """Returns the seconds of one execution, after one that is not timed.

    What ran before may still be freeing its memory, and has left caches and clocks as it needed.
    """
    jax.block_until_ready(program())
    begin = time.perf_counter()
    jax.block_until_ready(program())
    return time.perf_counter() - begin


def times_as_fast(fast: Call, slow: Call, rounds: int) -> float:
    """The time of `slow` divided by that of `fast`, compiled and in turn: the median of the rounds.

    Of processor time, all threads together. A first round is run and dropped.
    """
    pair = [(jax.jit(fn), arguments) for fn, arguments in (fast, slow)]
    used = [[_processor_seconds(*program) for program in pair] for _ in range(rounds + 1)]
    return statistics.median(theirs / ours for ours, theirs in used[1:])


def _processor_seconds(fn: Callable[..., Any], arguments: Sequence[Any]) -> float:
    begin = time.process_time()
    jax.block_until_ready(fn(*arguments))
    return time.process_time() - begin
