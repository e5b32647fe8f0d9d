"""Every transformation of this project keeps the contract of `jaxopt_lab.testing`."""

from __future__ import annotations

import pytest

from jaxopt_lab import testing
from tests.transforms.rules import RULES


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_contract(rule):
    report = testing.check_transform(
        rule.make, **rule.arguments, exceptions=rule.exceptions, raise_on_failure=False
    )
    assert report.ok, str(report)
