"""Bytes of device memory that one step moves, read from the program compiled for an H200."""

from __future__ import annotations

import pytest

from experiments import update_traffic
from tests.pallas_kernels.targets import needs

# 1.02 of the floor leaves room for the scalars. The partial sums of the two projections come on
# top of theirs, and one of their two passes cannot hold back what it has read: 44 and 32 at least.
LIMITS = {rule: 1.02 * floor for rule, floor in update_traffic.FLOOR.items()}
LIMITS |= {"adamp": 48, "sgdp": 36}
# The compact update of a quarter is written and read again, and the quarter of the gradient twice.
LIMITS |= {"frugal_adamw": 19.5}
# The scales need a kernel before the codes, and each of the two reads gradient and codes. With
# dynamic levels XLA also writes and reads the new moments in full precision.
LIMITS |= {"int8_linear_adamw": 23, "int8_dynamic_adamw": 33}


@pytest.mark.parametrize(
    ("chip", "rule", "limit"), [needs.on("h200", rule, limit) for rule, limit in LIMITS.items()]
)
def test_bytes_per_parameter(chip, rule, limit):
    assert update_traffic.bytes_per_parameter(rule, chip) <= limit
