"""Every transformation of this project keeps the contract of `jaxopt_lab.testing`."""

from __future__ import annotations

import inspect

import pytest

import jaxopt_lab
from jaxopt_lab import testing
from tests.transforms.rules import OPTIMIZERS, RULES


def test_every_optimizer_is_listed():
    functions = {name: getattr(jaxopt_lab, name) for name in jaxopt_lab.__all__}
    made = {
        name
        for name, value in functions.items()
        if callable(value)
        and next(iter(inspect.signature(value).parameters), None) == "learning_rate"
        # These need a mapped axis: tests/distributed checks them under every kind of it.
        and not value.__module__.startswith("jaxopt_lab.distributed.")
    }
    assert made == {rule.make.__name__ for rule in OPTIMIZERS}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_contract(rule):
    report = testing.check_transform(
        rule.make, **rule.arguments, exceptions=rule.exceptions, raise_on_failure=False
    )
    assert report.ok, str(report)
