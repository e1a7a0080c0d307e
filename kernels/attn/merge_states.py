"""Merge attention over parts of the keys into attention over all of them, by the parts' log-sum-exp.

Source: Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; as an operator on attention states: Ye et al.
2025 (FlashInfer), https://arxiv.org/abs/2501.01005, section 2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton


@contract(
    args={"outs_STHD": "[S T H D] float32", "lse_STH": "[S T H] float32"}, flops=lambda outs_STHD: 2 * outs_STHD.numel()
)
def merge_states(outs_STHD: Tensor, lse_STH: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (out, lse): Σ exp(lse_s - lse) out_s, (T, H, D) in dtype, and lse = log Σ exp(lse_s), (T, H).

    outs (S, T, H, D) and natural lse (S, T, H) are float32. A part with lse -inf has seen no key and its out is not
    read; a row of such parts alone is zero. Reads S·T·H·(D + 1) elements, writes T·H·(D + 1).
    """
    lse_TH = lse_STH.logsumexp(0)
    weight_STH1 = lse_STH.softmax(0).unsqueeze(-1)
    unseen_STH1 = (lse_STH == float("-inf")).unsqueeze(-1)
    return (outs_STHD * weight_STH1).masked_fill(unseen_STH1, 0).sum(0).to(dtype), lse_TH


@merge_states.inputs(
    examples=(
        {"S": 2, "T": 1, "H": 1, "D": 16}, {"S": 1, "T": 3, "H": 2, "D": 33}, {"S": 2, "T": 0, "H": 4, "D": 8},
        {"S": 9, "T": 5, "H": 3, "D": 80},
    ),
    shapes={
        "llama-3-8b long decode": {"S": 32, "T": 1, "H": 32, "D": 128},
        "llama-3-8b prefill": {"S": 2, "T": 4096, "H": 32, "D": 128},
    },
    sizes={"S": (1, 20), "T": (0, 5), "H": (1, 4), "D": [16, 33, 128, 256]},
)  # fmt: skip
def make(draw: Draw, S: int, T: int, H: int, D: int) -> tuple[Any, ...]:
    """A third of the parts have seen no key, and their outs are NaN."""
    outs_STHD = draw.normal(S, T, H, D)
    lse_STH = 3 * draw.normal(S, T, H)
    unseen_STH = draw.uniform(S, T, H) < 1 / 3
    lse_STH = lse_STH.masked_fill(unseen_STH, float("-inf"))
    return outs_STHD.masked_fill(unseen_STH[..., None], torch.nan), lse_STH, draw.dtype


@triton.jit
def _merge_states_kernel(
    outs_ptr, lse_ptr, out_ptr, out_lse_ptr, S, rows, D, PARTS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Merge one row: the largest lse of all parts at once, then the parts in chunks, whose loads do not wait."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    part = tl.arange(0, PARTS)  # [PARTS]
    best = tl.max(tl.load(lse_ptr + part * tl.cast(rows, tl.int64) + row, mask=part < S, other=float("-inf")), 0)
    safe = tl.where(best == float("-inf"), 0.0, best)
    total, sums = 0.0, tl.zeros([BLOCK], tl.float32)
    for first in range(0, S, CHUNK):
        some = first + tl.arange(0, CHUNK)  # [CHUNK]
        at = some * tl.cast(rows, tl.int64) + row
        lse = tl.load(lse_ptr + at, mask=some < S, other=float("-inf"))
        weight = tl.exp(lse - safe)
        seen = (lse > float("-inf"))[:, None] & (column < D)[None, :]
        out = tl.load(outs_ptr + at[:, None] * D + column[None, :], mask=seen, other=0.0)  # [CHUNK, BLOCK]
        sums += tl.sum(out * weight[:, None], 0)
        total += tl.sum(weight, 0)
    result = sums / tl.where(total == 0.0, 1.0, total)
    tl.store(out_ptr + row * D + column, result.to(out_ptr.dtype.element_ty), mask=column < D)
    tl.store(out_lse_ptr + row, best + tl.log(total))


def config(S: int, D: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: one warp a row holds 8 parts of it in flight, 16 bytes a load."""
    return {
        "PARTS": max(8, triton.next_power_of_2(S)), "CHUNK": 8, "BLOCK": triton.next_power_of_2(D),
        "num_warps": 1 if D <= 128 else 2,
    }  # fmt: skip


_TYPES = dict.fromkeys(("outs_ptr", "lse_ptr", "out_lse_ptr"), "*fp32")
merge_states.builds(
    Build(_merge_states_kernel, config(parts, width), _TYPES) for parts in (8, 64) for width in (64, 128, 256, 512)
)


@merge_states.provider("triton", devices=("cuda",), triton=True)
def merge_states_triton(outs_STHD: Tensor, lse_STH: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    splits, *shape = outs_STHD.shape
    out = torch.empty(shape, dtype=dtype, device=outs_STHD.device)
    lse = torch.empty(shape[:2], dtype=torch.float32, device=outs_STHD.device)
    if rows := lse.numel():
        chosen = config(splits, shape[2])
        _merge_states_kernel[(rows,)](outs_STHD, lse_STH, out, lse, splits, rows, shape[2], **chosen)
    return out, lse
