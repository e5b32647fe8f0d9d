"""A healthy transformation passes the whole contract, and every check catches a broken one."""

from __future__ import annotations

import functools
from typing import Any

import jax
import optax
import pytest

from jaxopt_lab.testing import ContractError, check_transform, contract_checks
from tests.testing.broken import BROKEN, cast_updates, stateful
from tests.testing.reference import healthy, momentum


def test_healthy_transformation_keeps_everything() -> None:
    report = check_transform(momentum, learning_rate=0.1)
    not_run = {result.group for result in report.results if result.status == "not run"}
    assert not_run <= ({"devices"} if jax.device_count() < 4 else set()), str(report)


def test_every_check_has_a_broken_transformation() -> None:
    assert BROKEN.keys() == {check.name for check in contract_checks()}


@pytest.mark.parametrize("name", BROKEN)
def test_check_catches_a_broken_transformation(name: str) -> None:
    report = check_transform(BROKEN[name], checks=[name], raise_on_failure=False)
    result = report[name]
    if result.status == "not run" and result.group == "devices":
        pytest.skip(result.detail)
    assert result.status == "failed", str(report)
    assert result.detail


def test_adam_of_optax_fails_where_it_is_known_to() -> None:
    known = {
        "float32_gradients_bfloat16_weights",
        "gradient_shape_refused",
        "float32_gradient_1e+25_state",
        "strict_dtype_promotion_float32",
        "float16_gradient_1e-05",
        "differentiable_at_zero_gradient",
    }
    kept = {"float32_updates", "compiles_once", "float32_gradient_1e+25_updates"}
    report = check_transform(optax.adam, 1e-3, checks=known | kept, raise_on_failure=False)
    assert {result.name for result in report.failures} == known, str(report)


def test_error_text_is_the_report() -> None:
    with pytest.raises(ContractError, match=r"1 failed(.|\n)*FAILED +bfloat16_updates") as raised:
        check_transform(cast_updates("float32"), checks=["bfloat16_updates", "none_leaf"])
    report = raised.value.report
    assert not report.ok
    assert [result.name for result in report.failures] == ["bfloat16_updates"]
    assert "updates['bias'] is float32[5], expected bfloat16[5]" in str(report)


def test_declared_exception_of_a_broken_promise() -> None:
    reason = "returns float32 updates"
    report = check_transform(
        cast_updates("float32"),
        checks=["bfloat16_updates"],
        exceptions={"bfloat16_updates": reason},
    )
    assert report["bfloat16_updates"].status == "excepted"
    assert reason in str(report)


def _refuses_scalars(error: Exception) -> optax.GradientTransformation:
    def init(params: Any) -> Any:
        if any(leaf.ndim == 0 for leaf in jax.tree.leaves(params)):
            raise error
        return optax.EmptyState()

    return stateful(init, lambda gradients, state: state)


@pytest.mark.parametrize(
    ("error", "declared", "status"),
    [
        (NotImplementedError("no scalars here"), "no scalars", "excepted"),
        (NotImplementedError("no scalars here"), "another text", "failed"),
        (KeyError("no scalars here"), "no scalars", "failed"),
    ],
)
def test_declared_refusal_must_be_clear(error: Exception, declared: str, status: str) -> None:
    report = check_transform(
        _refuses_scalars(error),
        checks=["scalar_leaf"],
        exceptions={"scalar_leaf": declared},
        raise_on_failure=False,
    )
    assert report["scalar_leaf"].status == status


def test_declared_exception_that_is_not_needed_fails() -> None:
    with pytest.raises(ContractError, match="is not needed"):
        check_transform(healthy, checks=["none_leaf"], exceptions={"none_leaf": "no None"})


@pytest.mark.parametrize("argument", ["checks", "exceptions"])
def test_unknown_check_is_refused(argument: str) -> None:
    options: dict[str, Any] = {argument: {"no_such_check": "why"}}
    with pytest.raises(ValueError, match=f"{argument} names unknown checks.*no_such_check"):
        check_transform(healthy, **options)


def test_ready_made_transformation_has_no_constructor() -> None:
    report = check_transform(healthy(), checks=["inject_hyperparams", "learning_rate_schedule"])
    assert {result.status for result in report.results} == {"not run"}
    assert "needs the constructor" in str(report)


def test_refusals_that_need_a_remembered_tree_are_not_run_without_state() -> None:
    names = ["gradient_shape_refused", "missing_leaf_refused", "foreign_state_refused"]
    report = check_transform(optax.clip(1.0), checks=names)
    assert {result.status for result in report.results} == {"not run"}


def test_arguments_of_a_partial_and_of_the_call_are_joined() -> None:
    report = check_transform(functools.partial(momentum, b1=0.5), 0.1, checks=["none_leaf"])
    assert report.subject == "momentum(0.1, b1=0.5)"


@pytest.mark.parametrize(
    ("transform", "args", "message"),
    [
        (healthy(), (0.1,), "ready-made"),
        (3, (), "must be an optax.GradientTransformation"),
        (dict, (), "must return an optax.GradientTransformation"),
    ],
)
def test_what_is_no_transformation_is_refused(transform: Any, args: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        check_transform(transform, *args)


def test_settings_of_the_caller_do_not_matter() -> None:
    names = ["float32_updates", "multi_steps_float32", "strict_rank_promotion"]
    with (
        jax.enable_x64(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        assert check_transform(healthy, checks=names).ok
