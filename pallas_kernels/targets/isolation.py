"""Compile in a process of its own, which may abort without taking the caller with it."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels.attention import routes
from pallas_kernels.targets import hlo
from pallas_kernels.targets.chips import find_chip
from pallas_kernels.targets.compile import ENVIRONMENT, compile_for, missing_compiler
from pallas_kernels.targets.traffic import memory_traffic

_CHILD = "from pallas_kernels.targets import isolation; isolation._child()"


def compile_in_child(
    function: str,
    chip: str,
    *,
    topology: str | None = None,
    trip_counts: Mapping[str, int] | None = None,
    timeout: float = 300,
    environment: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Compiles a case for `chip` in a child process and reports what it needs and moves.

    Args:
      function: ``"package.module:function"``. The function takes no arguments and returns
        ``(fn, args, donate_argnums)``, as `compile_for` takes them. The child imports it with this
        process's ``sys.path``, under `ENVIRONMENT`.
      chip: A name in `CHIPS`.
      topology: The size of the machine, such as ``"1x1x8"`` (GPUs: hosts, devices of each) or
        ``"v5e:16x16"`` (a slice of TPUs); by default one device or one host.
      trip_counts: How often each loop runs whose trip count depends on data, by the name of the
        ``while`` instruction.
      timeout: Seconds until the child is ended.
      environment: Variables that the child gets on top.

    Returns:
      A JSON-able dictionary::

        {"function", "chip", "jax_version",
         "routes": [name],  # that calls of `attention` took
         "memory": {"argument", "output", "alias", "temp", "generated_code"},  # bytes
         "scoped_memory": {kernel: bytes},  # of vector memory, of a TPU's Pallas kernels
         "traffic": {"total_bytes",
                     "kernels": [{"name", "opcode", "operand_bytes", "result_bytes", "times"}]}}

    Raises:
      ValueError: `function` cannot be imported or does not return what is expected, or `chip`,
        `topology` or `trip_counts` is wrong.
      RuntimeError: The compiler is not installed, refused the program, or ended its process.
      TimeoutError: The child did not end in time.
    """
    find_chip(chip)
    reason = missing_compiler(chip)
    if reason is not None:
        raise RuntimeError(reason)
    request = {
        "function": function,
        "chip": chip,
        "topology": topology,
        "trip_counts": dict(trip_counts or {}),
    }
    # A cache on disk would let one target be answered by what was compiled for another.
    variables = os.environ | dict(ENVIRONMENT) | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    variables |= environment or {}
    variables["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        try:
            child = subprocess.run(
                [sys.executable, "-c", _CHILD, json.dumps(request), str(answer)],
                env=variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(
                f"{function} did not compile for chip={chip!r} within {timeout} seconds"
            ) from error
        if not answer.exists():
            raise RuntimeError(
                f"the process that compiled {function} for chip={chip!r} ended with exit code "
                f"{child.returncode}; its last output was:\n{child.stdout[-4000:]}"
            )
        result = json.loads(answer.read_text())
    if "error" in result:
        raise (ValueError if result["is_value_error"] else RuntimeError)(result["error"])
    return result


def _child() -> None:
    """Answers one request of `compile_in_child`."""
    request, path = json.loads(sys.argv[1]), sys.argv[2]
    try:
        answer = _compile(**request)
    except Exception as error:
        answer = {
            "error": f"{request['function']} for chip={request['chip']!r}: {error}",
            "is_value_error": isinstance(error, ValueError),
        }
    Path(path).write_text(json.dumps(answer))


def _compile(
    function: str, chip: str, topology: str | None, trip_counts: Mapping[str, int]
) -> dict[str, Any]:
    fn, args, donate_argnums = _case(function)
    with routes.recorded() as taken:
        compiled = compile_for(
            fn, *args, chip=chip, topology=topology, donate_argnums=donate_argnums
        )
    traffic = memory_traffic(compiled, trip_counts)
    scoped = hlo.scoped_memory(compiled.as_text() or "")
    memory = compiled.memory_analysis()
    sizes = ("argument", "output", "alias", "temp", "generated_code")
    return {
        "function": function,
        "chip": chip,
        "jax_version": jax.__version__,
        "routes": taken,
        "memory": {size: getattr(memory, f"{size}_size_in_bytes") for size in sizes},
        "scoped_memory": scoped,
        "traffic": {
            "total_bytes": traffic.total_bytes,
            "kernels": [kernel._asdict() for kernel in traffic.kernels],
        },
    }


def _case(function: str) -> tuple[Callable[..., Any], Sequence[Any], int | Sequence[int]]:
    module, _, name = function.partition(":")
    if not module or not name:
        raise ValueError("expected the function as 'package.module:function'")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"cannot be imported: {error}") from error
    case = make()
    if not (isinstance(case, tuple) and len(case) == 3 and callable(case[0])):
        raise ValueError(
            f"returned {type(case).__name__}; expected a tuple (fn, args, donate_argnums)"
        )
    return case
