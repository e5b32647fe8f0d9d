"""A healthy transformation passes the whole contract, and every check catches a broken one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.experimental import pallas

from jaxopt_lab.testing import ContractError, _subject, check_transform, contract_checks
from jaxopt_lab.testing._registry import NotApplicableError
from tests.testing.broken import BROKEN, cast_updates, leafwise, stateful
from tests.testing.reference import healthy, momentum


@pytest.mark.slow
def test_healthy_transformation_keeps_everything() -> None:
    report = check_transform(momentum, learning_rate=0.1)
    devices = {check.name for check in contract_checks() if check.group == "devices"}
    not_run = {result.name for result in report.results if result.status == "not run"}
    # It treats all leaves alike.
    assert not_run - {"nnx_treatments"} <= (devices if jax.device_count() < 4 else set()), str(
        report
    )


def test_every_check_has_a_broken_transformation() -> None:
    assert BROKEN.keys() == {check.name for check in contract_checks()}


@pytest.mark.parametrize("name", BROKEN)
def test_check_catches_a_broken_transformation(name: str) -> None:
    report = check_transform(BROKEN[name], checks=[name], raise_on_failure=False)
    result = report[name]
    if result.status == "not run" and result.group in ("devices", "flax"):
        pytest.skip(result.detail)
    assert result.status == "failed", str(report)
    assert result.detail


def _branches_on_the_counter(learning_rate: float) -> optax.GradientTransformation:
    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if state > 10:  # the place that the report must name
            updates = jax.tree.map(jnp.zeros_like, updates)
        return jax.tree.map(lambda g: -learning_rate * g, updates), state + 1

    return optax.GradientTransformation(lambda params: jnp.zeros((), jnp.int32), update)


def _line_of(function: Callable[..., Any], text: str) -> str:
    lines, start = inspect.getsourcelines(function)
    (line,) = [start + index for index, found in enumerate(lines) if text in found]
    return f"{__file__}:{line}"


def test_an_update_that_cannot_be_traced_is_one_line_with_its_place() -> None:
    report = check_transform(_branches_on_the_counter, 0.1, raise_on_failure=False)
    line, results = next(iter(report.causes.items()))
    place = _line_of(_branches_on_the_counter, "must name")
    assert line.startswith(f"the update cannot be traced: {place}: TracerBoolConversionError: ")
    traced = {check.name for check in contract_checks() if check.traced}
    assert {result.name for result in results} == traced
    text = " ".join(str(report).split())
    assert f"FAILED {len(traced)} checks: {line}" in text
    assert text.count(place) == 1
    assert text.count("TracerBoolConversionError") == 1
    assert "jaxopt_lab/testing" not in text


def test_checks_that_need_a_traced_step_fail_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_subject.Subject, "obstacle", None)
    report = check_transform(_branches_on_the_counter, 0.1, raise_on_failure=False)
    untraceable = {result.name for result in report.results if "cannot be traced" in result.detail}
    applied = {result.name for result in report.results if result.status != "not run"}
    assert untraceable == {check.name for check in contract_checks() if check.traced} & applied


def test_an_update_that_cannot_be_compiled_is_one_line_with_its_place() -> None:
    def kernel_for_a_gpu(learning_rate: float) -> optax.GradientTransformation:
        def copy(x: Any, y: Any) -> None:
            y[...] = x[...]

        def rule(g: jax.Array) -> jax.Array:
            call = pallas.pallas_call(copy, out_shape=jax.ShapeDtypeStruct(g.shape, g.dtype))
            return call(g)  # no CPU can run it

        return leafwise(rule)

    if jax.default_backend() != "cpu":
        pytest.skip("the backend may compile the kernel")
    report = check_transform(kernel_for_a_gpu, 0.1, raise_on_failure=False)
    line, results = next(iter(report.causes.items()))
    place = _line_of(kernel_for_a_gpu, "can run it")
    assert line.startswith(f"the update cannot be compiled: {place}: ValueError: ")
    assert {check.name for check in contract_checks() if check.traced} <= {
        result.name for result in results
    }


def test_a_line_that_always_raises_is_one_cause() -> None:
    def broken(learning_rate: float) -> optax.GradientTransformation:
        def rule(g: jax.Array) -> jax.Array:
            return g @ jnp.ones(7)  # never fits

        return leafwise(rule)

    names = ["dict_tree", "scan_carry", "masked", "vmap", "none_leaf"]
    report = check_transform(broken, 0.1, checks=names, raise_on_failure=False)
    (results,) = report.causes.values()
    assert [result.name for result in results] == [
        check.name for check in contract_checks() if check.name in names
    ]
    assert _line_of(broken, "never fits") in results[0].detail


def test_equal_findings_are_one_line() -> None:
    names = ["bfloat16_updates", "float16_updates", "none_leaf"]
    halves = lambda: leafwise(lambda g: g.astype(jnp.float32))  # noqa: E731
    text = str(check_transform(halves, checks=names, raise_on_failure=False))
    assert "1 of 3 checks passed, 2 failed (2 must, 0 of the library's own)" in text
    assert text.count("FAILED") == 2, "two findings differ in their dtypes"
    empty = lambda: leafwise(lambda g: g.astype(jnp.int32))  # noqa: E731
    report = check_transform(empty, checks=["none_leaf", "bare_array"], raise_on_failure=False)
    assert len(report.causes) == 2, "other leaves are other findings"
    report = check_transform(empty, checks=["dict_tree", "float32_updates"], raise_on_failure=False)
    assert len(report.causes) == 1, str(report)
    assert "FAILED 2 checks: updates['bias'] is int32[5]" in " ".join(str(report).split())


@pytest.mark.parametrize("level", ["must", "library"])
def test_a_level_selects_its_checks(level: Any) -> None:
    names = ["none_leaf", "bfloat16_updates", "integer_weights_refused", "python_float_leaves"]
    every = check_transform(healthy, checks=names)
    some = check_transform(healthy, checks=names, level=level)
    assert [r.name for r in some.results] == [r.name for r in every.results if r.level == level]
    assert len(some.results) == 2
    assert {check.level for check in contract_checks()} == {"must", "library"}


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level must be one of must, library, got 'strict'"):
        check_transform(healthy, level="strict")  # pyright: ignore[reportArgumentType]


def test_the_report_marks_the_library_s_own_promises() -> None:
    text = str(check_transform(healthy, checks=["none_leaf", "python_float_leaves"]))
    marked = [line for line in text.splitlines() if line.endswith("[library]")]
    assert len(marked) == 1
    assert "python_float_leaves" in marked[0]


def test_adam_of_optax_keeps_what_wrappers_rely_on() -> None:
    names = [
        *("descends", "nan_propagates", "extra_arguments_ready_made", "callable_trees"),
        *("empty_leaves", "shard_map_varying_gradients", "disable_jit", "x64", "debug_nans"),
        *(
            "shard_map_varying_state",
            "flax_serialization",
            "nnx_optimizer",
            "nnx_optimizer_restored",
        ),
        *("linen_train_state", "linen_partitioned"),
    ]
    report = check_transform(optax.adamw, 1e-3, checks=names, level="must", raise_on_failure=False)
    assert report.ok, str(report)
    assert len(report.results) == len(names)


def test_adam_that_climbs_is_found_to_climb() -> None:
    climbs = lambda learning_rate: optax.chain(  # noqa: E731
        optax.scale_by_adam(), optax.scale(learning_rate)
    )
    report = check_transform(climbs, 1e-3, checks=["descends"], raise_on_failure=False)
    assert "the loss of a convex quadratic goes from" in report["descends"].detail


@pytest.mark.parametrize("rule", [optax.scale_by_adam, optax.scale_by_adam(), optax.adam(1e-3)])
def test_a_rule_for_a_chain_promises_no_descent_unless_asked(rule: Any) -> None:
    with pytest.raises(NotApplicableError, match=r"checks=\['descends'\] asks for it"):
        _subject.Subject(rule, (), {}).require_ready_made("descends")
    report = check_transform(rule, checks=["descends"], raise_on_failure=False)
    # The bare rule gives the direction of the gradient, and so climbs.
    assert report.ok == isinstance(rule, optax.GradientTransformationExtraArgs), str(report)


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
