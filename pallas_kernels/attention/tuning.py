"""Block sizes of every route, in `block_sizes.json`, and how a call finds its own.

An entry of the file says: this kernel of this route, on this chip, for inputs of this dtype, head
size, length, causality and bias, runs with this config. A call takes, for each kernel, the best of
the entries that serve it (`rank`). An entry serves a call if

* its chip is the call's own (jax's `device_kind`), the family of it (``"sm_90"``, ``"v5e"``) or
  ``"any"``; its dtype the call's own, ``"16-bit"`` or ``"32-bit"``, or ``"any"``;
* its head size is not below the call's; its causality and bias are the call's. None is any.

Of those the smallest head size wins, then the narrowest chip, dtype, bias and causality, then the
nearest length. Fields of the caller's ``attention(config=...)`` that are not None come before the
file. ``python -m experiments.bench_attention --tune --write`` adds entries for the chip it runs on.
"""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp

from pallas_kernels._compat import Device
from pallas_kernels.attention.problem import Operands

TABLE = Path(__file__).with_name("block_sizes.json")
ROUTES = (
    "chunked", "mosaic_gpu", "mosaic_tpu", "triton",
    "decode_chunked", "decode_mosaic_tpu", "decode_triton",
)  # fmt: skip
ALL = "all"
"""The kernel of a route whose config is one for all its kernels."""


class Entry(NamedTuple):
    """One line of the file."""

    route: str
    kernel: str  # a field of the route's config, or `ALL`
    chip: str
    dtype: str
    head_dim: int | None  # the larger of d and dv
    length: int | None  # the larger of T and S
    causal: bool | None
    bias: int | None  # bits read for each entry of the scores, 0 without a bias of rows and keys
    config: dict[str, Any]


class Lookup(NamedTuple):
    """What decides which entries serve a call."""

    chips: tuple[str, ...]  # its own name, then its families
    dtype: str
    head_dim: int
    length: int
    causal: bool
    bias: int


class Choice(NamedTuple):
    """What may be tried for one kernel of a route: see `Route.choices`."""

    kernel: str
    timed: str  # the program that shows the difference, "forward" or "gradient"
    default: Any  # what the file has for the kernel: see `part`
    configs: tuple[Any, ...]  # of the route, all fields None but the kernel's own


# Chips of NVIDIA with about the same shared memory and matrix unit, by compute capability.
_FAMILIES = {(8, 0): "sm_80", (8, 7): "sm_80", 9: "sm_90", 10: "sm_100", 11: "sm_100"}


def lookup_of(operands: Operands, device: Device, family: str | None = None) -> Lookup:
    """Describes a call.

    Args:
      operands: The call's operands.
      device: Where it runs.
      family: The chip's family, where a route knows more than the device's compute capability says.
    """
    size, bias = operands.sizes, operands.bias
    capability = device.compute_capability
    if family is None and capability is not None:
        family = _FAMILIES.get(capability) or _FAMILIES.get(capability[0])
    bits = 0
    if bias is not None and bias.shape[2] != 1 and bias.shape[3] != 1:
        bits = 8 * bias.dtype.itemsize
    return Lookup(
        chips=(device.kind,) if family is None else (device.kind, family),
        dtype=str(operands.query.dtype),
        head_dim=max(size.head_dim, size.value_dim),
        length=longest(size.queries, size.keys),
        causal=operands.mask.right == 0,
        bias=bits,
    )


def longest(*lengths: Any) -> int:
    """Returns the largest length; of symbolic ones, in a program to be exported, a usual one."""
    return max(lengths) if all(isinstance(x, int) for x in lengths) else 4096


def rank(entry: Entry, call: Lookup) -> tuple[Any, ...] | None:
    """Returns how well an entry serves a call, the smaller the better, or None if it does not."""
    dtypes = (call.dtype, f"{8 * jnp.dtype(call.dtype).itemsize}-bit", "any")
    chips = (*call.chips, "any")
    if entry.chip not in chips or entry.dtype not in dtypes:
        return None
    if entry.causal not in (None, call.causal) or entry.bias not in (None, call.bias):
        return None
    if entry.head_dim is not None and entry.head_dim < call.head_dim:
        return None
    far = math.inf
    return (
        far if entry.head_dim is None else entry.head_dim,
        chips.index(entry.chip),
        dtypes.index(entry.dtype),
        entry.bias is None,
        entry.causal is None,
        far if entry.length is None else abs(math.log(entry.length / max(call.length, 1))),
    )


def find(route: str, config_type: type, kernel: str, call: Lookup, path: Path | None = None) -> Any:
    """Returns the config of one kernel for a call, from a file that has an entry for every call.

    Raises:
      LookupError: no entry serves the call.
      ValueError: an entry of the route is not one of its configs; the message names it.
    """
    path = TABLE if path is None else path
    ranked = []
    for entry, config in _built(path, route, config_type):
        how_well = rank(entry, call) if entry.kernel == kernel else None
        if how_well is not None:
            ranked.append((how_well, config))
    if not ranked:
        raise LookupError(f"{path.name} has no entry for {kernel} of {route} that serves {call}")
    return min(ranked, key=lambda pair: pair[0])[1]


def blocks_of(route: str, config_type: type, kernel: str, config: Any, call: Lookup) -> Any:
    """Returns the blocks of one kernel: those of the caller's `config`, else the file's."""
    given = None if config is None else getattr(config, kernel)
    return find(route, config_type, kernel, call) if given is None else given


