"""Write the step's latents and their rotary keys into the paged cache of multi-head latent attention.

Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1: one latent row a token, shared by all heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, Cost, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton

from .kv_append import kept_slots

FLOAT8 = torch.float8_e4m3fn


@contract(
    args={"cache": "N P C+R", "slot_mapping_T": "int64", "cache_scale": "1 float32"}, seam=True, mutates=("cache",),
    fake=lambda *args: None, reads_values=True,
)  # fmt: skip
def mla_append(
    latent_TC: Tensor, rope_TR: Tensor, cache: Tensor, slot_mapping_T: Tensor, cache_scale: Tensor | None = None
) -> None:
    """Store row t of [latent, rope], C + R wide, at slot_mapping[t] = block · P + offset; a slot of -1 stores nothing.

    The cache is (N blocks, P tokens a block, C + R). With `cache_scale`, (1,) float32, it holds rows / scale, which
    saturate where it is float8_e4m3fn. Moves 2·T·(C + R) elements. Slots beyond the cache are as in `kv_append`.
    """
    kept, block, offset = kept_slots("mla_append", slot_mapping_T, *cache.shape[:2])
    rows_TE = torch.cat((latent_TC[kept], rope_TR[kept]), -1)
    if cache_scale is not None:
        rows_TE = rows_TE.to(torch.promote_types(rows_TE.dtype, torch.float32)) / cache_scale
    if cache.dtype == FLOAT8:
        limit = torch.finfo(FLOAT8).max
        rows_TE = rows_TE.clamp(-limit, limit)
    cache[block, offset] = rows_TE.to(cache.dtype)


@mla_append.costs
def cost(latent_TC: Tensor, rope_TR: Tensor, cache: Tensor, slot_mapping_T: Tensor) -> Cost:
    written = (latent_TC.numel() + rope_TR.numel()) * cache.element_size()
    return Cost(bytes=latent_TC.nbytes + rope_TR.nbytes + written + slot_mapping_T.nbytes, flops=0)


@mla_append.inputs(
    examples=(
        {"T": 1, "C": 32, "R": 16, "P": 4}, {"T": 9, "C": 512, "R": 64, "P": 8},
        {"T": 5, "C": 64, "R": 16, "P": 4, "float8": True},
    ),
    shapes={"deepseek-v3 prefill": {"T": 4096, "C": 512, "R": 64, "P": 64}},
    sizes={"T": (0, 9), "C": [32, 48, 512], "R": [8, 64], "P": [4, 16], "float8": [False, True]},
)  # fmt: skip
def make(draw: Draw, T: int, C: int, R: int, P: int, float8: bool = False) -> tuple[Any, ...]:
    rows_TE = draw(T, C + R)
    blocks, slots_T = draw.slots(T, P)
    cache = torch.zeros(blocks, P, C + R, dtype=FLOAT8 if float8 else draw.dtype, device=draw.device)
    scale = torch.full((1,), 2**-7, device=draw.device) if float8 else None
    return rows_TE[:, :C], rows_TE[:, C:].clone(), cache, slots_T, scale


@triton.jit
def _mla_append_kernel(
    latent_ptr, rope_ptr, cache_ptr, slot_ptr, scale_ptr, latent_stride, rope_stride, cache_block, cache_stride, blocks,
    P, C, R, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    kept = column < tl.where((slot >= 0) & (slot < blocks * P), C + R, 0)  # other slots store nothing
    latent = tl.load(latent_ptr + token * latent_stride + column, mask=kept & (column < C), other=0.0)
    rope = tl.load(rope_ptr + token * rope_stride + column - C, mask=kept & (column >= C), other=0.0)
    row = tl.where(column < C, latent, rope).to(tl.float32)
    if scale_ptr is not None:
        row = tl.math.div_rn(row, tl.zeros([BLOCK], tl.float32) + tl.load(scale_ptr))
    if LIMIT > 0.0:
        row = tl.clamp(row, -LIMIT, LIMIT, tl.PropagateNan.ALL)
    at = (slot // P) * cache_block + (slot % P) * cache_stride + column
    tl.store(cache_ptr + at, row.to(cache_ptr.dtype.element_ty), mask=kept)


def config(width: int, cache_dtype: torch.dtype) -> dict[str, object]:
    """Launch configuration. Unmeasured: a row is one program of 4 warps."""
    limit = torch.finfo(FLOAT8).max if cache_dtype == FLOAT8 else 0.0
    return {"BLOCK": triton.next_power_of_2(width), "LIMIT": limit, "num_warps": 4}


mla_append.builds(
    Build(_mla_append_kernel, constants, {"slot_ptr": "*i64", **types})
    for constants, types in (
        ({**config(576, torch.bfloat16), "scale_ptr": None}, {}),
        (config(576, FLOAT8), {"scale_ptr": "*fp32", "cache_ptr": "*fp8e4nv"}),
    )
)


def _refuses(latent_TC: Tensor, rope_TR: Tensor, cache: Tensor) -> str | None:
    if latent_TC.dtype != rope_TR.dtype or cache.dtype not in (latent_TC.dtype, FLOAT8):
        return (
            "latent and rope must share a dtype, and the cache have it or float8_e4m3fn, "
            f"got {latent_TC.dtype}, {rope_TR.dtype}, {cache.dtype}"
        )
    return None


@mla_append.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
def mla_append_triton(
    latent_TC: Tensor, rope_TR: Tensor, cache: Tensor, slot_mapping_T: Tensor, cache_scale: Tensor | None = None
) -> None:
    if tokens := latent_TC.shape[0]:
        _mla_append_kernel[(tokens,)](
            latent_TC, rope_TR, cache, slot_mapping_T, cache_scale, latent_TC.stride(0), rope_TR.stride(0),
            *cache.stride()[:2], *cache.shape[:2], latent_TC.shape[1], rope_TR.shape[1],
            **config(cache.shape[2], cache.dtype),
        )  # fmt: skip
