"""The roofline's ceiling is the best that a machine does with numbers as wide or wider."""

from __future__ import annotations

import pytest

from seamwise.bench.timing import Ceilings


def test_a_machine_without_bfloat16_products_is_held_to_its_float32_ones() -> None:
    slow = Ceilings(copy_gb_per_s=10.0, matmul_tflop_per_s={"bfloat16": 0.00045, "float32": 0.1})
    assert slow.least_us(0, 10**9, "bfloat16") == pytest.approx(1e4)
    fast = Ceilings(copy_gb_per_s=10.0, matmul_tflop_per_s={"bfloat16": 0.4, "float32": 0.1})
    assert fast.least_us(0, 10**9, "bfloat16") == pytest.approx(2.5e3)
    assert fast.least_us(0, 10**9, "float32") == pytest.approx(1e4), "bfloat16's rate is of narrower numbers"
    assert fast.least_us(10**9, 1, "float16") == pytest.approx(1e5), "bound by memory"
