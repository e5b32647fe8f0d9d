"""Times what each route of attention offers for its blocks, on the device that is there."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import pallas_kernels
from experiments.bench_attention import methods
from experiments.bench_attention.methods import Shape
from experiments.harness import timing
from pallas_kernels.attention import routes, tuning
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.problem import Operands

HEADER = ["kernel", "default", "ms", "best", "ms", "speed / default", "tried", "failed"]


class Trial(NamedTuple):
    """The times of one kernel's blocks on one shape."""

    route: str
    shape: Shape
    kernel: str
    default: Any  # blocks, as `tuning.Choice`
    seconds: dict[Any, float]  # medians by blocks, the default's among them unless it failed
    errors: dict[Any, str]  # by blocks

    @property
    def best(self) -> Any:
        """The fastest blocks, or None where nothing runs."""
        return min(self.seconds, key=self.seconds.__getitem__, default=None)

    def entry(self, chip: str) -> tuning.Entry:
        """What the file says of the best blocks."""
        return tuning.Entry(
            route=self.route,
            kernel=self.kernel,
            chip=chip,
            dtype=self.shape.dtype,
            head_dim=self.shape.head_dim,
            length=self.shape.length,
            causal=self.shape.causal,
            bias=0,
            config=tuning.fields(self.best),
        )

    def row(self) -> list[str]:
        """A line of the table below `HEADER`."""

        def of(blocks: Any) -> list[str]:
            seconds = self.seconds.get(blocks)
            return [written(blocks), "failed" if seconds is None else f"{1e3 * seconds:.3f}"]

        if self.best is None:
            return [self.kernel, *of(self.default), "none", "", "", *self._counts()]
        ratio = ""
        if self.default in self.seconds:
            ratio = f"{self.seconds[self.default] / self.seconds[self.best]:.2f}"
        return [self.kernel, *of(self.default), *of(self.best), ratio, *self._counts()]

    def _counts(self) -> list[str]:
        return [str(len(self.seconds) + len(self.errors)), str(len(self.errors))]


def written(blocks: Any) -> str:
    """Blocks in few characters: the values of their fields."""
    return " ".join("-" if x is None else str(x) for x in blocks)


def operands(shape: Shape) -> Operands:
    """The shape as a route sees it."""
    query, key, value = cast(Any, shape.structs())
    return Operands(query, key, value, mask=Mask(right=0 if shape.causal else None))


def refusals(shape: Shape) -> dict[str, str | None]:
    """Why each route with blocks cannot serve a shape here, or None."""
    explained = pallas_kernels.explain(*shape.structs(), **shape.arguments())
    return {name: explained.refusals[name] for name in methods.ROUTES}


def tune(route: str, shape: Shape, rounds: int, compiled: Callable[[Any, str], Any]) -> list[Trial]:
    """Times all choices of a route on a shape, one kernel after the other.

    Args:
      route: Its name; it must serve `shape` here.
      shape: The problem.
      rounds: Executions of each program; in a round all candidates take turns.
      compiled: Maps an attention function and ``"forward"`` or ``"gradient"`` to a function without
        arguments that runs it, or to the error that came instead.
    """
    return [
        _try(route, shape, choice, rounds, compiled)
        for choice in routes.load(route).choices(operands(shape))
    ]


def _try(
    route: Any,
    shape: Shape,
    choice: tuning.Choice,
    rounds: int,
    compiled: Callable[[Any, str], Any],
) -> Trial:
    # The default is tried as it comes, without a config.
    configs = {tuning.part(config, choice.kernel): config for config in choice.configs}
    configs[choice.default] = None
    programs: dict[Any, Any] = {}
    errors: dict[Any, str] = {}
    for blocks, config in configs.items():
        fn = functools.partial(
            pallas_kernels.attention, is_causal=shape.causal, implementation=route, config=config
        )
        program = compiled(fn, choice.timed)
        (errors if isinstance(program, str) else programs)[blocks] = program
    seconds = times(list(programs.values()), rounds)
    medians = dict(zip(programs, map(statistics.median, seconds)))
    return Trial(route, shape, choice.kernel, choice.default, medians, errors)


def times(programs: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Returns the seconds of `rounds` executions of each program, which take turns."""
    seconds: list[list[float]] = [[] for _ in programs]
    for _ in range(rounds):
        for program, own in zip(programs, seconds):
            own.append(timing.seconds_of(program))
    return seconds
