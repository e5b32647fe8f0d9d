"""Which optimizer keeps which promise?

Runs `jaxopt_lab.testing.check_transform` over every optimizer of optax and optax.contrib, or over
every ready-made one of jaxopt_lab, each in a process of its own with four pretended CPU devices,
and writes a table as Markdown and as JSON. An interrupted run continues where it was.

    python -m experiments.contract_table --package optax --workers 2
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import datetime
import importlib
import importlib.metadata
import inspect
import json
import os
import platform
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

from experiments.harness import UserError
from experiments.harness.store import read_json, write_atomically, write_json

_ROOT = Path(__file__).parents[1]
_RESULTS = Path(__file__).parent / "results"
_KIND = "contract table"

# Left out are rules that need more than a gradient (a loss value, a Hessian, a second model).
_AT_RATE: dict[float, tuple[str, ...]] = {
    1e-3: (
        *("lion", "sign_sgd", "signum"),
        *("contrib.acprop", "contrib.ademamix", "contrib.simplified_ademamix"),
    ),
    1e-2: (
        *("adabelief", "adafactor", "adam", "adamax", "adamaxw", "adamw", "adan", "amsgrad"),
        *("fromage", "lamb", "nadam", "nadamw", "novograd", "optimistic_adam_v2"),
        *("optimistic_gradient_descent", "radam", "rmsprop", "rprop", "yogi"),
        *("contrib.adopt", "contrib.madgrad", "contrib.muon"),
        *("contrib.schedule_free_adamw", "contrib.schedule_free_sgd"),
    ),
    1e-1: ("adadelta", "adagrad", "lars", "sm3", "contrib.dadapt_adamw", "contrib.prodigy"),
    1.0: ("contrib.dog", "contrib.dowg"),
}
_OPTAX: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    **{name: ((rate,), {}) for rate, names in _AT_RATE.items() for name in names},
    "sgd": ((1e-2, 0.9), {}),
    "noisy_sgd": ((1e-2,), {"key": 0}),
    "lbfgs": ((1e-2,), {"linesearch": None}),
    "contrib.cocob": ((), {}),
    "contrib.galore": ((1e-2,), {"rank": 2}),
}


def constructors(package: str) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The names of a package's ready-made optimizers, each with the arguments it is made with."""
    if package == "optax":
        return dict(sorted(_OPTAX.items()))
    module = importlib.import_module(package)
    found = {}
    for name in getattr(module, "__all__", dir(module)):
        value = getattr(module, name)
        if name.startswith("_") or not inspect.isfunction(value):
            continue
        if "learning_rate" in inspect.signature(value).parameters:
            found[name] = ((), {"learning_rate": 1e-2})
    return found


def check_one(package: str, name: str) -> dict[str, Any]:
    """Runs the contract on one optimizer, in this process."""
    from jaxopt_lab.testing import check_transform

    constructor: Any = importlib.import_module(package)
    for part in name.split("."):
        constructor = getattr(constructor, part)
    args, kwargs = constructors(package)[name]
    start = time.perf_counter()
    report = check_transform(constructor, *args, raise_on_failure=False, **kwargs)
    return {
        "subject": report.subject,
        "seconds": round(time.perf_counter() - start, 1),
        "results": {
            result.name: {"status": result.status, "detail": _without_folders(result.detail)}
            for result in report.results
        },
    }


def _without_folders(text: str) -> str:
    """A message without the place where this machine keeps its packages."""
    for folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(_ROOT)):
        text = text.replace(f"{folder}/", "")
    return text


def _in_process(package: str, name: str) -> dict[str, Any]:
    flags = os.environ.get("XLA_FLAGS", "")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4".strip(),
    }
    command = [sys.executable, "-m", "experiments.contract_table", "--package", package]
    done = subprocess.run(
        [*command, "--one", name], env=environment, cwd=_ROOT, capture_output=True, text=True
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"exit code {done.returncode}: {last}")
    return json.loads(done.stdout.splitlines()[-1])


def _versions() -> dict[str, str]:
    packages = ("jax", "jaxlib", "optax", "numpy")
    return {
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }


def _load_or_start(path: Path, package: str) -> dict[str, Any]:
    from jaxopt_lab.testing import contract_checks

    fresh = {
        "kind": _KIND,
        "package": package,
        "versions": _versions(),
        "date": datetime.date.today().isoformat(),
        "checks": [
            {
                "name": check.name,
                "group": check.group,
                "promise": check.promise,
                "level": check.level,
            }
            for check in contract_checks()
        ],
        "optimizers": {},
    }
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error
        write_json(path, fresh)
        return fresh
    found = read_json(path, _KIND)
    for key in ("package", "versions", "checks"):
        if found.get(key) != fresh[key]:
            raise UserError(f"{path} was made with other {key}; remove it or give another --out")
    return found


