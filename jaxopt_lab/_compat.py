"""Where the supported versions of jax differ."""

from __future__ import annotations

from typing import Any


def scan_sizes(params: dict[str, Any]) -> tuple[int, int]:
    """Returns how many operands of a scan are constants and how many are carried."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(list(consts)), len(list(carry))
