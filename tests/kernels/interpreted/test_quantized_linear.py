"""Triton's quantized linear layers beyond their contracts' records: every tile size, every 4-bit weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from laws import check, check_rows, refusal

from seamwise.kernels import dequantize_weight, mxfp4_linear, scaled_linear, w4a16_linear
from seamwise.kernels.contract import Contract
from seamwise.kernels.linear.mxfp4_linear import dequantize_mxfp4

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCKS = {"x_group": 128, "rows": 128, "columns": 128}


@pytest.mark.parametrize("T", [17, 65, 257])
@pytest.mark.parametrize(
    ("contract", "sizes"),
    [
        (scaled_linear, {"N": 200, "K": 272, "rows": 1, "bias": True}), (scaled_linear, {"N": 200, "K": 272, **BLOCKS}),
        (scaled_linear, {"N": 140, "K": 272, "format": "int8", **BLOCKS}),
        (w4a16_linear, {"N": 140, "K": 200, "group": 128, "zero": True}), (mxfp4_linear, {"N": 140, "K": 160}),
        (w4a16_linear, {"N": 140, "K": 200, "group": 32, "offset": True, "format": "int8"}),
    ],
)  # fmt: skip
def test_every_tile_size(contract: Contract, sizes: dict[str, Any], T: int) -> None:
    """Tiles of up to 128 rows and columns, several of each; wider bands than there are row tiles."""
    args = contract.make_inputs({"T": T, **sizes}, dtype=torch.bfloat16, device=DEVICE, seed=T)
    check(contract, "triton", args)


@pytest.mark.parametrize("mixed", [{"x_group": 128, "rows": 1}, {"x_group": 128}, {"rows": 128, "columns": 128}])
def test_scales_of_different_grain_meet(mixed: dict[str, Any]) -> None:
    args = scaled_linear.make_inputs({"T": 5, "N": 200, "K": 300, **mixed}, dtype=torch.float32, device=DEVICE)
    check_rows(scaled_linear, "triton", args, check(scaled_linear, "triton", args), 0)


def test_every_mxfp4_weight() -> None:
    """The identity gives the weights back, exactly: all codes in both halves of a byte, by every scale of float32."""
    exponent, code = torch.arange(253, device=DEVICE)[:, None], torch.arange(32, device=DEVICE) % 16
    packed = (code | (code + exponent) % 16 << 4).to(torch.uint8)  # all 256 bytes are among them
    scale = torch.cat((exponent, 252 - exponent), 1).to(torch.uint8)
    got = mxfp4_linear.run("triton", torch.eye(64, device=DEVICE), packed, scale)
    assert torch.equal(got.T, dequantize_mxfp4(packed, scale, torch.float32))


@pytest.mark.parametrize("group", [0, 16, 32, 64, 192])
def test_every_int4_weight(group: int) -> None:
    K = 200
    _, packed, scale, zero, *_ = w4a16_linear.make_inputs(
        {"T": 1, "N": 70, "K": K, "group": group, "zero": True}, dtype=torch.bfloat16, device=DEVICE
    )
    got = w4a16_linear.run("triton", torch.eye(K, device=DEVICE, dtype=torch.bfloat16), packed, scale, zero, group)
    assert torch.equal(got.T, dequantize_weight(packed, scale, zero, "int4", 1, group, K, torch.bfloat16))


def test_groups_that_no_step_divides_are_refused() -> None:
    args = w4a16_linear.make_inputs({"T": 1, "N": 8, "K": 96, "group": 48}, dtype=torch.bfloat16, device=DEVICE)
    assert "got 48" in (refusal(w4a16_linear, "triton", args) or "")
    x, *rest = w4a16_linear.make_inputs({"T": 2, "N": 8, "K": 64}, dtype=torch.bfloat16, device=DEVICE)
    assert "contiguous" in (refusal(w4a16_linear, "triton", (x.repeat(1, 2)[:, ::2], *rest)) or "")
