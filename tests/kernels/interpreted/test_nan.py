"""NaN stays NaN where a kernel quantizes, and memory outside of what an index may name is neither read nor written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import seamwise.kernels as k
from seamwise.kernels.contract import Contract

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FLOAT8 = torch.float8_e4m3fn
SCHEMES = [(FLOAT8, 0, None), (FLOAT8, 16, None), (FLOAT8, 0, 0.01), (torch.int8, 0, None), (torch.int8, 0, 0.01)]


def both(contract: Contract, *args: Any) -> list[tuple[Any, ...]]:
    """Return the results of the meaning and of the Triton kernel."""
    return [
        contract.run(name, *(a.clone() if isinstance(a, Tensor) else a for a in args)) for name in ("torch", "triton")
    ]


def rows(count: int = 4, width: int = 32) -> Tensor:
    """Draw rows of which the second has a NaN, and the third an infinity."""
    x = torch.randn(count, width, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    return x


QUANTIZED: dict[str, Any] = {
    "quantize": lambda x, *scheme: (k.quantize, x, *scheme),
    "rms_norm_quant": lambda x, *scheme: (k.rms_norm_quant, x, x.new_ones(32), 1e-5, *scheme),
    "add_rms_norm_quant": lambda x, *scheme: (k.add_rms_norm_quant, x, x * 0.5, x.new_ones(32), 1e-5, *scheme),
    "silu_mul_quant": lambda x, *scheme: (k.silu_mul_quant, torch.cat((x, x), -1), *scheme),
    "allreduce_rms_norm_quant":
        lambda x, *scheme: (k.allreduce_rms_norm_quant, x, None, x.new_ones(32), 1e-5, "", *scheme),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "group", "static"), SCHEMES)
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_nan_stays_in_its_group(name: str, dtype: torch.dtype, group: int, static: float | None) -> None:
    scale = None if static is None else torch.full((1,), static, device=DEVICE)
    record, *args = QUANTIZED[name](rows(), dtype, group, scale)
    meant, made = (
        (q.float().unflatten(1, (s.shape[1], -1)) * s[..., None]).flatten(1) for q, s, *_ in both(record, *args)
    )
    assert meant.isnan()[1].any() and not meant.isnan()[0].any()
    assert torch.equal(meant.isnan(), made.isnan())


def test_moe_route_quant_and_attention_keep_nan() -> None:
    logits, caches = torch.randn(4, 8, device=DEVICE), torch.randn(2, 2, 1, 4, 32, device=DEVICE)
    meant, made = both(k.moe_route_quant, rows(), logits, FLOAT8, 0, 2, "softmax")
    assert meant[2].float().isnan()[1].all() and torch.equal(meant[2].float().isnan(), made[2].float().isnan())
    table = torch.tensor([[0, 1]], dtype=torch.int32, device=DEVICE)
    batch = table, torch.tensor([6], device=DEVICE).int(), torch.tensor([0, 4], device=DEVICE).int()
    q = rows()[:, None]
    q[2] = 0
    for group, out_scale in ((32, None), (0, torch.ones(1, device=DEVICE))):
        args = (q, *caches, *batch, 0.2, 0, 0.0, None, None, None, None, FLOAT8, group, out_scale)
        (_, _), (made_q, made_scale) = both(k.attention_quant, *args)
        assert made_q.float().isnan()[1].all() and not made_q.float().isnan()[0].any()
        assert made_scale.isnan()[1].all() == (out_scale is None)


@pytest.mark.parametrize("float8", [False, True])
def test_caches_keep_nan(float8: bool) -> None:
    latent, scale = rows(), torch.full((1,), 0.5, device=DEVICE) if float8 else None
    dtype, slots = FLOAT8 if float8 else torch.float32, torch.tensor([0, 2, 5, 7], device=DEVICE)
    caches = [torch.zeros(2, 4, 48, device=DEVICE).to(dtype) for _ in range(2)]
    for provider, cache in zip(("torch", "triton"), caches, strict=True):
        k.mla_append.run(provider, latent, latent[:, :16].contiguous(), cache, slots, scale)
    assert caches[0].float().isnan().any() and torch.equal(caches[0].float().isnan(), caches[1].float().isnan())
    torch.testing.assert_close(caches[0].float(), caches[1].float(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("zero", [False, True])
def test_a_scale_of_255_is_nan(zero: bool) -> None:
    x, packed = (
        torch.ones(3, 64, device=DEVICE),
        torch.full((2, 5, 32), 0 if zero else 0x21, dtype=torch.uint8, device=DEVICE),
    )
    scale = torch.full((2, 5, 2), 127, dtype=torch.uint8, device=DEVICE)
    scale[:, 2, 1] = 255
    order, starts = torch.arange(3, device=DEVICE).int(), torch.tensor([0, 1, 3], device=DEVICE).int()
    for results in (
        both(k.mxfp4_linear, x, packed[0], scale[0]),
        both(k.grouped_mxfp4_linear, x, packed, scale, order, starts, 1),
    ):
        for out in results:
            assert out[:, 2].isnan().all() and not out[:, [0, 1, 3, 4]].isnan().any()


def test_nothing_outside_of_the_caches_is_written() -> None:
    memory = torch.zeros(3, 4, 2, 4, 16, device=DEVICE)  # the caches are the middle of it
    heads, slots = torch.ones(3, 2, 16, device=DEVICE), torch.tensor([5, 16, 10**6], device=DEVICE)
    k.kv_append.run("triton", heads, heads, memory[1], memory[1], slots)
    assert memory[1].sum() == 2 * 16 and memory.sum() == 2 * 16
    angles = torch.ones(3, 16, device=DEVICE)
    k.rope_kv_write.run("triton", heads, heads, angles, angles * 0, memory[1], memory[1], slots)
    assert memory.sum() == memory[1].sum() == 2 * 16
    latent = torch.zeros(3, 4, 4, 32, device=DEVICE)
    k.mla_append.run("triton", *[torch.ones(3, 16, device=DEVICE)] * 2, latent[1], slots)
    assert latent.sum() == latent[1].sum() == 32
    logits = torch.zeros(2, 8, device=DEVICE)
    edits = torch.tensor([3, 9, -4], device=DEVICE), torch.full((3,), -1, device=DEVICE), torch.ones(3, device=DEVICE)
    starts = torch.tensor([0, 3, 3], device=DEVICE)
    out = k.penalize.run("triton", logits, *edits, starts, torch.tensor([[1.0, 0, 0]] * 2, device=DEVICE), None)
    assert out[0, 3] == 1 and out.sum() == 1


def test_nothing_outside_of_tables_and_caches_is_read() -> None:
    memory = torch.full((3, 2, 1, 4, 16), torch.nan, device=DEVICE)
    memory[1, 0], memory[1, 1] = 1.0, 5.0
    table = torch.tensor([[0, 7, -3, 1]], dtype=torch.int32, device=DEVICE)[:, :3]  # the last is another's
    batch = table, torch.tensor([16], device=DEVICE).int(), torch.tensor([0, 2], device=DEVICE).int()
    q = torch.ones(2, 1, 16, device=DEVICE)
    assert torch.equal(k.attention.run("triton", q, memory[1], memory[1], *batch, 1.0), torch.ones_like(q))
    cache = memory[1][:, 0]
    assert torch.equal(k.mla_decode.run("triton", q, cache, *batch, 1.0, 8), torch.ones(2, 1, 8, device=DEVICE))
    index = torch.tensor([1, 4, -1], device=DEVICE)
    rows = k.gather_rows.run("triton", memory.flatten(0, 3)[8:10], index)
    assert torch.equal(rows, torch.tensor([[1.0], [0], [0]], device=DEVICE).expand(3, 16))