def default(route: str, config_type: Any, call: Lookup) -> Any:
    """Returns the whole config that a call gets from the file."""
    kernels = _kernels(config_type)
    if kernels == (ALL,):
        return find(route, config_type, ALL, call)
    return config_type(**{k: find(route, config_type, k, call) for k in kernels})


def part(config: Any, kernel: str) -> Any:
    """Returns what an entry for `kernel` holds of a route's config."""
    return config if kernel == ALL else getattr(config, kernel)


@functools.cache
def load(path: Path = TABLE) -> tuple[Entry, ...]:
    """Reads a file; one that does not exist is empty.

    Raises:
      ValueError: an entry has not the form of `Entry`; the message names it.
    """
    if not path.exists():
        return ()
    return tuple(_entry(path, row) for row in json.loads(path.read_text())["entries"])


def save(entries: Iterable[Entry], note: str, path: Path = TABLE) -> None:
    """Adds `entries` to a file, in place of those for the same case; sorted, one a line.

    Args:
      entries: The entries.
      note: Where they come from, added to the file's note.
      path: The file, which need not exist.
    """
    said = json.loads(path.read_text())["note"] if path.exists() else ""
    note = "; ".join(filter(None, (said, note)))
    new = {entry[:-1]: entry for entry in (*load(path), *entries)}
    rows = [entry._asdict() for entry in sorted(new.values(), key=_order)]
    cells = [[f'"{name}": {json.dumps(value)}' for name, value in row.items()] for row in rows]
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    lines = [
        "{" + "".join(f"{cell}, ".ljust(width) for cell, width in zip(row, widths[:-1])) + row[-1]
        for row in cells
    ]
    text = "},\n  ".join(lines)
    path.write_text(f'{{"note": {json.dumps(note)},\n "entries": [\n  {text}}}\n ]}}\n')
    load.cache_clear()
    _built.cache_clear()


def _order(entry: Entry) -> tuple[Any, ...]:
    """Numbers by size, and what is for any case last."""
    return tuple(
        (x is None or x == "any", x if isinstance(x, str) else "", x if isinstance(x, int) else 0)
        for x in entry[:-1]
    )


def fields(config: Any) -> dict[str, Any]:
    """Returns a config of plain values as JSON keeps it, without what is at its default."""
    return {
        name: value
        for name, value in config._asdict().items()
        if name not in config._field_defaults or value != config._field_defaults[name]
    }


def _entry(path: Path, row: Any) -> Entry:
    names = set(row) if isinstance(row, dict) else set()
    if names != set(Entry._fields):
        raise _refused(path, row, f"expected the fields {', '.join(Entry._fields)}")
    for name, hint in typing.get_type_hints(Entry).items():
        kind = dict if name == "config" else hint
        if not _is(row[name], kind):
            raise _refused(path, row, f"{name} is {row[name]!r}; expected {hint}")
    if row["route"] not in ROUTES:
        raise _refused(path, row, f"expected a route of {', '.join(ROUTES)}")
    return Entry(**row)


@functools.cache
def _built(path: Path, route: str, config_type: type) -> tuple[tuple[Entry, Any], ...]:
    """Returns the entries of a route with their configs."""
    return tuple(
        (entry, _config(path, entry, config_type)) for entry in load(path) if entry.route == route
    )


def _config(path: Path, entry: Entry, config_type: Any) -> Any:
    kernels = _kernels(config_type)
    if entry.kernel not in kernels:
        raise _refused(path, entry._asdict(), f"expected a kernel of {', '.join(kernels)}")
    kind = config_type if entry.kernel == ALL else _blocks_type(config_type, entry.kernel)
    hints = typing.get_type_hints(kind)
    for name, value in entry.config.items():
        if name not in hints:
            raise _refused(path, entry._asdict(), f"config has {name!r}; expected {kind._fields}")
        if not _is(value, hints[name]):
            expected = f"config has {name}={value!r}; expected {hints[name]}"
            raise _refused(path, entry._asdict(), expected)
    missing = set(kind._fields) - set(kind._field_defaults) - set(entry.config)
    if missing:
        raise _refused(path, entry._asdict(), f"config lacks {', '.join(sorted(missing))}")
    config = kind(**entry.config)
    if not getattr(config, "is_possible", True):
        raise _refused(path, entry._asdict(), f"no kernel has {config}")
    return config


def _kernels(config_type: Any) -> tuple[str, ...]:
    """Returns the kernels that a config speaks of."""
    nested = [name for name in config_type._fields if _blocks_type(config_type, name) is not None]
    return tuple(nested) or (ALL,)


def _blocks_type(config_type: Any, kernel: str) -> Any:
    hint = typing.get_type_hints(config_type)[kernel]
    kinds = typing.get_args(hint) or (hint,)
    return next((kind for kind in kinds if hasattr(kind, "_fields")), None)


def _is(value: Any, hint: Any) -> bool:
    """Whether a value of JSON has a type such as ``int | None``; no bool is a number here."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return type(value) in kinds


def _refused(path: Path, row: Any, reason: str) -> ValueError:
    return ValueError(f"{path.name}: {json.dumps(row)}: {reason}")


def largest(sizes: Sequence[int], length: int) -> list[int]:
    """Returns the block sizes of a list that a length can use: of those above it only the first."""
    fitting = [size for size in sizes if size < length]
    return [*fitting, *sizes[len(fitting) : len(fitting) + 1]]
