"""The house: who imports whom, how long files are, and that public names explain themselves."""

from __future__ import annotations

import ast
import inspect
import pathlib
import subprocess
import sys

import pytest

import jaxopt_lab

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(
    path
    for package in ("jaxopt_lab", "pallas_kernels", "experiments")
    for path in (ROOT / package).rglob("*.py")
)
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
STANDARD = set(sys.stdlib_module_names)


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def code_lines(path: pathlib.Path) -> int:
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node):
            docstrings |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return sum(
        number not in docstrings and bool(line.strip()) and not line.strip().startswith("#")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
    )


@pytest.mark.parametrize("name", NAMES)
def test_arrows_point_one_way(name):
    package, *inside = pathlib.Path(name).with_suffix("").parts
    outside = {module.split(".")[0] for module in imports(ROOT / name)} - STANDARD - {package}
    if package == "jaxopt_lab":
        # The file format of other projects; nothing else needs it.
        formats = {"safetensors"} if inside[-2:] == ["files", "_tensors"] else set()
        assert outside <= {"jax", "optax", "numpy"} | formats
    elif package == "pallas_kernels":
        # Flax's own attention gives the weights that its layers sow, and layers of Flax are made
        # where a user imports their file; nothing else needs Flax.
        layers = inside[-2:] in (["norm", "linen"], ["norm", "nnx"])
        flax = {"flax"} if inside[-1] == "flax_attention" or layers else set()
        assert outside <= {"jax", "jaxlib", "numpy"} | flax
    else:
        assert "tests" not in outside
    own = {tuple(m.split(".")[1:]) for m in imports(ROOT / name) if m.split(".")[0] == package}
    if package == "experiments" and len(inside) > 1:
        # A question knows itself and what all share; what is merged was fine-tuned.
        below = {"harness": set(), "workloads": {"harness"}, "merge_models": {"finetune"}}
        rooms = below.get(inside[0], set()) | {inside[0]}
        if inside[0] not in ("harness", "workloads"):
            rooms |= {"harness", "workloads"}
        assert {target[0] for target in own} <= rooms
    if package == "jaxopt_lab" and len(inside) > 1:
        for target in own:
            if not target:  # the public names, which the contract tries as users do
                assert inside[0] == "testing", f"{name} imports the package that it is part of"
                continue
            private_at_the_root = target[0].startswith("_")
            assert private_at_the_root or target[0] == inside[0], f"{name} imports {target}"
            if inside[0] == "transforms" and not private_at_the_root:
                assert target[1].startswith("_"), f"{name} imports another method: {target}"


# A kernel's body may be longer. This one leaves with jax's Triton lowering, as one file.
KERNELS = {"pallas_kernels/attention/triton.py"}


@pytest.mark.parametrize("name", NAMES)
def test_files_are_short(name):
    assert code_lines(ROOT / name) <= (600 if name in KERNELS else 300)


def test_only_distributed_mentions_an_axis_name():
    for name in NAMES:
        parts = pathlib.Path(name).parts
        if parts[0] == "jaxopt_lab" and parts[1] not in ("distributed", "testing"):
            assert "axis_name" not in (ROOT / name).read_text(), name


def test_public_names_explain_themselves():
    for name in jaxopt_lab.__all__:
        value = getattr(jaxopt_lab, name)
        assert value.__doc__, name
        if callable(value) and not isinstance(value, type):
            sections = ["Returns:", "Examples:"]
            sections += ["Args:"] if inspect.signature(value).parameters else []
            sections += ["References:"] if name.startswith("scale_by_") else []
            for section in sections:
                assert section in value.__doc__, f"{name} has no section {section}"


def test_importing_is_quiet_and_starts_nothing():
    program = (
        "import warnings; warnings.simplefilter('error'); import jaxopt_lab, pallas_kernels, jax\n"
        "assert not jax._src.xla_bridge._backends, 'a backend was started'"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_importing_leaves_the_heavy_folders_for_their_first_use():
    program = (
        "import sys, jaxopt_lab\n"
        "own = {name.split('.')[1] for name in sys.modules if name.startswith('jaxopt_lab.')}\n"
        "folders = {name for name in own if not name.startswith('_')}\n"
        "assert folders == {'transforms'}, folders\n"
        "assert set(jaxopt_lab.__all__) <= set(dir(jaxopt_lab))\n"
        "assert jaxopt_lab.state_bytes is jaxopt_lab.diagnostics.state_bytes\n"
        "assert 'jaxopt_lab.subspace' not in sys.modules\n"
        "from jaxopt_lab import *\n"
        "assert frugal is subspace.frugal and quantization.int8\n"
        "assert not hasattr(jaxopt_lab, 'int8'), 'a name that is not public'"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
