"""What is no number, no schedule and no flag is refused where a rule is made, by name."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxopt_lab

READY_MADE = [
    jaxopt_lab.lion,
    jaxopt_lab.adabelief,
    jaxopt_lab.adamp,
    jaxopt_lab.sgdp,
    jaxopt_lab.exadam,
    jaxopt_lab.diffgrad,
    jaxopt_lab.muon,
]
BARE = [
    jaxopt_lab.scale_by_lion,
    jaxopt_lab.scale_by_adabelief,
    jaxopt_lab.scale_by_adamp,
    jaxopt_lab.scale_by_sgdp,
    jaxopt_lab.scale_by_exadam,
    jaxopt_lab.scale_by_diffgrad,
    jaxopt_lab.scale_by_muon,
    jaxopt_lab.clip_coordinates,
]
WRONG: Any = "1e-3"
BETAS: Any = (0.9, 0.999)
PARAMS = {"w": jnp.ones((2, 2)), "temperature": jnp.float32(1.0)}
SCHEDULED = ("learning_rate", "weight_decay")


def arguments(kind: type) -> list[Any]:
    """Each argument of each rule whose default is of a type; a learning rate is a float."""
    return [
        pytest.param(make, name, id=f"{make.__name__}-{name}")
        for make in READY_MADE + BARE
        for name, parameter in inspect.signature(make).parameters.items()
        if (
            isinstance(parameter.default, kind)
            and not (kind is not bool and isinstance(parameter.default, bool))
        )
        or (kind is float and name in ("learning_rate", "fraction", "adam_learning_rate"))
    ]


def made(make: Any, name: str, value: Any) -> Any:
    needed = {
        n: 0.1
        for n, p in inspect.signature(make).parameters.items()
        if p.default is inspect.Parameter.empty
    }
    return make(**{**needed, name: value})


@pytest.mark.parametrize(("make", "name"), arguments(float))
def test_numbers_are_numbers(make, name):
    wrong = ["1e-3", None, (0.9, 0.999), [0.1], {"w": 0.1}, True, np.bool_(True), 1j]
    if name.endswith("learning_rate") and name != "learning_rate":
        wrong.remove(None)
    for value in wrong:
        with pytest.raises(TypeError, match=rf"{name} must be a number"):
            made(make, name, value)
    for value in (jnp.ones(1), np.ones(2), jnp.ones((1, 1))):
        with pytest.raises(
            ValueError, match=rf"{name} must have shape \(\), got an array of shape"
        ):
            made(make, name, value)
    for infinite in (float("inf"), np.asarray(np.inf)):
        with pytest.raises(ValueError, match=rf"{name} must be .*, got inf"):
            made(make, name, infinite)
    with pytest.raises(TypeError, match=rf"{name} must be a number"):
        made(make, name, optax.sgd(0.1))


@pytest.mark.parametrize(("make", "name"), arguments(bool))
def test_flags_are_true_or_false(make, name):
    for value in (0.999, "yes", None, (0.9, 0.999), jnp.asarray(True)):
        with pytest.raises(TypeError, match=rf"{name} must be True or False"):
            made(make, name, value)


def test_the_order_of_arguments_of_torch_is_told():
    for make in (jaxopt_lab.adamp, jaxopt_lab.lion, jaxopt_lab.adabelief):
        with pytest.raises(TypeError, match=r"b1 must be a number, .* b1 and b2"):
            make(1e-3, BETAS)


@pytest.mark.parametrize("make", READY_MADE)
@pytest.mark.parametrize("name", SCHEDULED)
def test_a_factory_of_schedules_wants_to_be_called(make, name):
    with pytest.raises(TypeError, match=rf"{name} must be a number or a function of the step"):
        made(make, name, optax.linear_schedule)
    with pytest.raises(TypeError, match=rf"{name} must be a number or a function of the step"):
        made(make, name, float)


@pytest.mark.parametrize("make", READY_MADE)
@pytest.mark.parametrize("name", SCHEDULED)
@pytest.mark.parametrize(
    ("schedule", "error"),
    [
        (lambda _: jnp.array([0.1]), ValueError),
        (lambda _: jnp.array([0.1, 0.2]), ValueError),
        (lambda _: None, TypeError),
        (optax.adam, TypeError),
    ],
)
def test_a_schedule_that_gives_no_number_is_told_while_tracing(make, name, schedule, error):
    tx = made(make, name, schedule)
    with pytest.raises(error, match=rf"the schedule given as {name} returned no number: {name}"):
        jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("make", READY_MADE)
def test_numbers_that_are_arrays_without_axes_are_numbers(make):
    tx = make(jnp.float32(0.1), weight_decay=np.float32(0.1))
    updates = jax.eval_shape(tx.update, PARAMS, tx.init(PARAMS), PARAMS)[0]
    assert updates["temperature"].shape == ()


@pytest.mark.parametrize("make", READY_MADE)
def test_text_and_numbers_in_a_mask_are_refused(make):
    for value in ("no decay", 1.0, None):
        mask = {"w": value if value is not None else "", "temperature": False}
        with pytest.raises(TypeError, match="mask must have leaves that are True or False"):
            make(0.1, weight_decay=0.1, mask=mask).init(PARAMS)
    make(0.1, weight_decay=0.1, mask={"w": np.bool_(True), "temperature": False}).init(PARAMS)


DTYPES = [
    pytest.param(functools.partial(made, make), name, id=f"{make.__name__}-{name}")
    for make in READY_MADE + BARE
    for name in inspect.signature(make).parameters
    if name.endswith("dtype")
]


def config(kind: Any, name: str, value: Any) -> Any:
    return kind(target_modules=["w"], **{name: value})


def exchange(name: str, value: Any) -> Any:
    settings: Any = {"axis_name": "r", name: value}
    return jaxopt_lab.distributed.diloco_exchange(optax.sgd(0.1), **settings)


OTHERS = [
    pytest.param(
        functools.partial(config, jaxopt_lab.LoraConfig), "adapter_dtype", id="LoraConfig"
    ),
    pytest.param(
        functools.partial(config, jaxopt_lab.MissConfig), "adapter_dtype", id="MissConfig"
    ),
    pytest.param(exchange, "slow_dtype", id="diloco"),
]


@pytest.mark.parametrize(("use", "name"), DTYPES + OTHERS)
def test_dtypes_are_dtypes(use, name):
    for value in (WRONG, "int32", 3):
        with pytest.raises(ValueError, match=f"{name} must be"):
            use(name, value)
    with pytest.raises(ValueError, match=f"{name} must be a dtype such as 'bfloat16', got 'bf16'"):
        use(name, "bf16")
    use(name, "bfloat16")
