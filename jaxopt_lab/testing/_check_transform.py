"""Runs the contract on one transformation."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from jaxopt_lab._checks import check_choice
from jaxopt_lab.testing import (  # noqa: F401  (importing a module registers its checks)
    _arguments,
    _composition,
    _devices,
    _dtypes,
    _flax,
    _numerics,
    _refusals,
    _settings,
    _transformations,
    _trees,
)
from jaxopt_lab.testing._causes import Cause, cause_of, describe
from jaxopt_lab.testing._registry import (
    CHECKS,
    GROUPS,
    LEVELS,
    BreachError,
    Check,
    Level,
    NotApplicableError,
)
from jaxopt_lab.testing._report import ContractError, Report, Result, Status
from jaxopt_lab.testing._subject import Subject

_REFUSALS = (ValueError, TypeError, NotImplementedError)


def contract_checks() -> tuple[Check, ...]:
    """Every check of the contract, in the order of the report.

    Returns:
      A `Check` for each promise, with its `name`, `group`, `promise` and `level`.

    Example:
      >>> from jaxopt_lab.testing import contract_checks
      >>> [check.name for check in contract_checks() if check.group == "flax"][:2]
      ['flax_serialization', 'nnx_optimizer']
    """
    return tuple(sorted(CHECKS.values(), key=lambda check: GROUPS.index(check.group)))


def check_transform(
    transform: Any,
    *args: Any,
    exceptions: Mapping[str, str] | None = None,
    checks: Iterable[str] | None = None,
    level: Level | None = None,
    raise_on_failure: bool = True,
    **kwargs: Any,
) -> Report:
    """Checks that an optax transformation keeps the contract of this library.

    The contract covers trees, dtypes, extreme values, composition with optax's wrappers, JAX's
    transformations and settings, sharding, Flax, and the refusal of malformed input;
    `contract_checks()` lists it. The result does not depend on the caller's settings. Checks of
    sharding run where there are four devices, pretended ones included, and those of Flax where it
    is installed.

    Failures of one cause are one line of the report, which points to the line of the user's code.
    If the update cannot be traced, whatever needs that fails for this cause and is not tried.

    Args:
      transform: an `optax.GradientTransformation`, or a function that makes one, such as
        `optax.adamw`; `args` and `kwargs` are then passed to it. With the function at hand,
        `optax.inject_hyperparams` and learning-rate schedules are checked too. A
        `functools.partial` is understood, also as the way to pass an argument that is itself
        called `exceptions`, `checks`, `level` or `raise_on_failure`.
      *args: positional arguments of the function.
      exceptions: promises the method does not make: the name of the check, and why. A check that
        finds the promise broken then counts as excepted. Where the method raises instead, this
        must be a `ValueError`, `TypeError` or `NotImplementedError` whose text contains the
        declared one. A declared exception that is not needed is a failure.
      checks: names of the checks to run; all by default. What only a ready-made optimizer promises
        (`descends`, `extra_arguments_ready_made`) runs where a constructor with a `learning_rate`
        tells that it is one, or where it is named here.
      level: `"must"` for what optax's own transformations keep by and large and wrappers rely on,
        `"library"` for the further promises of this library; both by default.
      raise_on_failure: whether to raise if a check fails.
      **kwargs: keyword arguments of the function.

    Returns:
      A `Report`; `print(report)` shows a table.

    Raises:
      ContractError: a check failed; the text is the report.
      ValueError: `checks` or `exceptions` names an unknown check, or `level` is unknown.
      TypeError: `transform` is neither of the two, or is ready-made and got arguments.

    Example:
      >>> import optax
      >>> from jaxopt_lab.testing import check_transform
      >>> report = check_transform(optax.sgd, 0.1, checks=["none_leaf", "masked"])
      >>> report.ok
      True
      >>> [result.status for result in report.results]
      ['passed', 'passed']

      What several checks find is one entry of `causes`, under the line that the report prints:

      >>> report = check_transform(
      ...     optax.set_to_zero, checks=["debug_nans", "nan_propagates"], raise_on_failure=False
      ... )
      >>> {line: [result.name for result in found] for line, found in report.causes.items()}
      {'no update moves a weight': ['nan_propagates']}
    """
    declared = dict(exceptions or {})
    contract = contract_checks()
    known = [check.name for check in contract]
    checks = None if checks is None else list(checks)
    selected = set(known if checks is None else checks)
    for argument, names in (("exceptions", declared), ("checks", selected)):
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise ValueError(f"{argument} names unknown checks {unknown}; expected some of {known}")
    if level is not None:
        check_choice(LEVELS, level=level)
    with _plain_settings():
        subject = Subject(transform, args, kwargs, asked_for=frozenset(checks or ()))
        results = tuple(
            _outcome(check, subject, declared.get(check.name))
            for check in contract
            if check.name in selected and level in (None, check.level)
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
        jax.debug_infs(False),
        jax.disable_jit(False),
    ):
        yield


def _outcome(check: Check, subject: Subject, reason: str | None) -> Result:
    start = time.perf_counter()
    status, cause = _run(check, subject, reason)
    seconds = time.perf_counter() - start
    return Result(
        check.name,
        check.group,
        check.promise,
        status,
        cause.text,
        seconds,
        check.level,
        cause.key if status == "failed" else "",
    )


def _run(check: Check, subject: Subject, reason: str | None) -> tuple[Status, Cause]:
    try:
        if check.traced and subject.obstacle is not None:
            raise subject.obstacle.error
        check.run(subject)
    except NotApplicableError as why:
        return "not run", _plain(str(why))
    except BreachError as breach:
        if reason is None:
            return "failed", _plain(str(breach))
        return "excepted", _plain(reason)
    except Exception as error:
        if reason is not None and isinstance(error, _REFUSALS) and reason in str(error):
            return "excepted", _plain(describe(error))
        obstacle = subject.obstacle if check.traced else None
        cause = cause_of(error, obstacle.what if obstacle is not None else "")
        if reason is None:
            return "failed", cause
        return "failed", _plain(f"declared {reason!r}, but it raised {cause.text}")
    if reason is None:
        return "passed", _plain("")
    return "failed", _plain(f"the promise is kept: the declared exception {reason!r} is not needed")


def _plain(text: str) -> Cause:
    return Cause(text, text)
