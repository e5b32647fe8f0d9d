"""What the compilers of absent chips say of the attention kernels: measured, written, compared.

`python -m tests.pallas_kernels.attention.resource_table [word ...]` compiles every combination of
route, chip, features and head size whose name contains the words, and writes what it finds into
experiments/results/attention_resources.json, with a table beside it. Needs the extra `aot`, and
`ptxas` on the path for the registers of Triton's kernels.
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import core, routes
from pallas_kernels.attention.mask import Mask
from pallas_kernels.attention.problem import Operands, Settings
from pallas_kernels.targets import (
    compile_in_child,
    compile_with_resources,
    compile_with_schedule,
)

RESULTS = Path(__file__).parents[3] / "experiments" / "results"
FILE, TABLE = RESULTS / "attention_resources.json", RESULTS / "attention_resources.md"

CHIPS = {
    "mosaic_gpu": ("h200",),
    "triton": ("a100", "l4", "h200", "b200"),
    "mosaic_tpu": ("v4", "v5e", "v5p", "v6e", "7x"),
}
ARCHITECTURES = {"a100": "sm_80", "l4": "sm_89", "h200": "sm_90a", "b200": "sm_100a"}
HEAD_DIMS = (64, 128, 256)
FEATURES = ("causal", "full", "window_cap", "segments", "bias")
BATCH, LENGTH, HEADS, KV_HEADS = 2, 2048, 8, 4


def program(route_name: str, features: str, head_dim: int) -> Any:
    """Returns a program of values and gradients in bfloat16, as `compile_in_child` expects it."""
    struct = jax.ShapeDtypeStruct
    query = struct((BATCH, LENGTH, HEADS, head_dim), jnp.bfloat16)
    key = struct((BATCH, LENGTH, KV_HEADS, head_dim), jnp.bfloat16)
    arrays = {}
    if features == "bias":
        arrays["bias"] = struct((1, HEADS, LENGTH, LENGTH), jnp.bfloat16)
    if features == "segments":
        arrays["ids"] = struct((BATCH, LENGTH), jnp.int32)
    right = None if features in ("full", "bias") else 0
    left = 500 if features == "window_cap" else None
    settings = Settings(head_dim**-0.5, soft_cap=30.0 if features == "window_cap" else None)
    route = routes.load(route_name)

    def fn(query: Any, key: Any, value: Any, cotangent: Any, arrays: Any) -> Any:
        ids = arrays.get("ids")
        mask = Mask(left, right, query_segment_ids=ids, key_value_segment_ids=ids)

        def attend(query: Any, key: Any, value: Any, bias: Any) -> Any:
            operands = Operands(query, key, value, bias, mask=mask)
            return core.attend(route, settings, operands)[0]

        output, vjp = jax.vjp(attend, query, key, value, arrays.get("bias"))
        return output, vjp(cotangent)

    return fn, (query, key, key, query, arrays), ()


for _names in itertools.product(CHIPS, FEATURES, HEAD_DIMS):
    globals()["_".join(map(str, _names))] = functools.partial(program, *_names)


def combinations() -> list[tuple[str, str, str, int]]:
    """All routes on their chips, with each of the features and head sizes."""
    return [
        (route, chip, features, head_dim)
        for route, chips in CHIPS.items()
        for chip in chips
        for features, head_dim in itertools.product(FEATURES, HEAD_DIMS)
    ]


def measure(route: str, chip: str, features: str, head_dim: int) -> dict[str, Any]:
    """Compiles one combination; returns a row of the file."""
    function = f"{__name__}:{route}_{features}_{head_dim}"
    if function.startswith("__main__"):
        function = function.replace("__main__", "tests.pallas_kernels.attention.resource_table")
    if route == "mosaic_gpu":
        report = compile_with_resources(function, chip)
        kernels = {k["name"]: _of_gpu(k) for k in report["resources"]}
    elif route == "triton":
        with tempfile.TemporaryDirectory() as folder:
            flags = {"XLA_FLAGS": f"--xla_dump_to={folder}"}
            report = compile_in_child(function, chip, environment=flags)
            kernels = triton_kernels(Path(folder), ARCHITECTURES[chip])
    else:
        report = compile_with_schedule(function, chip, timeout=1200)
        scoped = report["scoped_memory"]
        kernels = {
            k["name"].split(".")[0]: {
                "bundles": k["bundles"],
                "mxu_share": round(k["used"]["MXU"] / (k["bundles"] * k["capacity"]["MXU"]), 3),
                "spills": k["spills"],
                "scoped_memory": scoped[k["name"]],
            }
            for k in report["schedule"]
            if k["name"].startswith("attention_")
        }
    memory = report["memory"]
    return {
        "route": route,
        "chip": chip,
        "features": features,
        "head_dim": head_dim,
        "inputs_and_outputs": memory["argument"] + memory["output"],
        "temporaries": memory["temp"],
        "kernels": dict(sorted(kernels.items())),
    }


def _of_gpu(kernel: dict[str, Any]) -> dict[str, int]:
    return {
        "registers": kernel["registers"],
        "spills": kernel["spill_stores"] + kernel["spill_loads"],
        "shared_memory": kernel["shared_memory"],
        "barriers": kernel["barriers"],
    }


def triton_kernels(folder: Path, architecture: str) -> dict[str, dict[str, int]]:
    """Returns the resources of Triton's kernels, from XLA's dump of a program and from ptxas."""
    kernels = {}
    for path in folder.glob("*.ptx"):
        name = re.search(r"\.entry (attention\w+)\(", path.read_text())
        if name is None:
            continue
        command = ["ptxas", f"-arch={architecture}", "-v", str(path), "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        number = lambda pattern, text=text: int((re.search(pattern, text) or [0, 0])[1])  # noqa: E731
        kernels[name[1]] = {
            "registers": number(r"Used (\d+) registers"),
            "spills": sum(int(x) for x in re.findall(r"(\d+) bytes spill", text)),
            "shared_memory": number(r"(\d+) bytes smem"),
            "barriers": number(r"used (\d+) barriers"),
        }
    for path in folder.glob("*.thunk_sequence.txt"):
        dynamic = re.findall(r"(attention\w+) grid: .*shared_memory: (\d+) bytes", path.read_text())
        for name, size in dynamic:
            if name in kernels:
                kernels[name]["shared_memory"] += int(size)
    return kernels


def versions() -> dict[str, str]:
    """What the figures depend on."""
    ptxas = subprocess.run(["ptxas", "--version"], capture_output=True, text=True, check=True)
    release = re.search(r"release [\d.]+, V([\d.]+)", ptxas.stdout)
    names = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")
    found = {name: metadata.version(name) for name in names}
    return found | {"ptxas": release[1] if release else "unknown"}


GPU_HEADER = ("registers", "spilled bytes", "shared memory", "barriers")
TPU_HEADER = ("bundles", "MXU share", "spills", "vector memory used")


def markdown(record: dict[str, Any]) -> str:
    """The file as two tables, a line a kernel."""
    said = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines = [
        "# Attention kernels as their compilers see them",
        "",
        f"Values and gradients in bfloat16, batch {BATCH}, length {LENGTH}, {HEADS} heads of which "
        f"{KV_HEADS} key/value heads, default blocks. Bytes; temporaries are those of the whole "
        "program, as a part of its inputs and outputs. On TPUs a loop body counts once.",
        "",
        f"Written by `python -m tests.pallas_kernels.attention.resource_table` with {said}.",
    ]
    for title, header, chosen in (
        ("GPUs", GPU_HEADER, ("mosaic_gpu", "triton")),
        ("TPUs", TPU_HEADER, ("mosaic_tpu",)),
    ):
        columns = ("route", "chip", "features", "head size", "kernel", *header, "temporaries")
        lines += ["", f"## {title}", "", f"| {' | '.join(columns)} |"]
        lines += ["| --- " * 5 + "| --: " * (len(header) + 1) + "|"]
        for row in record["rows"]:
            if row["route"] not in chosen:
                continue
            share = f"{row['temporaries'] / row['inputs_and_outputs']:.2f}"
            for name, kernel in row["kernels"].items():
                cells = (
                    row["route"], row["chip"], row["features"], row["head_dim"],
                    name.removeprefix("attention_"), *kernel.values(), share,
                )  # fmt: skip
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def write(rows: list[dict[str, Any]]) -> None:
    """Adds rows to the file, in place of those for the same combinations, and writes the table."""
    old = json.loads(FILE.read_text())["rows"] if FILE.exists() else []
    by_key = {_key(row): row for row in (*old, *rows)}
    order = [key for key in combinations() if key in by_key]
    record = {"versions": versions(), "rows": [by_key[key] for key in order]}
    text = ",\n  ".join(json.dumps(row) for row in record["rows"])
    head = json.dumps(record["versions"])
    FILE.write_text(f'{{"versions": {head},\n "rows": [\n  {text}\n ]}}\n')
    TABLE.write_text(markdown(record))


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["route"], row["chip"], row["features"], row["head_dim"]


def main(words: list[str]) -> int:
    if shutil.which("ptxas") is None:
        print("no ptxas on the path", file=sys.stderr)
        return 2
    chosen = [c for c in combinations() if all(word in " ".join(map(str, c)) for word in words)]
    rows = []
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for row in pool.map(lambda c: measure(*c), chosen):
            rows.append(row)
            print(json.dumps(row), flush=True)
    write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
