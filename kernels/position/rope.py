"""Rotary position embedding: of neox halves or interleaved pairs, of whole heads or their first columns.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; the half-split layout of GPT-NeoX and Llama checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton


def limits_angles(cos_TR: Tensor, D: int) -> str | None:
    """Return why cos and sin do not turn heads of D columns, or None."""
    R = cos_TR.shape[-1]
    return f"cos has {R} columns, wanted an even number up to the head's {D}" if R % 2 or R > D else None


@contract(
    args={"x_THD": "*T H D", "cos_TR": "*T R", "sin_TR": "*T R"},
    limits=lambda x_THD, cos_TR: limits_angles(cos_TR, D=x_THD.shape[-1]),
    flops=lambda x_THD, cos_TR: 3 * x_THD.shape[:-1].numel() * cos_TR.shape[-1],
    fake=lambda x_THD: x_THD.new_empty(x_THD.shape),  # the meaning on symbolic sizes is a tenth of a compilation
)
def rope(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    """Return x with its first R columns as x * cos + cat(-x[..., R/2:R], x[..., :R/2]) * sin, the rest as they are.

    x is (T, H, D); cos and sin (T, R), one row a token, shared by the heads, R even and at most D. `interleaved` turns
    the pairs of columns (2·i, 2·i + 1) by the angles i, as GPT-J's and DeepSeek's checkpoints have them; the halves of
    cos and sin must then be alike, as `rope_table` makes them. The result is in x's dtype, float32 or wider inside.
    Moves 2·T·H·D + 2·T·R elements. Raises ValueError for another R.
    """
    R = cos_TR.shape[-1]
    wide = torch.promote_types(x_THD.dtype, torch.float32)
    x, cos, sin = x_THD[..., :R].to(wide), cos_TR.to(wide).unsqueeze(-2), sin_TR.to(wide).unsqueeze(-2)
    if interleaved:
        cos, sin = (angles[..., : R // 2].repeat_interleave(2, -1) for angles in (cos, sin))
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    else:
        turned = torch.cat((-x[..., R // 2 :], x[..., : R // 2]), -1)
    return torch.cat(((x * cos + turned * sin).to(x_THD.dtype), x_THD[..., R:]), -1)


@rope.inputs(
    examples=(
        {"T": 1, "H": 1, "D": 8}, {"T": 3, "H": 5, "D": 80}, {"T": 0, "H": 2, "D": 16}, {"T": 7, "H": 9, "D": 64},
        {"T": 4, "H": 3, "D": 64, "kind": "interleaved"}, {"T": 4, "H": 3, "D": 96, "kind": "partial"},
        {"T": 2, "H": 1, "D": 20, "kind": "partial interleaved"},
    ),
    shapes={
        "llama-3-8b prefill": {"T": 4096, "H": 32, "D": 128}, "llama-3-70b decode": {"T": 64, "H": 64, "D": 128},
        "deepseek-v3 prefill": {"T": 4096, "H": 128, "D": 64, "kind": "interleaved"},
        "glm-4-9b prefill": {"T": 4096, "H": 32, "D": 128, "kind": "partial interleaved"},
    },
    sizes={
        "T": (0, 6), "H": (1, 9), "D": [2, 16, 48, 64, 80, 128],
        "kind": ["whole", "whole", "whole", "interleaved", "partial", "partial interleaved"],
    },
    rows=(0, 1, 2),
)  # fmt: skip
def make(draw: Draw, T: int, H: int, D: int, kind: str = "whole") -> tuple[Any, ...]:
    """`kind`: about half of the columns turn where it is partial; the halves of cos and sin are alike in pairs only."""
    joined = draw(T, (H + 2) * D)
    R = max(D // 4 * 2, 2) if "partial" in kind else D
    angles_TR = draw.uniform(T, R) * 6.3
    if "interleaved" in kind:
        angles_TR = angles_TR[:, : R // 2].repeat(1, 2)
    x_THD = joined[:, : H * D].unflatten(1, (H, D))
    return x_THD, angles_TR.cos().to(draw.dtype), angles_TR.sin().to(draw.dtype), "interleaved" in kind


@triton.jit
def rotation(cos_ptr, sin_ptr, column, R, INTERLEAVED: tl.constexpr):
    """Return how columns turn by a row of angles: their partners, and the float32 factors of them and of the partners.

    Columns from R on stay: their factors are 1 and 0, and their partners must not be read.
    """
    if INTERLEAVED:
        partner, angle, first = column ^ 1, column // 2, column % 2 == 0
    else:
        first = column < R // 2
        partner, angle = tl.where(first, column + R // 2, column - R // 2), column
    cos = tl.load(cos_ptr + angle, mask=column < R, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, mask=column < R, other=0.0).to(tl.float32)
    return partner, cos, tl.where(first, -sin, sin)


@triton.jit
def rotated(x_ptr, cos_ptr, sin_ptr, column, mask, R, INTERLEAVED: tl.constexpr):
    """Return the rows at x_ptr turned by a row of angles, in their dtype."""
    partner, cos, sin = rotation(cos_ptr, sin_ptr, column, R, INTERLEAVED)
    x = tl.load(x_ptr + column, mask=mask, other=0.0)
    other = tl.load(x_ptr + partner, mask=mask & (column < R), other=0.0)
    return (x.to(tl.float32) * cos + other.to(tl.float32) * sin).to(x.dtype)


@triton.jit
def _rope_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, x_token, x_head, cos_token, sin_token, H, D, R,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None].to(tl.int64)  # [HEADS, 1]
    column = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = (head < H) & (column < D)
    cos_at, sin_at = cos_ptr + token * cos_token, sin_ptr + token * sin_token
    x = rotated(x_ptr + token * x_token + head * x_head, cos_at, sin_at, column, mask, R, INTERLEAVED)
    tl.store(out_ptr + (token * H + head) * D + column, x, mask=mask)


def config(H: int, D: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: about 2048 elements a program, so that a decode step still fills a GPU."""
    block = triton.next_power_of_2(D)
    return {"BLOCK": block, "HEADS": min(triton.next_power_of_2(H), max(2048 // block, 1)), "num_warps": 4}


rope.builds(
    Build(_rope_kernel, {"INTERLEAVED": interleaved, **config(heads, width)})
    for heads, width, interleaved in ((9, 64, False), (32, 128, False), (1, 256, False), (128, 64, True))
)


def refuses_rope(x_THD: Tensor) -> str | None:
    """Return why kernels cannot turn x, or None."""
    return None if x_THD.dim() == 3 else f"x must be (T, H, D), got {tuple(x_THD.shape)}"


@rope.provider("triton", devices=("cuda",), refuses=refuses_rope, triton=True)
def rope_triton(x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor, interleaved: bool = False) -> Tensor:
    tokens, heads, width = x_THD.shape
    out = torch.empty(x_THD.shape, dtype=x_THD.dtype, device=x_THD.device)
    if tokens:
        chosen = config(heads, width)
        _rope_kernel[(tokens, triton.cdiv(heads, chosen["HEADS"]))](
            x_THD, cos_TR, sin_TR, out, *x_THD.stride()[:2], cos_TR.stride(0), sin_TR.stride(0), heads, width,
            cos_TR.shape[1], INTERLEAVED=interleaved, **chosen,
        )  # fmt: skip
    return out
