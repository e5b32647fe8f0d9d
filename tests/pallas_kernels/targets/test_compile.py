from __future__ import annotations

import os
import subprocess
import sys

import pytest

from pallas_kernels.targets import (
    CHIPS,
    ENVIRONMENT,
    abstract_devices,
    compile,
    compile_for,
    compile_in_child,
    missing_compiler,
)
from tests.pallas_kernels.targets import cases, needs

CASES = "tests.pallas_kernels.targets.cases"


def run_python(source, **environment):
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    inherited = {k: v for k, v in os.environ.items() if k not in ENVIRONMENT}
    return subprocess.run(
        [sys.executable, "-c", source],
        env=inherited | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("function", [abstract_devices, missing_compiler])
def test_unknown_chip_is_refused_with_the_known_ones(function):
    with pytest.raises(ValueError, match="chip='h300' is not known; expected one of a100, l4, h10"):
        function("h300")


def test_missing_compiler_names_the_extra(monkeypatch):
    monkeypatch.setattr(compile, "_installed", lambda module: False)
    with pytest.raises(RuntimeError, match=r'pip install -e "\.\[aot\]"'):
        compile_for(lambda x: x, 1.0, chip="v5e")


def test_import_starts_no_backend_and_sets_no_variable():
    source = """\
import os
before = dict(os.environ)
import jax
after_jax = dict(os.environ)
import pallas_kernels.targets
from jax._src import xla_bridge
assert dict(os.environ) == after_jax, set(os.environ) ^ set(after_jax)
assert not xla_bridge.backends_are_initialized()
"""
    child = run_python(source)
    assert child.returncode == 0, child.stderr


@pytest.mark.parametrize(
    ("chip", "case", "bytes_per_parameter"),
    [
        needs.on("h200", "adamw", 28),
        needs.on("h200", "lion", 20),
        needs.on("h200", "adabelief", 28),
        needs.on("h200", "sgd", 12),
        needs.on("v5e", "adamw", 28),
    ],
)
def test_optimizer_step_moves_its_operands_and_results_once(chip, case, bytes_per_parameter):
    report = compile_in_child(f"{CASES}:{case}", chip)
    # The scalars of the bias correction are all that comes on top.
    assert report["traffic"]["total_bytes"] == pytest.approx(
        bytes_per_parameter * cases.PARAMETERS, rel=1e-5
    )


@pytest.mark.parametrize("chip", [needs.on(chip) for chip in CHIPS])
def test_every_chip_compiles(chip):
    report = compile_in_child(f"{CASES}:sgd", chip)
    assert report["chip"] == chip
    assert report["traffic"]["total_bytes"] == 12 * cases.PARAMETERS
    assert report["memory"]["argument"] == 8 * cases.PARAMETERS
    assert report["memory"]["alias"] == 4 * cases.PARAMETERS


@pytest.mark.parametrize(
    ("chip", "case", "expected"),
    [
        # Read the rows and write them.
        needs.on("h200", "take_rows", 16 * cases.ROW),
        needs.on("v5e", "take_rows", 16 * cases.ROW),
        needs.on("h200", "update_rows", 16 * cases.ROW),
        needs.on("v5e", "update_rows", 16 * cases.ROW),
        needs.on("h200", "gather_rows", 32 * cases.ROW),
        # Read the updates and the rows they change, write the rows.
        needs.on("h200", "scatter_add_rows", 48 * cases.ROW),
        needs.on("v5e", "scatter_add_rows", 48 * cases.ROW),
        # Not donated, so the matrix is copied first.
        needs.on("h200", "update_rows_of_a_copy", 2 * cases.MATRIX + 16 * cases.ROW),
        needs.on("v5e", "update_rows_of_a_copy", 2 * cases.MATRIX + 16 * cases.ROW),
        # Ten trips that read the carry and a matrix and write the carry; a copy of the carry; the
        # four rows of each trip, read and written, which start as zeros.
        needs.on("h200", "scan", 32 * cases.MATRIX + 120 * cases.ROW),
        # The TPU keeps the carry on the chip: matrices in, carry in and out, the rows written.
        needs.on("v5e", "scan", 12 * cases.MATRIX + 40 * cases.ROW),
        needs.on("h200", "packed_int4", 4.5 * 1024 * 1024),
        needs.on("v5e", "packed_int4", 4.5 * 1024 * 1024),
        needs.on("h200", "triton_kernel", 2 * 128 * 128 * 4),
    ],
)
def test_real_programs_move_what_their_arithmetic_says(chip, case, expected):
    report = compile_in_child(f"{CASES}:{case}", chip)
    # Indices, loop counters and their tests come on top.
    assert report["traffic"]["total_bytes"] == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("chip", [needs.on("h200"), needs.on("v5e")])
def test_nested_loops_of_a_constant_range_are_recognised(chip):
    kernels = compile_in_child(f"{CASES}:nested_loops", chip)["traffic"]["kernels"]
    assert 6 * 5 in {kernel["times"] for kernel in kernels}


@pytest.mark.parametrize("chip", [needs.on("h200"), needs.on("v5e")])
def test_loop_on_data_takes_the_given_trip_count(chip):
    with pytest.raises(ValueError, match="depends on data") as error:
        compile_in_child(f"{CASES}:until_large", chip)
    loop = str(error.value).split("'")[3]
    report = compile_in_child(f"{CASES}:until_large", chip, trip_counts={loop: 3})
    # A copy of the argument, three trips, and four sums over the matrix.
    expected = (2 + 3 * 2 + 4) * cases.MATRIX
    assert report["traffic"]["total_bytes"] == pytest.approx(expected, rel=2e-3)


CALLS = """\
import jax, jax.numpy as jnp
import pytest
from pallas_kernels.targets import abstract_devices, compile_for
x = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
chip = {chip!r}

scaled = compile_for(lambda n, x, s: x * n * s, 3, x, 2.0, chip=chip, static_argnums=0)
assert len(jax.tree.leaves(scaled.args_info)) == 2, "n must be no argument"

bf16 = compile_for(lambda x, s: x * s, x.update(dtype=jnp.bfloat16), 2.0, chip=chip)
assert bf16.out_info.dtype == jnp.bfloat16, "a Python scalar must stay weakly typed"

jitted = jax.jit(lambda x: x + 1, donate_argnums=0)
assert compile_for(jitted, x, chip=chip).memory_analysis().alias_size_in_bytes == 4 * 1024**2
with pytest.raises(ValueError, match="already jitted"):
    compile_for(jitted, x, chip=chip, donate_argnums=0)

with pytest.raises(ValueError, match="args has no array"):
    compile_for(lambda n: jnp.ones(n), 3, chip=chip, static_argnums=-1)

with pytest.raises(ValueError, match="topology='nonsense' is not one of"):
    compile_for(lambda x: x, x, chip=chip, topology="nonsense")

mesh = jax.sharding.Mesh(abstract_devices(chip, {topology!r}), ("data",))
rows = jax.NamedSharding(mesh, jax.P("data"))
total = compile_for(lambda x: x.sum(0), x.update(sharding=rows), chip=chip, topology={topology!r})
assert "all-reduce" in total.as_text()
assert total.memory_analysis().argument_size_in_bytes * mesh.size == 4 * 1024**2
"""


@pytest.mark.parametrize(
    ("chip", "topology"), [needs.on("h200", "1x1x8"), needs.on("v5e", "v5e:2x4")]
)
def test_arguments_are_placed_as_documented(chip, topology):
    child = run_python(CALLS.format(chip=chip, topology=topology), **ENVIRONMENT)
    assert child.returncode == 0, child.stderr


@pytest.mark.aot
@pytest.mark.skipif(missing_compiler("h200") is not None, reason=str(missing_compiler("h200")))
def test_unprepared_environment_is_named():
    source = """\
import jax
from pallas_kernels.targets import compile_for
compile_for(lambda x: x, 1.0, chip="h200")
"""
    child = run_python(source)
    assert child.returncode != 0
    assert (
        "RuntimeError: jax started without the cuda compiler: set JAX_PLATFORMS=cpu, JAX_SKIP"
        in (child.stderr)
    )
