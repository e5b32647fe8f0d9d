"""A small page with everything that a page can have, and names that HTML takes amiss."""

from __future__ import annotations

from experiments.harness.report.content import (
    Axis,
    Chart,
    Curve,
    Level,
    Page,
    Section,
    Table,
    Trace,
)

STEPS = (0, 10, 20, 30)


def trace(label: str, speed: float, *losses: float) -> Trace:
    return Trace(label, (STEPS, [step * speed for step in STEPS]), losses)


COURSE = Chart(
    "Validation loss by optimizer",
    "fast ends lowest at 1.25, a</script>&b highest at 2.5.",
    (Axis("steps"), Axis("training time", "s")),
    Axis("validation loss", "nats"),
    (
        Curve(
            "a</script>&b",
            trace("mean of 2 seeds", 0.5, 5, 4, 3, 2.5),
            "2.5000 ± 0.1000",
            (5, 3.9, 2.9, 2.4),
            (5, 4.1, 3.1, 2.6),
            (trace("rate 0.1, seed 0", 0.5, 5, 3.9, 2.9, 2.4),
             trace("rate 0.1, seed 1", 0.5, 5, 4.1, 3.1, 2.6)),
        ),
        Curve("fast", trace("rate 0.3, seed 0", 0.25, 5, 2, 1.5, 1.25), "1.2500"),
    ),
    (Level("target", 2),),
)  # fmt: skip
POINTS = Chart(
    "Loss by memory",
    "Nothing with as little state ends as low as fast.",
    (Axis("state", "bytes"),),
    Axis("loss"),
    [
        Curve(name, Trace("mean", ((place,),), (loss,)), "", (loss - 1,), (loss + 1,), joined=False)
        for name, place, loss in (("slow", 8, 0.5), ("fast", 4, -0.5))
    ],
)
TABLE = Table(
    "Three figures of two optimizers & their calls",
    (Axis("optimizer"), Axis("loss", "nats"), Axis("call")),
    (
        ("a</script>&b", "2.5", "library.a(learning_rate, b1=0.9, b2=0.999, weight_decay=0.1)"),
        ("fast", "1.25", "library.fast(learning_rate)"),
    ),
)
PAGE = Page(
    "Made & up",
    ("fast is faster.", "a</script>&b is not."),
    (
        Section("Results", ("How it was.",), (TABLE,), (COURSE, POINTS)),
        Section("Method", ("As always.",)),
    ),
    {"results.json": "everything"},
    {"settings": {"text": "</script>"}},
)
CHARTS = {"c0": COURSE, "c1": POINTS}
