"""What a result depends on besides its settings: versions, device, command."""

from __future__ import annotations

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import jax

from experiments.harness import store


def device_kind() -> str:
    """Kind of the default device; for a CPU also its architecture."""
    device = jax.devices()[0]
    return f"cpu ({platform.machine()})" if device.platform == "cpu" else device.device_kind


def without_folders(argument: str) -> str:
    """An argument, or the value of `--option=value`, without the folders of an absolute path."""
    start, value = "", argument
    if argument.startswith("-") and "=" in argument:
        option, _, value = argument.partition("=")
        start = f"{option}="
    return start + (PurePath(value).name if PurePath(value).is_absolute() else value)


def environment(argv: list[str]) -> dict[str, Any]:
    """The record that goes with a table of results, which may be published."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": [without_folders(argument) for argument in argv],
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.machine()}",
        "device": device_kind(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "optax", "flax", "numpy")},
    }


def write_figures(path: Path | None, kind: str, **figures: Any) -> None:
    """Writes what a script has found, and what it depends on; without a path nothing."""
    if path is not None:
        record = {"kind": kind, **figures, "environment": environment(sys.argv[1:])}
        store.write_json(path, record)