def markdown(table: dict[str, Any]) -> str:
    """The table for readers: per check who breaks it, and per optimizer how many it keeps."""
    optimizers = table["optimizers"]
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    lines = [
        f"# Who keeps which promise: {len(optimizers)} optimizers of {table['package']}",
        "",
        f"Written on {table['date']} by `python -m experiments.contract_table --package "
        f"{table['package']}` with {versions}, on CPU with four pretended devices.",
        "",
        "A check that does not apply (no state, no learning rate) counts as neither kept nor "
        "broken. The level is `must` for what optax keeps by and large and wrappers rely on, "
        "`library` for the further promises of jaxopt_lab. The messages are in the JSON file "
        "beside this one.",
    ]
    group = None
    for check in table["checks"]:
        if check["group"] != group:
            group = check["group"]
            lines += ["", f"## {group.capitalize()}", ""]
            lines += [
                "| check | promise | level | kept | broken | broken by |",
                "| --- | --- | --- | --: | --: | --- |",
            ]
        by = collections.defaultdict(list)
        for name, entry in optimizers.items():
            by[entry["results"][check["name"]]["status"]].append(name.removeprefix("contrib."))
        failed = by["failed"]
        who = "all" if failed and not by["passed"] else ", ".join(failed)
        promise = check["promise"].replace("|", "\\|")
        lines.append(
            f"| `{check['name']}` | {promise} | {check['level']} | {len(by['passed'])} "
            f"| {len(failed)} | {who} |"
        )
    lines += ["", "## Per optimizer", ""]
    lines += [
        "| optimizer | kept | broken | of these must | not run | seconds |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    must = {check["name"] for check in table["checks"] if check["level"] == "must"}
    for name, entry in optimizers.items():
        count = collections.Counter(result["status"] for result in entry["results"].values())
        failed = {key for key, result in entry["results"].items() if result["status"] == "failed"}
        lines.append(
            f"| `{name}` | {count['passed']} | {len(failed)} | {len(failed & must)} "
            f"| {count['not run']} | {entry['seconds']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _save(table: dict[str, Any], path: Path) -> None:
    table["optimizers"] = dict(sorted(table["optimizers"].items()))
    write_json(path, table)
    write_atomically(path.with_suffix(".md"), markdown(table))


def run(package: str, names: list[str], path: Path, workers: int) -> int:
    """Checks the optimizers that `path` lacks, saving after each; returns an exit code."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    table = _load_or_start(path, package)
    missing = [name for name in names if name not in table["optimizers"]]
    console, errors = Console(), 0
    console.print(f"{len(names) - len(missing)} of {len(names)} are in {path} already")
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        Progress(*columns, console=console) as progress,
        concurrent.futures.ThreadPoolExecutor(workers) as pool,
    ):
        task = progress.add_task("contract", total=len(missing))
        futures = {pool.submit(_in_process, package, name): name for name in missing}
        try:
            for future in concurrent.futures.as_completed(futures):
                name = futures[future]
                try:
                    entry = table["optimizers"][name] = future.result()
                except RuntimeError as error:
                    errors += 1
                    console.print(f"[red]{name}: {error}")
                else:
                    statuses = collections.Counter(
                        result["status"] for result in entry["results"].values()
                    )
                    counts = ", ".join(f"{number} {status}" for status, number in statuses.items())
                    console.print(f"{name}: {counts} ({entry['seconds']:.0f} s)")
                    _save(table, path)
                progress.advance(task)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            console.print(f"interrupted; what is finished is in {path}")
            return 130
    _save(table, path)
    console.print(f"wrote {path} and {path.with_suffix('.md')}")
    return 1 if errors else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--package", choices=("optax", "jaxopt_lab"), default="optax")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="default: all")
    parser.add_argument("--out", type=Path, help="JSON file; the table goes beside it")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        print(json.dumps(check_one(options.package, options.one)))
        return 0
    known = constructors(options.package)
    names = options.optimizers or list(known)
    unknown = [name for name in names if name not in known]
    path = options.out or _RESULTS / f"contract_{options.package}.json"
    try:
        if unknown:
            raise UserError(f"--optimizers: unknown {unknown}; known are {', '.join(known)}")
        if options.workers < 1:
            raise UserError(f"--workers must be at least 1, got {options.workers}")
        return run(options.package, names, path.with_suffix(".json"), options.workers)
    except UserError as error:
        print(f"contract_table: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
