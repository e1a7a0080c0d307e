"""The laws of kernels that a GPU keeps otherwise than a CPU: sums of float8 products, whose bits are few."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import laws
import pytest
import torch
from torch import Tensor

from seamwise.kernels import scaled_linear
from seamwise.kernels.contract import CONTRACTS, Provider


def summed_in(bits: int, x_TK: Tensor, w_NK: Tensor) -> Tensor:
    """Return x wᵀ where sums of 128 columns have so many bits: 32 products at a time, cut below the last bit."""
    whole = torch.zeros(x_TK.shape[0], w_NK.shape[0], dtype=torch.float64)
    for x_block, w_block in zip(x_TK.double().split(128, 1), w_NK.double().split(128, 1), strict=True):
        total = torch.zeros_like(whole)
        for x, w in zip(x_block.split(32, 1), w_block.split(32, 1), strict=True):
            total += x @ w.T
            last = torch.exp2(total.abs().log2().floor().nan_to_num(0, 0, 0) - bits + 1)
            total = (total / last).trunc() * last
        whole += total
    return whole


def test_sums_of_14_bits_are_within_the_law_of_float8_products_and_of_10_bits_are_not() -> None:
    args = scaled_linear.make_inputs({"T": 20, "N": 140, "K": 272, "rows": 1}, dtype=torch.float32, device="cpu")
    (near,), (far,) = laws.call(scaled_linear, None, args), laws.call(scaled_linear, None, laws.widen(args))
    x, x_scale, w, w_scale, *_ = args

    def hold(bits: int, rounding: float) -> None:
        got = summed_in(bits, x, w) * x_scale.double() * w_scale.double().T
        terms = laws.magnitudes(scaled_linear, args)[0]
        laws.check_budget(
            got.float().double(), near.double(), far, torch.finfo(torch.float32).eps, lambda: terms, rounding
        )

    hold(14, laws.ROUNDINGS_OF_FLOAT8)
    hold(24, laws.ROUNDINGS)
    for bits, rounding in ((10, laws.ROUNDINGS_OF_FLOAT8), (14, laws.ROUNDINGS)):
        with pytest.raises(AssertionError):
            hold(bits, rounding)


def test_the_coarser_law_is_for_float8_on_a_gpu_alone() -> None:
    def given(dtype: torch.dtype, device: str) -> tuple[Any, ...]:
        return (SimpleNamespace(dtype=dtype, device=torch.device(device)),)

    coarse = {
        (name, dtype, device)
        for name in CONTRACTS for device in ("cpu", "cuda")
        for dtype in (torch.float8_e4m3fn, torch.int8, torch.bfloat16)
        if laws.roundings(CONTRACTS[name], given(dtype, device)) == laws.ROUNDINGS_OF_FLOAT8
    }  # fmt: skip
    assert coarse == {(name, torch.float8_e4m3fn, "cuda") for name in ("scaled_linear", "grouped_scaled_linear")}


@pytest.mark.parametrize("float8", [False, True])
def test_a_row_is_compared_at_the_same_tile_where_a_gpu_multiplies_float8(
    float8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose rows have other bits above 16 may; one whose rows depend on each other is found in any case."""

    def contract(run: Any) -> Any:
        return SimpleNamespace(
            rows=(0,), mutates=(), op=scaled_linear.op, run=lambda provider, x: run(x), why_not=lambda *args: None,
            providers=[Provider(name="kernel", call=run)],
        )  # fmt: skip

    def by_tile(x: Tensor) -> Tensor:
        return x + (1e-3 if len(x) > 16 else 0)

    monkeypatch.setattr(laws, "multiplies_float8", lambda *args: float8)
    x = torch.randn(20, 4)
    if float8:
        laws.check_rows(contract(by_tile), "kernel", (x,), [by_tile(x)], 0)
    else:
        with pytest.raises(AssertionError, match="differs from the whole"):
            laws.check_rows(contract(by_tile), "kernel", (x,), [by_tile(x)], 0)
    with pytest.raises(AssertionError, match="differs from the whole"):
        laws.check_rows(contract(lambda x: x + x.mean()), "kernel", (x,), [x + x.mean()], 0)
