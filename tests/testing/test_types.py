"""Type checkers on a user's script: clean where it is right, and they say where it is wrong."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import jaxopt_lab
from jaxopt_lab import testing
from tests.testing import user_script

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = pathlib.Path(user_script.__file__)

# Each line is wrong in one word.
WRONG = """
jaxopt_lab.adamP(1e-3)
jaxopt_lab.lion()
jaxopt_lab.muon(0.02, nestrov=True)
testing.check_transform(optax.sgd, 0.1, level="strict")
pallas_kernels.attention(x, x, x, implementation="moasic")
pallas_kernels.attention(x, x, x, implementation=["chunked", "cudn"])
jaxopt_lab.quantization.int8(code="dynamci")
jaxopt_lab.frugal_adamw(1e-3, on_refresh="projcet")
jaxopt_lab.galore_adamw(1e-3, on_refresh="kep")
jaxopt_lab.badam(1e-3, order="upwards")
jaxopt_lab.subspace.svd(method="gramm")
jaxopt_lab.lora_ga({}, direction="AB2r")
jaxopt_lab.pissa("exact")
jaxopt_lab.ties_merge({}, [], elect="most")
jaxopt_lab.sync_gradients("r", op="average")
jaxopt_lab.gossip(optax.sgd(0.1), axis_name="r", graph="rings")
jaxopt_lab.wsd_schedule(1e-3, 10, decay_shape="cosin")
jaxopt_lab.record_norms("l3", length=4)
""".strip().splitlines()


def _require(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed here; the extra `dev` has it")


def _mypy(path: pathlib.Path, cache: pathlib.Path) -> set[tuple[int, str]]:
    _require("mypy")
    # Of the libraries only their annotations matter, as if they were installed; optax has none.
    options = ["--follow-imports=silent", "--disable-error-code=import-untyped", "--config-file="]
    options += ["--no-implicit-reexport", "--check-untyped-defs", f"--cache-dir={cache}"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(path)],
        cwd=ROOT,
        env={**os.environ, "MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"^[^\n:]*:(\d+): error: (.*)$", done.stdout, re.MULTILINE)
    return {(int(line), message) for line, message in found}


def _pyright(path: pathlib.Path, cache: pathlib.Path) -> set[tuple[int, str]]:
    del cache
    _require("pyright")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pyright",
            "--outputjson",
            "--pythonpath",
            sys.executable,
            str(path),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["summary"]["filesAnalyzed"] == 1
    return {
        (each["range"]["start"]["line"] + 1, each["message"])
        for each in report["generalDiagnostics"]
        if each["severity"] == "error"
    }


CHECKERS = pytest.mark.parametrize("checker", [_mypy, _pyright])


def _used(path: pathlib.Path) -> set[str]:
    """The names in `jaxopt_lab.NAME` of a script."""
    return {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "jaxopt_lab"
    }


def test_the_script_uses_every_public_function() -> None:
    values = {name: getattr(jaxopt_lab, name) for name in jaxopt_lab.__all__}
    functions = {name for name, value in values.items() if inspect.isfunction(value)}
    assert functions <= _used(SCRIPT)


@pytest.mark.slow
def test_the_script_runs() -> None:
    user_script.main()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.slow
@CHECKERS
def test_a_user_s_script_is_clean(checker: Callable[..., Any], cache: pathlib.Path) -> None:
    assert checker(SCRIPT, cache) == set()


@pytest.mark.slow
@CHECKERS
def test_wrong_names_and_options_are_told(
    checker: Callable[..., Any], tmp_path: pathlib.Path, cache: pathlib.Path
) -> None:
    header = (
        "import jax, optax\nimport jaxopt_lab, pallas_kernels\nfrom jaxopt_lab import testing\n"
    )
    header += "x = jax.numpy.ones((1, 8, 2, 4))\n"
    path = tmp_path / "wrong.py"
    path.write_text(header + "\n".join(WRONG) + "\n")
    told = {line for line, _ in checker(path, cache)}
    first = header.count("\n") + 1
    silent = [text for index, text in enumerate(WRONG) if first + index not in told]
    assert not silent
    assert min(told) >= first


# Names, places and patterns may be any text.
FREE_TEXT = {
    *("axis_name", "base_model_name_or_path", "exchange_memory_kind", "folder", "layers", "name"),
    *("task_type", "adapter_name", "path"),
}


def _text_arguments() -> Iterator[str]:
    """`function(argument)` for each argument of a public function that takes any text."""
    owners = [jaxopt_lab, testing, *(getattr(jaxopt_lab, name) for name in jaxopt_lab._LATER)]
    for owner in owners:
        for name in owner.__all__:
            function = getattr(owner, name)
            if not inspect.isfunction(function):
                continue
            for argument in inspect.signature(function).parameters.values():
                alternatives = str(argument.annotation).split(" | ")
                if "str" in alternatives and argument.name not in FREE_TEXT:
                    yield f"{owner.__name__}.{name}({argument.name})"


def test_options_are_literal() -> None:
    assert not list(_text_arguments())
