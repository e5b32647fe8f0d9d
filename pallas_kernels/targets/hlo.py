"""Read the text of an optimised HLO module, as `jax.stages.Compiled.as_text` prints it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"(\w+)\[([^\]]*)\](?:\{([^}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_INDEX = re.compile(r"\bindex=(\d+)")
_SCOPED_MEMORY = re.compile(
    r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"'
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Array(NamedTuple):
    """One array of a shape."""

    bytes: int  # of the logical elements; padding of tiles is not counted
    memory_space: int  # 0: the device's main memory


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]  # names; a parameter's number; a constant's value
    attributes: str
    is_root: bool

    def called(self, attribute: str) -> tuple[str, ...]:
        """Returns the computations that an attribute such as ``calls`` or ``body`` names."""
        plain = _QUOTED.sub("", self.attributes)
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", plain)
        return tuple(re.findall(r"[\w.\-]+", found[1])) if found else ()

    @property
    def known_trip_count(self) -> int | None:
        """How often a ``while`` runs, where the compiler notes it."""
        found = _TRIP_COUNT.search(self.attributes)
        return int(found[1]) if found else None

    @property
    def tuple_index(self) -> int | None:
        """The position that a ``get-tuple-element`` takes."""
        found = _INDEX.search(self.attributes) if self.opcode == "get-tuple-element" else None
        return int(found[1]) if found else None

    @property
    def custom_call_target(self) -> str:
        """The target of a custom call, or an empty string."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """The computations of a module, by name, each in its order of execution."""

    computations: dict[str, Computation]
    entry: str
    is_tpu: bool


def parse(text: str) -> Module:
    """Parses the text of an HLO module.

    Raises:
      ValueError: There is no entry computation in `text`.
    """
    computations: dict[str, Computation] = {}
    entry = None
    current: Computation = {}
    for line in text.splitlines():
        line = _COMMENT.sub("", line)
        if instruction := _parse_instruction(line):
            current[instruction.name] = instruction
        elif not line.startswith("HloModule") and (header := _COMPUTATION.match(line)):
            current = computations[header[2]] = {}
            if header[1]:
                entry = header[2]
    if entry is None:
        raise ValueError("text has no ENTRY computation; expected the text of an HLO module")
    # Only TPU layouts are tiled, and all of theirs are.
    return Module(computations, entry, is_tpu=":T(" in text)


def root(computation: Computation) -> Instruction:
    """Returns the instruction whose value the computation returns."""
    return next(instruction for instruction in computation.values() if instruction.is_root)


def arrays(shape: str) -> Iterator[Array]:
    """Yields the arrays of a shape, which may be a tuple."""
    for dtype, dimensions, layout in _ARRAY.findall(shape):
        size = math.prod(int(d.strip().lstrip("<=")) for d in dimensions.split(",") if d)
        packed = re.search(r"E\((\d+)\)", layout)
        space = re.search(r"S\((\d+)\)", layout)
        bits = int(packed[1]) if packed else _bits(dtype)
        yield Array(-(-size * bits // 8), int(space[1]) if space else 0)


def elements(shape: str) -> list[str]:
    """Returns the shapes in a tuple, or the shape itself."""
    return _split(shape[1:-1]) if shape.startswith("(") else [shape]


def _bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    digits = re.search(r"\d+", dtype)
    return max(8, int(digits[0])) if digits else 8  # unpacked 4-bit types and pred take a byte


def _parse_instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    if opcode == "constant":
        operands = (rest[:end],)
    else:
        operands = tuple(operand.split()[-1].lstrip("%") for operand in _split(rest[:end]))
    return Instruction(head[2], shape, opcode, operands, rest[end + 1 :], bool(head[1]))


def _closing(text: str) -> int:
    """Returns where the parenthesis closes that opens `text`."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]!r}")


def _split(text: str) -> list[str]:
    """Splits at the commas that are inside no brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [part for part in (*parts, text[start:].strip()) if part]


def scoped_memory(text: str) -> dict[str, int]:
    """Returns the bytes of vector memory that each Pallas kernel of a TPU's program uses."""
    found = {}
    for line in text.splitlines():
        name = _INSTRUCTION.match(line)
        used = _SCOPED_MEMORY.search(line) if "tpu_custom_call" in line else None
        if name and used:
            found[name[2]] = int(used[1])
    return found
