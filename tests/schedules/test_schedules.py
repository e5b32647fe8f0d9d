"""What every schedule promises, and the properties of each one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxopt_lab import schedules
from tests.schedules.golden import table

NORMS = np.array([9.0, 6.0, 4.0, 3.0, 2.0, 2.0, 1.0, 2.0, 3.0, 4.0, 4.0, 5.0])
# name -> (schedule, steps of its run)
ALL = {
    "uba": (schedules.uba_schedule(0.1, 0.01, 40, 1.0), 40),
    "uba-chebyshev": (schedules.uba_schedule(0.1, 0.01, 40, 5.0, "chebyshev", 8), 40),
    "wsd": (schedules.wsd_schedule(0.1, 8, 20, 12, end_value=0.001), 40),
    "wsd-exponential": (
        schedules.wsd_schedule(
            0.1, 8, 20, 12, end_value=0.001, warmup_shape="sqrt", decay_shape="exponential"
        ),
        40,
    ),
    "wsd-endless": (schedules.wsd_schedule(0.1, 8, warmup_shape="cosine"), 40),
    "branch": (schedules.branch_decay(schedules.wsd_schedule(0.1, 8), 28, 12), 40),
    "inverse-sqrt": (schedules.inverse_sqrt_schedule(0.1, 8), None),
    "rewarmed": (schedules.rewarmed_schedule(0.1, (20, 20), 4), 40),
    "refined": (schedules.refined_schedule(NORMS, 40, 0.1, "l1"), 39),
}


def at(schedule, step):
    return float(schedule(step))


every_schedule = pytest.mark.parametrize("name", ALL)


@every_schedule
def test_jit_vmap_and_scan_give_the_values_of_single_steps(name):
    schedule, _ = ALL[name]
    steps = jnp.arange(-2, 44)
    expected = np.array([at(schedule, int(t)) for t in steps])
    mapped = jax.jit(jax.vmap(schedule))(steps)
    assert mapped.dtype == jnp.float32
    _, scanned = jax.lax.scan(lambda count, _: (count + 1, schedule(count)), -2, length=46)
    for found in (mapped, scanned):
        assert found.dtype == jnp.float32
        # Fusion rounds a product and a sum once rather than twice.
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


@every_schedule
def test_is_clamped_and_the_first_step_is_not_wasted(name):
    schedule, end = ALL[name]
    assert at(schedule, 0) > 0
    assert at(schedule, -7) == at(schedule, -1000)
    assert 0 <= at(schedule, -7) <= at(schedule, 0)
    if end is not None:
        assert at(schedule, end) == at(schedule, end + 1) == at(schedule, 2**31 - 1)


@every_schedule
def test_is_finite_non_negative_and_has_the_peak(name):
    schedule, _ = ALL[name]
    rates = table(schedule, 50)
    assert np.isfinite(rates).all()
    assert (rates >= 0).all()
    assert rates.max() == pytest.approx(0.1, rel=0.02 if name == "refined" else 1e-6)


@every_schedule
def test_float64_steps_give_float64(name):
    schedule, _ = ALL[name]

    def found(dtype):
        return jax.eval_shape(schedule, jax.ShapeDtypeStruct((2,), dtype))

    with jax.enable_x64(True):
        assert found(jnp.float64).dtype == jnp.float64
        for dtype in (jnp.int64, jnp.int32, jnp.uint8, jnp.float32, jnp.bfloat16):
            assert found(dtype).dtype == jnp.float32
            assert found(dtype).shape == (2,)


def test_runs_in_an_optimizer():
    schedule, _ = ALL["wsd"]
    tx = optax.sgd(schedule)
    state, update = tx.init(jnp.zeros(())), jax.jit(tx.update)
    rates = []
    for _ in range(3):
        u, state = update(jnp.ones(()), state)
        rates.append(-float(jnp.asarray(u)))
    np.testing.assert_allclose(rates, table(schedule, 3), rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["uba-chebyshev", "wsd", "wsd-exponential", "wsd-endless", "inverse-sqrt", "rewarmed"]
)
def test_warmup_ends_at_the_peak_and_rises(name):
    schedule, _ = ALL[name]
    length = 4 if name == "rewarmed" else 8
    rates = table(schedule, length)
    assert (np.diff(rates) > 0).all()
    assert rates[-1] == pytest.approx(0.1, rel=1e-6)


def test_warmup_shapes():
    p = np.arange(1, 9) / 8
    shapes: dict[Any, np.ndarray] = {
        "linear": p,
        "cosine": (1 - np.cos(np.pi * p)) / 2,
        "sqrt": 1 - np.sqrt(1 - p),
    }
    for shape, expected in shapes.items():
        schedule = schedules.wsd_schedule(3.0, 8, init_value=1.0, warmup_shape=shape)
        np.testing.assert_allclose(table(schedule, 8), 1 + 2 * expected, rtol=1e-6)
        zero_based = schedules.wsd_schedule(
            3.0, 8, init_value=1.0, warmup_shape=shape, zero_based_warmup=True
        )
        assert at(zero_based, 0) == 1.0
        np.testing.assert_allclose(table(zero_based, 8)[1:], 1 + 2 * expected[:-1], rtol=1e-6)


def test_uba_at_2_is_the_cosine():
    ours = table(schedules.uba_schedule(0.3, 0.03, 100, 2.0), 101)
    theirs = table(optax.cosine_decay_schedule(0.3, 100, alpha=0.1), 101)
    np.testing.assert_allclose(ours, theirs, rtol=2e-6)


@pytest.mark.parametrize("angle", ["continuous", "chebyshev"])
def test_uba_falls_and_more_so_with_phi(angle):
    phis = jnp.array([0.1, 0.25, 1.0, 2.0, 5.0, 100.0])
    rates = np.array([table(schedules.uba_schedule(1.0, 0.1, 50, phi, angle), 51) for phi in phis])
    mapped = jax.vmap(lambda phi: schedules.uba_schedule(1.0, 0.1, 50, phi, angle)(7))(phis)
    np.testing.assert_allclose(mapped, rates[:, 7], rtol=1e-6)
    # The last step of the Chebyshev angles is clamped to the one before.
    assert (np.diff(rates[:, :50], axis=1) < 0).all()
    assert (np.diff(rates[:, 1:50], axis=0) < 0).all()
    ends = rates[:, [0, -1]]
    if angle == "continuous":
        np.testing.assert_allclose(ends, [[1.0, 0.1]] * len(phis), rtol=1e-6)
    else:
        assert ((ends > 0.1) & (ends < 1)).all()
        np.testing.assert_array_equal(rates[:, -1], rates[:, -2])


def test_uba_half_way():
    for phi in (0.25, 1.0, 5.0):
        half = at(schedules.uba_schedule(1.0, 0.0, 100, phi), 50)
        assert half == pytest.approx(1 / (1 + phi / 2), rel=1e-6)


def test_uba_chebyshev_steps_solve_a_quadratic():
    """After all steps, gradient descent is at the minimax value 1 / T_n((k + 1) / (k - 1))."""
    n, low, high = 8, 1.0, 10.0
    with jax.enable_x64(True):
        schedule = schedules.uba_schedule(1 / low, 1 / high, n, 2 * high / low, "chebyshev")
        rates = schedules.as_table(schedule, np.arange(n, dtype=np.float64))
    eigenvalues = np.linspace(low, high, 1001)
    left = np.abs(np.prod(1 - rates[:, None] * eigenvalues, axis=0)).max()
    best = 1 / np.cosh(n * np.arccosh((high + low) / (high - low)))
    assert left == pytest.approx(best, rel=1e-9)  # the maximum is at an end of the interval


def test_uba_in_several_phases():
    cycle = [schedules.uba_schedule(peak, 0.1, 20, 1.0) for peak in (1.0, 0.5)]
    joined = table(optax.join_schedules(cycle, [20]), 40)
    np.testing.assert_array_equal(joined[:20], table(cycle[0], 20))
    np.testing.assert_array_equal(joined[20:], table(cycle[1], 20))


@pytest.mark.parametrize("angle", ["continuous", "chebyshev"])
def test_uba_counts_the_warmup_in(angle):
    warm = table(schedules.uba_schedule(1.0, 0.1, 50, 1.0, angle, warmup_steps=10), 51)
    np.testing.assert_allclose(warm[:10], np.arange(1, 11) / 10, rtol=1e-6)
    bare = table(schedules.uba_schedule(1.0, 0.1, 40, 1.0, angle), 41)
    np.testing.assert_allclose(warm[10:], bare, rtol=1e-6)


def test_wsd_exponential_has_a_half_life():
    schedule = schedules.wsd_schedule(1.0, 0, 10, 30, end_value=2.0**-6, decay_shape="exponential")
    rates = table(schedule, 41)
    np.testing.assert_allclose(rates[10::5], 0.5 ** np.arange(7.0), rtol=1e-5)


def test_branches_leave_the_trunk_where_they_start():
    trunk = schedules.inverse_sqrt_schedule(1.0, 5)
    expected = table(trunk, 60)
    for start in (0, 20, 33):
        branch = schedules.branch_decay(trunk, start, 10, end_value=0.01, decay_shape="cosine")
        rates = table(branch, 60)
        np.testing.assert_array_equal(rates[: start + 1], expected[: start + 1])
        assert (np.diff(rates[start : start + 11]) < 0).all()
        np.testing.assert_allclose(rates[start + 10 :], 0.01, rtol=1e-6)


def test_branch_of_wsd_is_wsd():
    whole = schedules.wsd_schedule(0.3, 5, 20, 10, end_value=0.03)
    branch = schedules.branch_decay(schedules.wsd_schedule(0.3, 5), 25, 10, end_value=0.03)
    np.testing.assert_allclose(table(branch, 40), table(whole, 40), rtol=1e-6)


def test_branches_can_be_mapped():
    trunk = schedules.wsd_schedule(1.0, 2)
    rates = jax.vmap(lambda start: schedules.branch_decay(trunk, start, 10)(30))(
        jnp.array([10, 25, 50])
    )
    np.testing.assert_allclose(rates, [0.0, 1 - np.sqrt(0.5), 1.0], atol=1e-6)


def test_large_counts_stay_apart():
    start = 2**30
    branch = schedules.branch_decay(optax.constant_schedule(1.0), start, 4, decay_shape="linear")
    assert [at(branch, start + t) for t in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    rewarmed = schedules.rewarmed_schedule(1.0, (8,), 4, start_step=start)
    assert [at(rewarmed, start + t) for t in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_inverse_sqrt_timescale():
    schedule = schedules.inverse_sqrt_schedule(1.0, 0, timescale=100)
    np.testing.assert_allclose(schedule(jnp.array([0, 300])), [1.0, 0.5], rtol=1e-6)


def test_rewarmed_phases():
    schedule = schedules.rewarmed_schedule(
        (1.0, 0.5), (100, 50), (10, 5), init_value=0.01, start_step=1000
    )
    rates = np.concatenate([table(schedule, 50), table(schedule, 200, first=1000)])
    assert (rates[:50] == rates[50]).all()
    u = np.arange(100)
    cosine = 0.1 + 0.45 * (1 + np.cos(np.pi * (u - 10) / 90))
    first = np.where(u < 10, 0.01 + 0.99 * (u + 1) / 10, cosine)
    np.testing.assert_allclose(rates[50:150], first, rtol=1e-5)
    u = np.arange(50)
    cosine = 0.05 + 0.225 * (1 + np.cos(np.pi * (u - 5) / 45))
    second = np.where(u < 5, 0.01 + 0.49 * (u + 1) / 5, cosine)
    np.testing.assert_allclose(rates[150:200], second, rtol=1e-5)
    np.testing.assert_allclose(rates[200:], 0.05, rtol=1e-6)


def test_rewarmed_after_a_restored_count():
    """Trained for 7 updates, saved with its count, continued with a schedule of a new phase."""
    before = optax.sgd(schedules.rewarmed_schedule(1.0, (7,), 2))
    state = before.init(jnp.zeros(()))
    for _ in range(7):
        _, state = before.update(jnp.ones(()), state)
    schedule = schedules.rewarmed_schedule(0.5, (5,), 2, start_step=7)
    after = optax.sgd(schedule)
    u, state = after.update(jnp.ones(()), state)
    assert -float(jnp.asarray(u)) == 0.25
    u, state = after.update(jnp.ones(()), state)
    assert -float(jnp.asarray(u)) == 0.5


def test_rewarmed_follows_any_schedule():
    phases = {}

    def make(phase, steps):
        phases[phase] = steps
        return optax.cosine_decay_schedule(1.0 / (phase + 1), steps)

    rates = table(schedules.rewarmed(make, [10, 20, 5], start_step=3), 40)
    assert phases == {0: 10, 1: 20, 2: 5}
    begins = [3, 13, 33]
    np.testing.assert_allclose(rates[begins], [1.0, 1 / 2, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(rates[[0, 1, 2]], 1.0)
    np.testing.assert_allclose(
        rates[13:33], table(optax.cosine_decay_schedule(0.5, 20), 20), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.1, 256, 1024, "linear"), 0.4),
        ((0.1, 1024, 256, "linear"), 0.025),
        ((0.1, 256, 1024, "sqrt"), 0.2),
        ((0.1, 256, 1024, "linear", 512), 0.2),
        ((0.1, 256, 1024, "sqrt", 512), 0.1 * 2**0.5),
        ((0.1, 2048, 1024, "linear", 512), 0.1),
        ((0.1, 256, 256, "sqrt"), 0.1),
    ],
)
def test_scale_learning_rate(arguments, expected):
    assert schedules.scale_learning_rate(*arguments) == pytest.approx(expected)


def test_scale_learning_rate_takes_schedules():
    schedule, _ = ALL["wsd"]
    scaled = schedules.scale_learning_rate(schedule, 64, 256, "sqrt")
    np.testing.assert_allclose(table(scaled, 40), 2 * table(schedule, 40), rtol=1e-6)
    assert float(schedules.scale_learning_rate(jnp.array(0.5), 1, 2, "linear")) == 1.0


def _numpy(dtype):
    return lambda step: np.asarray(step, dtype)


def _scalar(dtype):
    return lambda step: np.dtype(dtype).type(step)


def _array(dtype):
    return lambda step: jnp.asarray(step, dtype)


# How a count comes: from a loop, from an optimizer's state, from NumPy or from a checkpoint.
STEP_TYPES = {"int": int, "float": float, "float32": _array(jnp.float32)}
STEP_TYPES |= {
    f"{kind}-{dtype}": make(dtype)
    for dtype in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
    for kind, make in {"numpy": _numpy, "scalar": _scalar, "jax": _array}.items()
    if kind != "jax" or not dtype.endswith("64")  # there are none without x64
}
INTEGERS = [name for name in STEP_TYPES if not name.startswith("float")]
# What counts from a start, with steps before it, at it, in its phase and after it; all of a size
# that eight bits hold.
STEPS = (0, 5, 19, 20, 27, 28, 39, 100)
STARTS = {
    "branch": lambda start: schedules.branch_decay(schedules.wsd_schedule(0.1, 8), start, 12),
    "branch-foreign": lambda start: schedules.branch_decay(FOREIGN, start, 12),
    "rewarmed": lambda start: schedules.rewarmed_schedule(
        (0.1, 0.05), (40, 20), 4, start_step=start
    ),
    "rewarmed-foreign": lambda start: schedules.rewarmed(lambda *_: FOREIGN, (30, 20), start),
}
# Subtracts 200, which eight bits do not hold, and its start before it is reached.
FOREIGN = optax.join_schedules(
    [optax.linear_schedule(0.1, 0.0, 200), optax.linear_schedule(1.0, 0.0, 300, 10)], [24]
)
COUNTED = {
    **{name: schedule for name, (schedule, _) in ALL.items()},
    **{name: make(28) for name, make in STARTS.items()},
    "scaled": schedules.scale_learning_rate(FOREIGN, 64, 256, "sqrt"),
}


@pytest.mark.parametrize("name", COUNTED)
def test_a_step_of_any_type_has_the_value_of_int32(name):
    schedule = COUNTED[name]
    expected = [at(schedule, jnp.int32(step)) for step in STEPS]
    for kind, make in STEP_TYPES.items():
        found = [schedule(make(step)) for step in STEPS]
        assert {x.dtype for x in found} == {jnp.dtype(jnp.float32)}, kind
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9, err_msg=kind)


@pytest.mark.parametrize("name", STARTS)
def test_a_start_of_any_type_is_the_int(name):
    make = STARTS[name]
    expected = [at(make(28), jnp.uint32(step)) for step in STEPS]
    for kind in INTEGERS:
        start = STEP_TYPES[kind](28)
        found = [at(make(start), jnp.uint32(step)) for step in STEPS]
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9, err_msg=kind)
    for kind in (jnp.uint8, jnp.int32):  # a traced start
        traced = jax.jit(lambda start, step: make(start)(step))
        found = [float(traced(kind(28), jnp.uint32(step))) for step in STEPS]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)


def test_steps_and_starts_beyond_their_types():
    """Differences of narrow counts, and of those above 2**31, are those of the numbers."""
    decay = {"decay_steps": 4, "decay_shape": "linear"}
    one = optax.constant_schedule(1.0)
    far = schedules.branch_decay(one, 3_000_000_000, **decay)
    assert [at(far, jnp.uint32(3_000_000_000 + t)) for t in (-1, 0, 1, 3, 4)] == [
        1,
        1,
        0.75,
        0.25,
        0,
    ]
    assert at(far, jnp.int8(100)) == at(far, jnp.int32(2**31 - 1)) == 1
    narrow = schedules.branch_decay(one, jnp.uint8(250), **decay)
    assert [at(narrow, jnp.int8(100)), at(narrow, 252)] == [1, 0.5]
    with jax.enable_x64(True):
        wide = schedules.branch_decay(one, jnp.int64(2**40), **decay)
        assert [at(wide, jnp.uint64(2**40 + t)) for t in (-1, 1, 3)] == [1, 0.75, 0.25]
        assert at(wide, jnp.uint32(2**32 - 1)) == 1


@pytest.mark.parametrize("name", COUNTED)
def test_promotes_no_dtypes_and_no_ranks(name):
    schedule = COUNTED[name]
    expected = [at(schedule, step) for step in STEPS]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for dtype in (jnp.int32, jnp.uint8):
            found = [at(schedule, jnp.asarray(step, dtype)) for step in STEPS]
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
        if "foreign" not in name and name != "scaled":  # optax's promotes
            np.testing.assert_allclose(schedule(jnp.array(STEPS)), expected, rtol=1e-6, atol=1e-9)
