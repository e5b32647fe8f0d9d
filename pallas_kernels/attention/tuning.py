"""Block sizes that were measured, in `block_sizes.json`, and how a call finds its own.

An entry says: this route, on this kind of chip, for inputs of this dtype, head size and length, was
fastest with this config. A call takes the entry of its route, chip, dtype and causality whose head
size is the smallest one that is not below its own, and of those the one of the nearest length. The
routes' own defaults stand where the table has nothing. It is written by
``python -m experiments.bench_attention --tune`` and overridden by ``attention(config=...)``.
"""

from __future__ import annotations

import functools
import json
import math
import typing
from pathlib import Path
from typing import Any, NamedTuple

from pallas_kernels.attention.problem import Operands

TABLE = Path(__file__).with_name("block_sizes.json")


class Entry(NamedTuple):
    """One measured choice."""

    route: str
    chip: str  # jax's `device_kind`
    dtype: str
    head_dim: int  # the larger of d and dv
    length: int  # the larger of T and S
    causal: bool
    config: dict[str, Any]  # the fields of the route's config


@functools.cache
def load(path: Path = TABLE) -> tuple[Entry, ...]:
    """Reads a table; one that does not exist is empty."""
    if not path.exists():
        return ()
    return tuple(Entry(**entry) for entry in json.loads(path.read_text())["entries"])


def save(entries: typing.Iterable[Entry], note: str, path: Path = TABLE) -> None:
    """Adds `entries` to a table, in place of those for the same case; sorted, one a line."""
    new = {entry[:-1]: entry for entry in (*load(path), *entries)}
    lines = [json.dumps(new[key]._asdict()) for key in sorted(new)]
    text = ",\n  ".join(lines)
    path.write_text(f'{{"note": {json.dumps(note)},\n "entries": [\n  {text}\n ]}}\n')
    load.cache_clear()


def find(
    route: str, chip: str, operands: Operands, entries: typing.Sequence[Entry] | None = None
) -> dict[str, Any] | None:
    """Returns the fields of the config for a call, or None if the table has nothing for it."""
    size = operands.sizes
    head_dim, length = max(size.head_dim, size.value_dim), max(size.queries, size.keys)
    case = (route, chip, str(operands.query.dtype), operands.mask.right == 0)
    fitting = [
        entry
        for entry in (load() if entries is None else entries)
        if (entry.route, entry.chip, entry.dtype, entry.causal) == case
        and entry.head_dim >= head_dim
    ]
    if not fitting:
        return None

    def distance(entry: Entry) -> tuple[int, float]:
        return entry.head_dim, abs(math.log(entry.length / max(length, 1)))

    return min(fitting, key=distance).config


def build(config_type: type, fields: dict[str, Any]) -> Any:
    """Returns a config of nested named tuples from its fields, as JSON keeps them."""
    hints = typing.get_type_hints(config_type)

    def value(name: str, field: Any) -> Any:
        kinds = typing.get_args(hints[name]) or (hints[name],)
        nested = [kind for kind in kinds if hasattr(kind, "_fields")]
        return build(nested[0], field) if nested and isinstance(field, dict) else field

    return config_type(**{name: value(name, field) for name, field in fields.items()})


def fields(config: Any) -> dict[str, Any]:
    """Undoes `build`."""
    return {
        name: fields(value) if hasattr(value, "_fields") else value
        for name, value in config._asdict().items()
    }
