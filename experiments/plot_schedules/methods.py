"""The schedules that are drawn, by panel."""

from __future__ import annotations

from typing import Any

from jaxopt_lab import schedules as s

PHIS = (0.25, 1.0, 2.0, 5.0, 20.0)


def tables(steps: int, norms: Any) -> dict[str, dict[str, Any]]:
    """Panel -> name of a schedule -> its rate at each step; the highest is 1."""
    warmup, decay = steps // 20, steps // 4
    stable = steps - warmup - decay
    trunk = s.wsd_schedule(1.0, warmup)
    shapes = {
        f"WSD, {shape}": s.wsd_schedule(
            1.0, warmup, stable, decay, end_value=0.02, decay_shape=shape
        )
        for shape in ("linear", "cosine", "sqrt", "exponential")
    }
    branches = {
        f"branch at {start}": s.branch_decay(trunk, start, steps // 8)
        for start in (steps // 4, steps // 2, steps - steps // 8)
    }
    thirds = [steps // 2, steps // 4, steps - steps // 2 - steps // 4]
    panels = {
        "Budget-aware (UBA), by phi": {
            f"phi = {phi:g}{', the cosine' if phi == 2 else ''}": s.uba_schedule(
                1.0, 0.01, steps, phi
            )
            for phi in PHIS
        },
        "Warm-up, stable, decay": shapes,
        "Cooling down later": {"stable for ever": trunk, **branches},
        "Without an end, and again and again": {
            "inverse square root": s.inverse_sqrt_schedule(1.0, warmup),
            "re-warmed, 3 phases": s.rewarmed_schedule((1.0, 0.6, 0.6), thirds, warmup),
        },
        "Refined from gradient norms": {
            "linear decay": s.wsd_schedule(1.0, 0, 0, steps, decay_shape="linear"),
            "refined for Adam (l1)": s.refined_schedule(norms, steps, 1.0, "l1"),
            "the same, not smoothed": s.refined_schedule(norms, steps, 1.0, "l1", smoothing=0.0),
        },
    }
    return {
        panel: {name: s.as_table(schedule, steps) for name, schedule in found.items()}
        for panel, found in panels.items()
    }
