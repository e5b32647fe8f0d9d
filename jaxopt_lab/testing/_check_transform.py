"""Runs the contract on one transformation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from jaxopt_lab.testing import (  # noqa: F401  (importing a module registers its checks)
    _composition,
    _devices,
    _dtypes,
    _numerics,
    _refusals,
    _transformations,
    _trees,
)
from jaxopt_lab.testing._registry import CHECKS, GROUPS, BreachError, Check, NotApplicableError
from jaxopt_lab.testing._report import ContractError, Report, Result, Status
from jaxopt_lab.testing._subject import Subject
from jaxopt_lab.testing._values import describe

_REFUSALS = (ValueError, TypeError, NotImplementedError)


def contract_checks() -> tuple[Check, ...]:
    """Every check of the contract, in the order of the report.

    Example:
      >>> from jaxopt_lab.testing import contract_checks
      >>> [check.name for check in contract_checks() if check.group == "trees"][:2]
      ['dict_tree', 'list_tree']
    """
    return tuple(sorted(CHECKS.values(), key=lambda check: GROUPS.index(check.group)))


def check_transform(
    transform: Any,
    *args: Any,
    exceptions: Mapping[str, str] | None = None,
    checks: Iterable[str] | None = None,
    raise_on_failure: bool = True,
    **kwargs: Any,
) -> Report:
    """Checks that an optax transformation keeps the contract of this library.

    The contract covers trees, dtypes, extreme values, composition with optax's wrappers, JAX's
    transformations, sharding, and the refusal of malformed input; `contract_checks()` lists it.
    The result does not depend on the caller's settings of x64 and of dtype and rank promotion.
    Checks of sharding run where there are four devices, pretended ones included.

    Args:
      transform: an `optax.GradientTransformation`, or a function that makes one, such as
        `optax.adamw`; `args` and `kwargs` are then passed to it. With the function at hand,
        `optax.inject_hyperparams` and learning-rate schedules are checked too. A
        `functools.partial` is understood, also as the way to pass an argument that is itself
        called `exceptions`, `checks` or `raise_on_failure`.
      *args: positional arguments of the function.
      exceptions: promises the method does not make: the name of the check, and why. A check that
        finds the promise broken then counts as excepted. Where the method raises instead, this
        must be a `ValueError`, `TypeError` or `NotImplementedError` whose text contains the
        declared one. A declared exception that is not needed is a failure.
      checks: names of the checks to run; all by default.
      raise_on_failure: whether to raise if a check fails.
      **kwargs: keyword arguments of the function.

    Returns:
      A `Report`; `print(report)` shows a table.

    Raises:
      ContractError: a check failed; the text is the report.
      ValueError: `checks` or `exceptions` names an unknown check.
      TypeError: `transform` is neither of the two, or is ready-made and got arguments.

    Example:
      >>> import optax
      >>> from jaxopt_lab.testing import check_transform
      >>> report = check_transform(optax.sgd, 0.1, checks=["none_leaf", "masked"])
      >>> report.ok
      True
      >>> [result.status for result in report.results]
      ['passed', 'passed']
    """
    declared = dict(exceptions or {})
    contract = contract_checks()
    known = [check.name for check in contract]
    selected = set(known if checks is None else checks)
    for argument, names in (("exceptions", declared), ("checks", selected)):
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise ValueError(f"{argument} names unknown checks {unknown}; expected some of {known}")
    with _plain_settings():
        subject = Subject(transform, args, kwargs)
        results = tuple(
            _outcome(check, subject, declared.get(check.name))
            for check in contract
            if check.name in selected
        )
    report = Report(subject.name, results)
    if raise_on_failure and not report.ok:
        raise ContractError(report)
    return report


@contextlib.contextmanager
def _plain_settings() -> Iterator[None]:
    with (
        jax.enable_x64(False),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.debug_nans(False),
    ):
        yield


def _outcome(check: Check, subject: Subject, reason: str | None) -> Result:
    start = time.perf_counter()
    status, detail = _run(check, subject, reason)
    seconds = time.perf_counter() - start
    return Result(check.name, check.group, check.promise, status, detail, seconds)


def _run(check: Check, subject: Subject, reason: str | None) -> tuple[Status, str]:
    try:
        check.run(subject)
    except NotApplicableError as why:
        return "not run", str(why)
    except BreachError as breach:
        return ("failed", str(breach)) if reason is None else ("excepted", reason)
    except Exception as error:
        if reason is None:
            return "failed", describe(error)
        if isinstance(error, _REFUSALS) and reason in str(error):
            return "excepted", describe(error)
        return "failed", f"declared {reason!r}, but it raised {describe(error)}"
    if reason is None:
        return "passed", ""
    return "failed", f"the promise is kept: the declared exception {reason!r} is not needed"
