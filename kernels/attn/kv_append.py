"""Write the step's keys and values into the paged KV cache: the one declared mutation of the graph.

Source: Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section 4.2;
float8: Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, Cost, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton
from seamwise.kernels.position.rope import rotated

from .attention import CACHES, SCALES


@contract(
    args=CACHES | SCALES | {"slot_mapping_T": "int64"}, seam=True, mutates=("k_cache", "v_cache"), reads_values=True,
    fake=lambda *args: None,
)  # fmt: skip
def kv_append(
    k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping_T: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Store row t of k and v (T, K, D) at slot_mapping[t] = block · P + offset; a slot of -1 stores nothing.

    Caches are (N blocks, K heads, P tokens a block, D). What is stored is divided by a given scale, (1,) or (K,)
    float32, and saturates in a cache of float8_e4m3fn. Moves 4·T·K·D elements. Raises ValueError for a slot beyond the
    cache; on a GPU, where none can be told, it stores nothing.
    """
    kept, block, offset = kept_slots("kv_append", slot_mapping_T, k_cache.shape[0], k_cache.shape[2])
    for x_TKD, cache, scale in ((k_TKD, k_cache, k_scale), (v_TKD, v_cache, v_scale)):
        x_TKD = x_TKD[kept]
        if scale is not None:
            x_TKD = x_TKD.to(torch.promote_types(x_TKD.dtype, torch.float32)) / scale[:, None]
        if cache.dtype == torch.float8_e4m3fn:  # stored as bytes: indexing serves no float8
            cache.view(torch.uint8)[block, :, offset] = x_TKD.clamp(-448, 448).to(cache.dtype).view(torch.uint8)
        else:
            cache[block, :, offset] = x_TKD.to(cache.dtype)


