"""Rotary position embedding, neox halves.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; the half-split layout of GPT-NeoX and Llama checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Build, Cost, contract


@contract()
def rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Return x * cos + cat(-x[..., D/2:], x[..., :D/2]) * sin: (T, H, D) in x's dtype, float32 or wider inside.

    cos and sin are full width (T, D), one row a token, shared by the heads. Moves 2·T·H·D + 2·T·D elements.
    """
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    x, cos, sin = x_THD.to(wide), cos_TD.to(wide).unsqueeze(-2), sin_TD.to(wide).unsqueeze(-2)
    low, high = x.chunk(2, -1)
    return (x * cos + torch.cat((-high, low), -1) * sin).to(x_THD.dtype)


@rope.costs
def cost(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Cost:
    return Cost(bytes=2 * x_THD.nbytes + cos_TD.nbytes + sin_TD.nbytes, flops=3 * x_THD.numel())


@rope.inputs(
    examples=(
        {"T": 1, "H": 1, "D": 8}, {"T": 3, "H": 5, "D": 80}, {"T": 0, "H": 2, "D": 16}, {"T": 7, "H": 9, "D": 64},
    ),
    shapes={
        "llama-3-8b prefill": {"T": 4096, "H": 32, "D": 128}, "llama-3-70b decode": {"T": 64, "H": 64, "D": 128},
    },
    sizes={"T": (0, 6), "H": (1, 9), "D": [2, 16, 48, 64, 80, 128]},
    rows=(0, 1, 2),
)  # fmt: skip
def make(T: int, H: int, D: int, *, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    joined = torch.randn(T, (H + 2) * D, generator=generator, device=device).to(dtype)
    angles_TD = torch.rand(T, D, generator=generator, device=device) * 6.3
    return joined[:, : H * D].unflatten(1, (H, D)), angles_TD.cos().to(dtype), angles_TD.sin().to(dtype)


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_token, x_head, cos_token, sin_token, H, D,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None].to(tl.int64)  # [HEADS, 1]
    column = tl.arange(0, HALF)[None, :]  # [1, HALF]
    half = D // 2
    wide_mask = column < half
    mask = (head < H) & wide_mask
    x_at = x_ptr + token * x_token + head * x_head + column
    low = tl.load(x_at, mask=mask, other=0.0)
    high = tl.load(x_at + half, mask=mask, other=0.0).to(tl.float32)
    cos_at, sin_at = cos_ptr + token * cos_token + column, sin_ptr + token * sin_token + column
    cos_low = tl.load(cos_at, mask=wide_mask, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_at + half, mask=wide_mask, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_at, mask=wide_mask, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_at + half, mask=wide_mask, other=0.0).to(tl.float32)
    wide_low = low.to(tl.float32)
    out_at = out_ptr + (token * H + head) * D + column
    tl.store(out_at, (wide_low * cos_low - high * sin_low).to(low.dtype), mask=mask)
    tl.store(out_at + half, (high * cos_high + wide_low * sin_high).to(low.dtype), mask=mask)


def config(H: int, D: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: about 2048 elements a program, so that a decode step still fills a GPU."""
    half = triton.next_power_of_2(D // 2)
    return {"HALF": half, "HEADS": min(triton.next_power_of_2(H), max(1024 // half, 1)), "num_warps": 4}


@rope.builds
def builds(dtype: str) -> Iterator[Build]:
    for heads, width in ((9, 64), (32, 128), (1, 256)):
        yield Build(_rope_kernel, config(heads, width))


def _refuses(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> str | None:
    if x_THD.dim() != 3 or x_THD.stride(2) != 1 or x_THD.shape[2] % 2:
        return f"x must be (T, H, D), contiguous in an even D, got {tuple(x_THD.shape)}, strides {x_THD.stride()}"
    if cos_TD.dim() != 2 or cos_TD.shape != sin_TD.shape or cos_TD.stride(1) != 1 or sin_TD.stride(1) != 1:
        return f"cos and sin must be (T, D) contiguous in D, got {tuple(cos_TD.shape)}, {tuple(sin_TD.shape)}"
    return None


@rope.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
def rope_triton(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    tokens, heads, width = x_THD.shape
    out = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    if tokens:
        chosen = config(heads, width)
        _rope_kernel[(tokens, triton.cdiv(heads, chosen["HEADS"]))](
            x_THD, cos_TD, sin_TD, out, *x_THD.stride()[:2], cos_TD.stride(0), sin_TD.stride(0), heads, width, **chosen
        )
    return out
