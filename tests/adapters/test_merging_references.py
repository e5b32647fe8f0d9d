"""Merging of models gives what the authors' code and peft give."""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_lab.adapters import _task_vectors
from tests.adapters.compiled import breadcrumbs_merge, task_arithmetic, task_vector, ties_merge

ROOT = pathlib.Path(
    os.environ.get("JAXOPT_LAB_GOLDEN", pathlib.Path(__file__).parents[1] / "golden")
)
# A few roundings in float64 of numbers of size 1; the references that were made in float32 are
# masked inputs, rounded once.
TIGHT, FLOAT32 = 1e-14, 1e-6
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    arrays: dict[str, np.ndarray]  # names without the case's prefix

    def tree(self, prefix: str) -> Tree:
        """The arrays `prefix/name` by name; leaves are sorted by name, as the authors sort them."""
        start = f"{prefix}/"
        return {k.removeprefix(start): v for k, v in self.arrays.items() if k.startswith(start)}

    def number(self, name: str) -> float:
        return float(self.arrays[name])

    @property
    def base(self) -> Tree:
        return self.tree("base")

    @property
    def models(self) -> list[Tree]:
        vectors, found = self.base, []
        while vectors := self.tree(f"tv{len(found)}"):
            found.append({name: self.base[name] + vectors[name] for name in vectors})
        return found

    @property
    def weights(self) -> list[float]:
        return self.arrays["weights"].tolist()


def load() -> list[Case]:
    found = []
    for path in sorted((ROOT / "adapters").glob("*merging*.npz")):
        with np.load(path) as file:
            prefixes = sorted({m[0] for key in file.files if (m := re.match(r"c\d+_", key))})
            for prefix in prefixes:
                arrays = {
                    key.removeprefix(prefix): file[key]
                    for key in file.files
                    if key.startswith(prefix)
                }
                found.append(Case(f"{path.stem}-{prefix[:-1]}", arrays))
    return found


CASES = load()
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def close(found: Tree, expected: Tree, tolerance: float = TIGHT) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance)


def changed(case: Case, prefix: str, scale: float = 1.0) -> Tree:
    """The base plus the reference's task vector."""
    update = case.tree(prefix)
    return {name: case.base[name] + scale * update[name] for name in case.base}


def split(case: Case, flat: np.ndarray) -> Tree:
    """The authors' flat vector as a tree."""
    tree, place = {}, 0
    for name in case.arrays["auth_order"].tolist():
        shape = case.base[name].shape
        size = math.prod(shape)
        tree[name] = flat[place : place + size].reshape(shape)
        place += size
    assert place == flat.size
    return tree


def test_there_are_cases():
    assert len(CASES) >= 2
    assert any(min(case.weights) < 0 for case in CASES)


@each_case
def test_peft_linear(case, x64):
    close(task_arithmetic(case.base, case.models, case.weights), changed(case, "peft_linear"))


@each_case
@pytest.mark.parametrize(("elect", "name"), [("mass", "total"), ("frequency", "frequency")])
def test_peft_ties(case, elect, name, x64):
    found = ties_merge(
        case.base,
        case.models,
        case.number("density"),
        case.weights,
        scope="tensor",
        elect=elect,
        zero_sign="positive",
    )
    close(found, changed(case, f"peft_ties_{name}"))


@each_case
def test_authors_ties(case, x64):
    found = ties_merge(
        case.base,
        case.models,
        case.number("density"),
        scale=case.number("lambda"),
        keep="authors",
    )
    close(found, split(case, case.arrays["auth_merged_flat"]))
    close(
        ties_merge(case.base, case.models, case.number("density"), keep="authors"),
        split(
            case,
            np.concatenate([case.base[k].ravel() for k in case.arrays["auth_order"].tolist()])
            + case.arrays["auth_dis-mean"],
        ),
    )


@each_case
def test_authors_trimming(case, x64):
    for model, mask, kept in zip(
        case.models, case.arrays["auth_trim_mask"], case.arrays["auth_kept"], strict=True
    ):
        vector = jax.tree.map(jnp.asarray, task_vector(case.base, model))
        count = math.floor(case.number("density") * mask.size) + 1
        assert count == kept
        magnitudes = [jnp.abs(x) for x in jax.tree.leaves(vector)]
        marks = _task_vectors.largest(magnitudes, count, with_ties=True)
        np.testing.assert_array_equal(np.concatenate([m.ravel() for m in marks]), mask)


@each_case
def test_peft_trimming(case, x64):
    """Nothing but trimming is left of one model."""
    found = ties_merge(case.base, case.models[:1], case.number("density"), scope="tensor")
    close(found, changed(case, "peft_trim0"))


@each_case
@pytest.mark.parametrize("remove_first", [True, False])
def test_authors_breadcrumbs(case, remove_first, x64):
    fractions = case.number("bread_beta_keep"), case.number("bread_gamma_remove")
    options = {"remove_first": remove_first, "axis": "last"}
    name = "rf" if remove_first else "kf"
    for index, model in enumerate(case.models):
        found = breadcrumbs_merge(case.base, [model], *fractions, 1.0, **options)
        close(found, changed(case, f"bread_{name}_tv{index}"), FLOAT32)
    if remove_first:
        found = breadcrumbs_merge(
            case.base, case.models, *fractions, case.number("bread_alpha"), **options
        )
        close(found, case.tree("bread_merged"), FLOAT32)


@each_case
def test_rows_of_kernels_run_along_the_inputs(case, x64):
    """The authors' matrices are (out, in): transposed, they are kernels."""

    def transposed(tree):
        return {name: np.swapaxes(x, -1, -2) if x.ndim > 1 else x for name, x in tree.items()}

    fractions = case.number("bread_beta_keep"), case.number("bread_gamma_remove")
    found = breadcrumbs_merge(
        transposed(case.base),
        [transposed(model) for model in case.models],
        *fractions,
        case.number("bread_alpha"),
    )
    close(transposed(found), case.tree("bread_merged"), FLOAT32)
