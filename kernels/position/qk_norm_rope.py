"""RMSNorm of each query and key head and rotary position embedding of both, from the joint projection, in one pass.

Source: Qwen Team 2025, https://arxiv.org/abs/2505.09388, section 2; Gemma Team 2025, https://arxiv.org/abs/2503.19786,
section 2; `rms_norm` and `rope`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, Cost, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton
from seamwise.kernels.norm.rms_norm import inverse_rms, norm_weight, rms_norm, weighted

from .rope import config, limits_angles, rope, rotation


def _limits(qkv_TN: Tensor, q_weight_D: Tensor, cos_TR: Tensor, num_heads: int, num_kv_heads: int) -> str | None:
    D, wanted = q_weight_D.shape[0], f"{num_heads} + {num_kv_heads} heads of {q_weight_D.shape[0]}"
    if qkv_TN.shape[-1] < (num_heads + num_kv_heads) * D:
        return f"qkv has {qkv_TN.shape[-1]} columns, wanted at least {wanted}"
    return limits_angles(cos_TR, D)


def _fake(qkv_TN: Tensor, q_weight_D: Tensor, num_heads: int, num_kv_heads: int) -> tuple[Tensor, ...]:
    T, D = qkv_TN.shape[0], q_weight_D.shape[0]
    return tuple(qkv_TN.new_empty((T, heads, D)) for heads in (num_heads, num_kv_heads))


@contract(limits=_limits, fake=_fake)
def qk_norm_rope(
    qkv_TN: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, cos_TR: Tensor, sin_TR: Tensor, num_heads: int,
    num_kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (q, k): rope(rms_norm(head, weight, eps), cos, sin) of the first heads of qkv, (T, H, D) and (T, K, D).

    qkv (T, N) is [H heads of q | K heads of k | …], each of D columns; what follows, v, is the caller's to view.
    Everything rounds as the ops composed. Moves 2·T·(H + K)·D + 2·T·R elements. Raises ValueError when columns lack.
    """
    q_THD, k_TKD = _heads(qkv_TN, q_weight_D.shape[0], num_heads, num_kv_heads)
    return (
        rope.meaning(rms_norm.meaning(q_THD, q_weight_D, eps), cos_TR, sin_TR),
        rope.meaning(rms_norm.meaning(k_TKD, k_weight_D, eps), cos_TR, sin_TR),
    )


def _heads(qkv_TN: Tensor, D: int, H: int, K: int) -> tuple[Tensor, Tensor]:
    """Return the heads of q and of k as views (T, H, D) and (T, K, D)."""
    q_TN, k_TN, _ = qkv_TN.split((H * D, K * D, qkv_TN.shape[-1] - (H + K) * D), -1)
    return q_TN.unflatten(-1, (H, D)), k_TN.unflatten(-1, (K, D))


@qk_norm_rope.costs
def cost(
    qkv_TN: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, cos_TR: Tensor, sin_TR: Tensor, num_heads: int,
    num_kv_heads: int,
) -> Cost:  # fmt: skip
    elements = qkv_TN.shape[0] * (num_heads + num_kv_heads) * q_weight_D.shape[0]
    vectors = q_weight_D.nbytes + k_weight_D.nbytes + cos_TR.nbytes + sin_TR.nbytes
    return Cost(bytes=2 * elements * qkv_TN.element_size() + vectors, flops=7 * elements)


@qk_norm_rope.inputs(
    examples=(
        {"T": 1, "H": 1, "K": 1, "D": 8}, {"T": 3, "H": 5, "K": 2, "D": 80}, {"T": 0, "H": 2, "K": 1, "D": 16},
        {"T": 7, "H": 9, "K": 3, "D": 64, "R": 32}, {"T": 2, "H": 4, "K": 4, "D": 128, "wide": True},
    ),
    shapes={
        "qwen3-30b-a3b prefill": {"T": 4096, "H": 32, "K": 4, "D": 128},
        "qwen3-30b-a3b decode": {"T": 64, "H": 32, "K": 4, "D": 128},
    },
    sizes={"T": (0, 6), "H": (1, 9), "K": (1, 4), "D": [2, 16, 48, 80, 128], "R": [0, 2], "wide": [False, True]},
    rows=(0, 3, 4),
)  # fmt: skip
def make(draw: Draw, T: int, H: int, K: int, D: int, R: int = 0, wide: bool = False) -> tuple[Any, ...]:
    """`R` columns of a head turn, 0: all; `wide` makes the weights float32, as Gemma's."""
    angles_TR = draw.uniform(T, R or D) * 6.3
    return (
        draw(T, (H + 2 * K) * D), norm_weight(draw, D, wide), norm_weight(draw, D, wide),
        angles_TR.cos().to(draw.dtype), angles_TR.sin().to(draw.dtype), H, K, 1e-6,
    )  # fmt: skip


