"""What a result depends on besides its settings: versions, device, command."""

from __future__ import annotations

import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import jax


def device_kind() -> str:
    """Kind of the default device; for a CPU also its architecture."""
    device = jax.devices()[0]
    return f"cpu ({platform.machine()})" if device.platform == "cpu" else device.device_kind


def environment(argv: list[str]) -> dict[str, Any]:
    """The record that goes with a table of results."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "argv": argv,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": device_kind(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "optax", "flax", "numpy")},
    }
