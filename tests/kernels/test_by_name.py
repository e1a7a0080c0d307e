"""Costs, refusals, shapes and draws of an op are given the parameters that they name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import seamwise.kernels  # noqa: F401  (registers every contract)
from seamwise.kernels.by_name import by_name
from seamwise.kernels.contract import CONTRACTS, Cost
from seamwise.kernels.draw import Draw


def op(x: int, y: int, scale: float = 2.0, bias: int | None = None) -> None: ...


def test_a_function_gets_what_it_names_in_its_own_order() -> None:
    assert by_name(op, lambda bias, x: (bias, x))(1, 2, 3.0, 4) == (4, 1)


def test_what_a_call_leaves_out_is_the_default_of_the_op() -> None:
    def own_default(x: int, scale: float = 9.0) -> tuple[int, float]:
        return x, scale

    assert by_name(op, own_default)(1, 2) == (1, 2.0)
    with pytest.raises(TypeError, match="y"):
        by_name(op, lambda x: x)(1)


def test_keyword_only_parameters_are_the_functions_own() -> None:
    def check(y: int, *, least: int = 5) -> str | None:
        return None if y >= least else f"{y} is less than {least}"

    assert by_name(op, check)(0, 4) == "4 is less than 5"


def test_one_that_takes_everything_gets_everything() -> None:
    assert by_name(op, lambda *args: args)(1, 2) == (1, 2, 2.0, None)


def test_the_first_reason_counts_and_later_checks_do_not_run() -> None:
    def never(y: int) -> str:
        raise AssertionError("asked after a reason was found")

    assert by_name(op, lambda x: None, lambda y: f"y is {y}", never)(1, 2) == "y is 2"
    assert by_name(op)(1, 2) is None and by_name(op, lambda x: None, lambda y: None)(1, 2) is None


def test_an_unknown_name_is_an_error_at_registration() -> None:
    with pytest.raises(ValueError, match=r"refuses: op has no parameter 'weigth'; it has: x, y, scale, bias"):

        def refuses(x: int, weigth: int) -> str | None:
            return None

        by_name(op, refuses)
    with pytest.raises(ValueError, match="rms_norm has no parameter 'x'"):
        CONTRACTS["rms_norm"].provider("wrong", refuses=lambda x: None)


# What each op moves, counted by hand: arguments once, results once.
@pytest.mark.parametrize(
    ("name", "sizes", "cost"),
    [
        ("rms_norm", {"T": 3, "D": 10}, Cost(bytes=2 * (30 + 10 + 30), flops=4 * 30)),
        ("add_rms_norm", {"T": 3, "D": 10}, Cost(bytes=2 * (4 * 30 + 10), flops=5 * 30)),
        ("silu_mul", {"T": 3, "I": 10}, Cost(bytes=2 * 90, flops=3 * 60)),
        ("quantize", {"T": 3, "D": 20, "group": 8}, Cost(bytes=120 + 60 + 4 * 9, flops=180)),
        ("rms_norm_quant", {"T": 3, "D": 20}, Cost(bytes=120 + 40 + 60 + 4 * 3, flops=7 * 60)),
        ("moe_align", {"T": 6, "K": 2, "E": 5}, Cost(bytes=4 * 12 + 4 * (12 + 6), flops=0)),
        ("scaled_linear", {"T": 3, "N": 4, "K": 5, "rows": 1}, Cost(bytes=15 + 12 + 20 + 16 + 2 * 12, flops=2 * 60)),
        ("gumbel_sample", {"R": 2, "V": 9}, Cost(bytes=2 * 18 + 28 * 2, flops=40 * 18)),
        ("logprobs", {"R": 2, "V": 9, "num_top": 3}, Cost(bytes=2 * 18 + 2 * (20 + 12 * 3), flops=4 * 18)),
        ("kv_append", {"T": 5, "K": 2, "D": 8, "P": 4}, Cost(bytes=2 * 4 * 80 + 8 * 5, flops=0)),
    ],
)
def test_costs_are_those_counted_by_hand(name: str, sizes: dict[str, Any], cost: Cost) -> None:
    record = CONTRACTS[name]
    args = record.make_inputs(sizes, dtype=torch.bfloat16, device="cpu")
    assert record.cost(*args) == cost == record.cost(*args, results=record(*args))


def test_draws_follow_from_the_seed() -> None:
    a, b, c = (Draw(torch.bfloat16, "cpu", seed) for seed in (1, 1, 2))
    first, again, other = (d(3, 4) for d in (a, b, c))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.dtype == torch.bfloat16
    table_RB, seq_lens_R, query_starts_S = a.batch(3, 2, 5, 4)
    assert seq_lens_R.tolist() == [7, 8, 9] and query_starts_S.tolist() == [0, 2, 4, 6]
    assert sorted(table_RB[table_RB > 0].tolist()) == list(range(1, 8)), "every request has blocks of its own"
    blocks, slots_T = a.slots(7, 4)
    kept = slots_T[slots_T >= 0]
    assert len(kept) == len(kept.unique()) == 5 and int(kept.max()) < 4 * blocks
