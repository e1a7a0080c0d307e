"""The weighted sum of what a token's experts return, and of the shared expert's part.

Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538, equation 1; shared experts: Dai et al. 2024,
https://arxiv.org/abs/2401.06066, equation 9.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton


@contract(args={"y_SD": "T*K D", "weights_TK": "[T K] float32"}, flops=lambda y_SD: 2 * y_SD.numel())
def moe_sum(y_SD: Tensor, weights_TK: Tensor, shared_TD: Tensor | None = None) -> Tensor:
    """Return Σ_k weights[t, k] · y[t·K + k] + shared[t]: (T, D) in y's dtype, for y (T·K, D) and weights (T, K).

    Sums in float32 or wider, in the order of k and the shared part last: no atomics, so that a row's bits are its own.
    Moves T·K·D + T·D elements, and T·D more with a shared part.
    """
    wide = torch.promote_types(y_SD.dtype, torch.float32)
    y_TKD = y_SD.unflatten(0, weights_TK.shape)
    total_TD = y_TKD[:, 0].to(wide) * weights_TK[:, :1]
    for k in range(1, weights_TK.shape[1]):
        total_TD = total_TD + y_TKD[:, k].to(wide) * weights_TK[:, k : k + 1]
    return (total_TD if shared_TD is None else total_TD + shared_TD).to(y_SD.dtype)


@moe_sum.inputs(
    examples=(
        {"T": 1, "K": 2, "D": 8}, {"T": 3, "K": 8, "D": 33}, {"T": 0, "K": 2, "D": 16},
        {"T": 5, "K": 1, "D": 1100, "shared": True},
    ),
    shapes={
        "qwen3-30b-a3b prefill": {"T": 4096, "K": 8, "D": 2048},
        "deepseek-v3 decode": {"T": 64, "K": 8, "D": 7168, "shared": True},
    },
    sizes={"T": (0, 6), "K": (1, 8), "D": (1, 1100), "shared": [False, True]},
)  # fmt: skip
def make(draw: Draw, T: int, K: int, D: int, shared: bool = False) -> tuple[Any, ...]:
    return draw(T * K, D), draw.uniform(T, K), draw(T, D) if shared else None


@triton.jit
def _moe_sum_kernel(
    y_ptr, weights_ptr, shared_ptr, out_ptr, y_stride, shared_stride, D, K, SHARED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < D
    total = tl.zeros([BLOCK], tl.float32)
    for k in range(K):
        y = tl.load(y_ptr + (row * K + k) * y_stride + column, mask=inside, other=0.0).to(tl.float32)
        total += y * tl.load(weights_ptr + row * K + k)
    if SHARED:
        total += tl.load(shared_ptr + row * shared_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + column, total.to(out_ptr.dtype.element_ty), mask=inside)


def config(D: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: 1024 columns a program, 16-byte loads with 4 warps of bfloat16."""
    return {"BLOCK": min(triton.next_power_of_2(D), 1024), "num_warps": 4}


moe_sum.builds(
    Build(_moe_sum_kernel, {**config(7168), "SHARED": shared}, {"weights_ptr": "*fp32"}) for shared in (False, True)
)


@moe_sum.provider("triton", devices=("cuda",), triton=True)
def moe_sum_triton(y_SD: Tensor, weights_TK: Tensor, shared_TD: Tensor | None = None) -> Tensor:
    (rows, top_k), width = weights_TK.shape, y_SD.shape[1]
    out_TD = torch.empty(rows, width, dtype=y_SD.dtype, device=y_SD.device)
    if rows:
        chosen = config(width)
        _moe_sum_kernel[(rows, triton.cdiv(width, chosen["BLOCK"]))](
            y_SD, weights_TK, shared_TD, out_TD, y_SD.stride(0), 0 if shared_TD is None else shared_TD.stride(0), width,
            top_k, SHARED=shared_TD is not None, **chosen,
        )  # fmt: skip
    return out_TD
