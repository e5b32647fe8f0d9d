"""Where the matrices of a kernel are in another library's model: what a name map says.

"model.attn.q_proj"                      a module
"transformer.c_attn[0:768]"              a part of its outputs
"mlp.experts.base_layer:gate_up_proj"    a parameter with one matrix an expert
"""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jaxopt_lab import _checks
from jaxopt_lab.adapters import _targets

Names = Mapping[str, str | Sequence[str]] | Callable[[str], str | Sequence[str] | None]

_PLACE = re.compile(
    r"(?P<module>[^\[\]:]+)(?::(?P<parameter>\w+))?"
    r"(?:\[(?P<start>\d*):(?P<stop>\d*)(?::(?P<step>[1-9]\d*))?\])?"
)


class Place(NamedTuple):
    """A module, a parameter that has no module of its own, or a part of the outputs of one."""

    module: str
    parameter: str | None = None
    start: int = 0
    stop: int | None = None
    step: int = 1

    @property
    def is_part(self) -> bool:
        """Whether these are some of the outputs."""
        return self[2:] != (0, None, 1)

    @property
    def own_name(self) -> str:
        """The name by which patterns call it: without the wrappers around a parameter."""
        if self.parameter is None:
            return self.module
        return f"{self.module.replace('.base_layer', '')}.{self.parameter}"

    def rows(self, count: int, leaf: str) -> range:
        """Returns which outputs a kernel with `count` of them has.

        Raises:
          ValueError: the name says another number.
        """
        found = range(self.start, self.start + count * self.step, self.step)
        if self.stop is not None and len(range(self.start, self.stop, self.step)) != count:
            raise ValueError(
                f"names['{leaf}']: '{self}' are "
                f"{len(range(self.start, self.stop, self.step))} outputs of '{self.module}', but "
                f"the kernel has {count}"
            )
        return found

    def __str__(self) -> str:
        name = self.module if self.parameter is None else f"{self.module}:{self.parameter}"
        stop = "" if self.stop is None else self.stop
        step = "" if self.step == 1 else f":{self.step}"
        return f"{name}[{self.start}:{stop}{step}]" if self.is_part else name


def check(path: Any, names: Any, kernel_axes: Any = None, what: str = "folder") -> None:
    """Refuses what is no path, no name map or no axes of kernels, by the name of the argument.

    Raises:
      TypeError: see above; the message says what was given.
    """
    _checks.check_path(**{what: path})
    if not callable(names):
        _checks.check_mapping("of PyTorch modules by kernel, or a function of it", names=names)
    _targets.check_axes(kernel_axes)


def places(names: Names, leaf: str) -> list[Place]:
    """Returns what a name map says of a leaf; nothing if it does not know it.

    Raises:
      ValueError: text that is no name; the message has the leaf.
      TypeError: neither text nor a list of texts.
    """
    found = names(leaf) if callable(names) else names.get(leaf)
    texts = [] if found is None else [found] if isinstance(found, str) else list(found)
    return [_parsed(text, leaf) for text in texts]


def of_kernel(names: Names, kernel: str, count: int) -> list[Place]:
    """Returns the places of a kernel of `count` matrices.

    Raises:
      ValueError: there are none, or not as many as matrices.
    """
    found = places(names, kernel)
    if not found:
        raise ValueError(f"names has no PyTorch module for kernel '{kernel}'")
    experts = all(place.parameter is not None for place in found)
    if len(found) != count and not (experts and count % len(found) == 0):
        raise ValueError(f"kernel '{kernel}' is {count} matrices, but has {len(found)} names")
    return found


def check_apart(claims: Iterable[tuple[str, Place, range]]) -> None:
    """Refuses that one part of a module belongs to two kernels.

    Args:
      claims: kernel, place and which outputs they are.

    Raises:
      ValueError: two kernels share a name; the message has both.
    """
    by_module: dict[str, list[tuple[str, Place, range]]] = collections.defaultdict(list)
    for kernel, place, rows in claims:
        for other, its_place, its_rows in by_module[place.module]:
            if place.parameter != its_place.parameter:
                raise ValueError(
                    f"kernels '{other}' and '{kernel}' are parameters '{its_place}' and '{place}' "
                    "of one module, which peft nests: name the one that the module declares first "
                    f"'{place.module}.base_layer:...'"
                )
            whole = not (place.is_part and its_place.is_part)
            if whole or set(rows) & set(its_rows):
                raise ValueError(
                    f"the module '{place.module}' is named twice, by kernel '{other}' as "
                    f"'{its_place}' and by kernel '{kernel}' as '{place}'; each kernel needs a "
                    "name, or a part of its outputs, of its own"
                )
        by_module[place.module].append((kernel, place, rows))


def _parsed(text: str, leaf: str) -> Place:
    if not isinstance(text, str):
        raise TypeError(f"names['{leaf}'] must be text or a list of texts, got {text!r}")
    match = _PLACE.fullmatch(text)
    if match is None:
        raise ValueError(
            f"names['{leaf}'] is {text!r}; expected 'module', 'module[start:stop]' for a part of "
            "its outputs, or 'module:parameter' for a stack of experts"
        )
    start, stop, step = match["start"], match["stop"], match["step"]
    return Place(
        match["module"],
        match["parameter"],
        int(start or 0),
        int(stop) if stop else None,
        int(step or 1),
    )
