"""The contract that every transformation of this library keeps, for anyone's own optimizer."""

from __future__ import annotations

from jaxopt_lab.testing._check_transform import check_transform, contract_checks
from jaxopt_lab.testing._registry import Check
from jaxopt_lab.testing._report import ContractError, Report, Result

__all__ = ["Check", "ContractError", "Report", "Result", "check_transform", "contract_checks"]
