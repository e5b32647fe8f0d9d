"""The tables of docs/coming_from/peft.md are those of the code."""

from __future__ import annotations

import dataclasses
import pathlib
import re

import pytest

from jaxopt_lab import adapters
from jaxopt_lab.adapters.files import _foreign, _peft_config, _places

TEXT = (pathlib.Path(__file__).parents[2] / "docs" / "coming_from" / "peft.md").read_text()


def table(title):
    """The rows of the table under a title, by what stands in the first column."""
    section = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, re.DOTALL | re.MULTILINE
    )
    assert section
    rows = [line.strip("| ").split(" | ") for line in section[1].splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


CONFIGS = {"LORA": adapters.LoraConfig, "MISS": adapters.MissConfig}


@pytest.mark.parametrize("kind", CONFIGS)
def test_fields_are_in_the_table_with_what_becomes_of_them(kind):
    rows = {
        name.strip("`"): row for name, row in table(f"Fields of `{CONFIGS[kind].__name__}`").items()
    }
    said = {
        fate: {name for name, row in rows.items() if row[0].startswith(fate)}
        for fate in ("taken", "ignored", "refused")
    }
    assert said["taken"] == _peft_config.TAKEN[kind]
    assert said["ignored"] == _peft_config.IGNORED[kind]
    assert said["refused"] == set(_peft_config.REFUSED[kind])
    here = {field.name for field in dataclasses.fields(CONFIGS[kind])}
    same = {name for name, row in rows.items() if row[1].startswith("same")}
    # kernel_axes and adapter_dtype are what peft has no need of.
    assert here - same == {"kernel_axes", "adapter_dtype"}
    assert same <= here


def test_no_remedy_is_missing_from_the_messages():
    for kind in CONFIGS:
        rows = table(f"Fields of `{CONFIGS[kind].__name__}`")
        for name, remedy in _peft_config.REFUSED[kind].items():
            merge = "merge it with peft"
            assert (merge in remedy) == (merge in rows[f"`{name}`"][0]), name


def test_kinds_are_in_the_table():
    named = {name for cell in table("Other kinds of adapters") for name in re.findall(r"\w+", cell)}
    assert named == set(_foreign.KINDS)
    groups = [set(re.findall(r"\w+", cell)) for cell in table("Other kinds of adapters")]
    for group in groups:
        assert len({_foreign.KINDS[name] for name in group}) == 1


def test_names_of_the_table_are_names():
    texts = [text for cell in table("Names") for text in re.findall(r'"([^"]+)"', cell)]
    assert len(texts) == 6
    for text in texts:
        (place,) = _places.places({"w": text}, "w")
        assert str(place) == text