@triton.jit
def _norm_rope_heads(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, first, heads, D, R, eps, HEADS: tl.constexpr, BLOCK: tl.constexpr
):
    head = first + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    column = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    inside, turns, mine = column < D, column < R, head < heads
    partner, cos, sin = rotation(cos_ptr, sin_ptr, column, R, False)
    x = tl.load(x_ptr + head * D + column, mask=mine & inside, other=0.0)
    other = tl.load(x_ptr + head * D + partner, mask=mine & turns, other=0.0)
    scale = inverse_rms(x, D, eps)  # [HEADS, 1]
    normed = weighted(x, scale, tl.load(weight_ptr + column, mask=inside, other=0.0))
    turned = weighted(other, scale, tl.load(weight_ptr + partner, mask=turns, other=0.0))
    result = normed.to(tl.float32) * cos + turned.to(tl.float32) * sin
    tl.store(out_ptr + head * D + column, result.to(x.dtype), mask=mine & inside)


@triton.jit
def _qk_norm_rope_kernel(
    qkv_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_ptr, k_ptr, qkv_stride, cos_token, sin_token, H, K, D, R,
    eps, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * HEADS
    x_at, cos_at, sin_at = qkv_ptr + token * qkv_stride, cos_ptr + token * cos_token, sin_ptr + token * sin_token
    q_end = tl.cdiv(H, HEADS) * HEADS  # a program has heads of q only, or of k only
    if first < q_end:
        q_at = q_ptr + token * H * D
        _norm_rope_heads(x_at, q_weight_ptr, cos_at, sin_at, q_at, first, H, D, R, eps, HEADS, BLOCK)
    else:
        k_at = k_ptr + token * K * D
        _norm_rope_heads(x_at + H * D, k_weight_ptr, cos_at, sin_at, k_at, first - q_end, K, D, R, eps, HEADS, BLOCK)


qk_norm_rope.builds(
    Build(_qk_norm_rope_kernel, config(heads, width), {"eps": "fp32"}) for heads, width in ((4, 128), (8, 256), (2, 64))
)


@qk_norm_rope.provider("triton", devices=("cuda",), triton=True)
def qk_norm_rope_triton(
    qkv_TN: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, cos_TR: Tensor, sin_TR: Tensor, num_heads: int,
    num_kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tokens, width = qkv_TN.shape[0], q_weight_D.shape[0]
    q, k = (
        torch.empty((tokens, heads, width), dtype=qkv_TN.dtype, device=qkv_TN.device)
        for heads in (num_heads, num_kv_heads)
    )
    if tokens:
        chosen = config(num_kv_heads, width)
        grid = (tokens, triton.cdiv(num_heads, chosen["HEADS"]) + triton.cdiv(num_kv_heads, chosen["HEADS"]))
        _qk_norm_rope_kernel[grid](
            qkv_TN, q_weight_D, k_weight_D, cos_TR, sin_TR, q, k, qkv_TN.stride(0), cos_TR.stride(0), sin_TR.stride(0),
            num_heads, num_kv_heads, width, cos_TR.shape[1], eps, **chosen,
        )  # fmt: skip
    return q, k


@qk_norm_rope.provider("composed", devices=("cpu", "cuda"), strided=True, launches=True, composed=True)
def qk_norm_rope_composed(
    qkv_TN: Tensor, q_weight_D: Tensor, k_weight_D: Tensor, cos_TR: Tensor, sin_TR: Tensor, num_heads: int,
    num_kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The ops by their own kernels."""
    q_THD, k_TKD = (
        rms_norm(heads.reshape(-1, heads.shape[-1]), weight_D, eps).view(heads.shape)
        for heads, weight_D in zip(
            _heads(qkv_TN, q_weight_D.shape[0], num_heads, num_kv_heads), (q_weight_D, k_weight_D), strict=True
        )
    )
    return rope(q_THD, cos_TR, sin_TR), rope(k_TKD, cos_TR, sin_TR)