def kept_slots(op: str, slot_mapping_T: Tensor, blocks: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return which tokens are stored, and the blocks and offsets of their slots."""
    kept = slot_mapping_T >= 0
    if bool((slot_mapping_T >= blocks * block_size).any()):
        token = int((slot_mapping_T >= blocks * block_size).nonzero()[0])
        slot = int(slot_mapping_T[token])
        raise ValueError(f"{op}: slot_mapping[{token}] is {slot}, the cache has slots 0..{blocks * block_size - 1}")
    slots = slot_mapping_T[kept]
    return kept, slots // block_size, slots % block_size


@kv_append.costs
def append_cost(k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, slot_mapping_T: Tensor) -> Cost:
    moved = (k_TKD.numel() + v_TKD.numel()) * (k_TKD.element_size() + k_cache.element_size())
    return Cost(bytes=moved + slot_mapping_T.nbytes, flops=0)


@kv_append.inputs(
    examples=({"T": 1, "K": 1, "D": 16, "P": 4}, {"T": 9, "K": 3, "D": 80, "P": 8}, {"T": 0, "K": 2, "D": 16, "P": 4}),
    shapes={"llama-3-8b prefill": {"T": 4096, "K": 8, "D": 128, "P": 16}},
    sizes={"T": (0, 9), "K": (1, 4), "D": [16, 40, 64], "P": [4, 16], "fp8": ["", "", "tensor", "head"]},
)
def make(draw: Draw, T: int, K: int, D: int, P: int, fp8: str = "") -> tuple[Any, ...]:
    """`fp8` makes the caches float8, with one scale for a "tensor" or for each "head"; some values saturate."""
    k_TKD, v_TKD = (draw(T, K, D) for _ in range(2))
    blocks, slots_T = draw.slots(T, P)
    kv_dtype = torch.float8_e4m3fn if fp8 else draw.dtype
    caches = [torch.zeros(blocks, K, P, D, dtype=kv_dtype, device=draw.device) for _ in range(2)]
    scales = [draw.uniform(K if fp8 == "head" else 1) / 200 for _ in range(2)]
    return k_TKD, v_TKD, *caches, slots_T, *(scales if fp8 else ())


@triton.jit
def _kv_append_kernel(
    k_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, k_scale_ptr, v_scale_ptr, k_token, k_head,
    v_token, v_head, cos_token, sin_token, k_block, k_cache_head, v_block, v_cache_head, k_scale_step, v_scale_step,
    blocks, P, D, R, INTERLEAVED: tl.constexpr, SATURATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a head's row of a token; with cos_ptr the key is turned first, by R angles."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    mask = column < tl.where((slot >= 0) & (slot < blocks * P), D, 0)  # another slot than the cache's stores nothing
    block, offset = slot // P, slot % P
    k_at = k_ptr + token * k_token + head * k_head
    if cos_ptr is not None:
        cos_at, sin_at = cos_ptr + token * cos_token, sin_ptr + token * sin_token
        k = rotated(k_at, cos_at, sin_at, column, mask, R, INTERLEAVED)
    else:
        k = tl.load(k_at + column, mask=mask)
    v = tl.load(v_ptr + token * v_token + head * v_head + column, mask=mask)
    if k_scale_ptr is not None:
        k = tl.math.div_rn(k.to(tl.float32), tl.zeros([BLOCK], tl.float32) + tl.load(k_scale_ptr + head * k_scale_step))
    if v_scale_ptr is not None:
        v = tl.math.div_rn(v.to(tl.float32), tl.zeros([BLOCK], tl.float32) + tl.load(v_scale_ptr + head * v_scale_step))
    if SATURATE:
        k = tl.clamp(k.to(tl.float32), -448.0, 448.0, tl.PropagateNan.ALL).to(k_cache_ptr.dtype.element_ty)
        v = tl.clamp(v.to(tl.float32), -448.0, 448.0, tl.PropagateNan.ALL).to(v_cache_ptr.dtype.element_ty)
    tl.store(k_cache_ptr + block * k_block + head * k_cache_head + offset * D + column, k, mask=mask)
    tl.store(v_cache_ptr + block * v_block + head * v_cache_head + offset * D + column, v, mask=mask)


def config(D: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: a head's row is one program."""
    return {"BLOCK": triton.next_power_of_2(D), "num_warps": 1}


def append_build(width: int, *, turned: bool = False, interleaved: bool = False, float8: bool = False) -> Build:
    """Return the kernel's build with the keys turned first, or to a cache of float8."""
    scales, absent = ("k_scale_ptr", "v_scale_ptr"), () if turned else ("cos_ptr", "sin_ptr")
    types = dict.fromkeys(("k_cache_ptr", "v_cache_ptr"), "*fp8e4nv") | dict.fromkeys(scales, "*fp32") if float8 else {}
    absent = absent if float8 else (*absent, *scales)
    constants = {**config(width), **dict.fromkeys(absent), "INTERLEAVED": interleaved, "SATURATE": float8}
    return Build(_kv_append_kernel, constants, {"slot_ptr": "*i64", **types})


kv_append.builds(append_build(width, float8=float8) for width in (64, 128, 256) for float8 in (False, True))


def refuses_append(
    k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> str | None:  # fmt: skip
    """Return why the kernel cannot serve these arguments, or None. A float8 cache comes with its scales."""
    kept = k_TKD.dtype if k_scale is None or v_scale is None else torch.float8_e4m3fn
    if k_TKD.dtype != v_TKD.dtype or not (k_cache.dtype == v_cache.dtype == kept):
        got = f"{k_TKD.dtype}, {v_TKD.dtype} and caches of {k_cache.dtype}, {v_cache.dtype}"
        return f"k, v and the caches must share a dtype, or the caches be float8 with two scales, got {got}"
    return None


def launch_append(
    k_TKD: Tensor, v_TKD: Tensor, cos_TR: Tensor | None, sin_TR: Tensor | None, k_cache: Tensor, v_cache: Tensor,
    slot_mapping_T: Tensor, interleaved: bool = False, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the kernel of `kv_append`, and with cos and sin of `rope_kv_write`."""
    tokens, heads, width = k_TKD.shape
    angles = (0, 0) if cos_TR is None or sin_TR is None else (cos_TR.stride(0), sin_TR.stride(0))
    if tokens:
        _kv_append_kernel[(tokens, heads)](
            k_TKD, v_TKD, cos_TR, sin_TR, k_cache, v_cache, slot_mapping_T, k_scale, v_scale, *k_TKD.stride()[:2],
            *v_TKD.stride()[:2], *angles, *k_cache.stride()[:2], *v_cache.stride()[:2],
            *(int(s is not None and len(s) > 1) for s in (k_scale, v_scale)), k_cache.shape[0], k_cache.shape[2], width,
            0 if cos_TR is None else cos_TR.shape[1], INTERLEAVED=interleaved, SATURATE=k_scale is not None,
            **config(width),
        )  # fmt: skip


@kv_append.provider("triton", devices=("cuda",), refuses=refuses_append, triton=True)
def kv_append_triton(
    k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping_T: Tensor, *scales: Tensor | None
) -> None:
    launch_append(k_TKD, v_TKD, None, None, k_cache, v_cache, slot_mapping_T, False, *scales)
