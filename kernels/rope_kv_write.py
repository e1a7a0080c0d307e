"""Turn the step's keys by rotary position embedding and write them with the values into the paged KV cache.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section
4.2.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .contract import Build, Cost, contract
from .draw import Draw
from .kv_append import append_cost, config, kv_append, refuses_append
from .rope import refuses_rope, rope, rotated


@contract(seam=True, mutates=("k_cache", "v_cache"), fake=lambda *args: None)
def rope_kv_write(
    k_TKD: Tensor, v_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_mapping_T: Tensor, interleaved: bool = False,
) -> None:  # fmt: skip
    """Store rope(k, cos, sin, interleaved) and v as `kv_append` does: one pass instead of a round trip of the keys.

    k and v are (T, K, D), cos and sin (T, R); the caches are `kv_append`'s. Moves 4·T·K·D + 2·T·R elements.
    """
    kv_append.meaning(rope.meaning(k_TKD, cos_TR, sin_TR, interleaved), v_TKD, k_cache, v_cache, slot_mapping_T)


@rope_kv_write.costs
def cost(k_TKD: Tensor, v_TKD: Tensor, cos_TR: Tensor, k_cache: Tensor, slot_mapping_T: Tensor) -> Cost:
    appended = append_cost(k_TKD, v_TKD, k_cache, slot_mapping_T)
    return Cost(bytes=appended.bytes + 2 * cos_TR.nbytes, flops=3 * k_TKD.numel())


@rope_kv_write.inputs(
    examples=(
        {"T": 1, "K": 1, "D": 16, "P": 4}, {"T": 9, "K": 3, "D": 80, "P": 8, "R": 32},
        {"T": 0, "K": 2, "D": 16, "P": 4}, {"T": 5, "K": 2, "D": 16, "P": 4, "interleaved": True},
    ),
    shapes={
        "llama-3-8b prefill": {"T": 4096, "K": 8, "D": 128, "P": 16},
        "llama-3-70b decode": {"T": 64, "K": 8, "D": 128, "P": 16},
    },
    sizes={"T": (0, 9), "K": (1, 4), "D": [16, 40, 64], "P": [4, 16], "R": [0, 8], "interleaved": [False, True]},
)  # fmt: skip
def make(draw: Draw, T: int, K: int, D: int, P: int, R: int = 0, interleaved: bool = False) -> tuple[Any, ...]:
    """`R` columns of a head turn, 0: all."""
    k_TKD, v_TKD, *rest = kv_append.drawn(draw, T=T, K=K, D=D, P=P)
    angles_TR = (draw.uniform(T, (R or D) // 2) * 6.3).repeat(1, 2)
    return k_TKD, v_TKD, angles_TR.cos().to(draw.dtype), angles_TR.sin().to(draw.dtype), *rest, interleaved


@triton.jit
def _rope_kv_write_kernel(
    k_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, k_token, k_head, v_token, v_head, cos_token,
    sin_token, k_block, k_cache_head, v_block, v_cache_head, P, D, R, INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    mask = column < tl.where(slot >= 0, D, 0)  # a slot of -1 stores nothing
    block, offset = slot // P, slot % P
    cos_at, sin_at = cos_ptr + token * cos_token, sin_ptr + token * sin_token
    k = rotated(k_ptr + token * k_token + head * k_head, cos_at, sin_at, column, mask, R, INTERLEAVED)
    v = tl.load(v_ptr + token * v_token + head * v_head + column, mask=mask)
    tl.store(k_cache_ptr + block * k_block + head * k_cache_head + offset * D + column, k, mask=mask)
    tl.store(v_cache_ptr + block * v_block + head * v_cache_head + offset * D + column, v, mask=mask)


rope_kv_write.builds(
    Build(_rope_kv_write_kernel, {"INTERLEAVED": interleaved, **config(width)}, {"slot_ptr": "*i64"})
    for width, interleaved in ((64, True), (128, False), (256, False))
)


@rope_kv_write.provider(
    "triton", devices=("cuda",), triton=True,
    refuses=(
        lambda k_TKD, v_TKD, k_cache, v_cache: refuses_append(k_TKD, v_TKD, k_cache, v_cache),
        lambda k_TKD, cos_TR, sin_TR: refuses_rope(k_TKD, cos_TR, sin_TR),
    ),
)  # fmt: skip
def rope_kv_write_triton(
    k_TKD: Tensor, v_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_mapping_T: Tensor, interleaved: bool = False,
) -> None:  # fmt: skip
    tokens, heads, width = k_TKD.shape
    if tokens:
        _rope_kv_write_kernel[(tokens, heads)](
            k_TKD, v_TKD, cos_TR, sin_TR, k_cache, v_cache, slot_mapping_T, *k_TKD.stride()[:2], *v_TKD.stride()[:2],
            cos_TR.stride(0), sin_TR.stride(0), *k_cache.stride()[:2], *v_cache.stride()[:2], k_cache.shape[2], width,
            cos_TR.shape[1], INTERLEAVED=interleaved, **config(width),
        )  # fmt: skip


@rope_kv_write.provider("composed", devices=("cpu",))
def rope_kv_write_composed(
    k_TKD: Tensor, v_TKD: Tensor, cos_TR: Tensor, sin_TR: Tensor, k_cache: Tensor, v_cache: Tensor,
    slot_mapping_T: Tensor, interleaved: bool = False,
) -> None:  # fmt: skip
    """The two ops by their own kernels."""
    kv_append(rope(k_TKD, cos_TR, sin_TR, interleaved), v_TKD, k_cache, v_cache, slot_mapping_T)
