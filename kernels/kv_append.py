"""Write the step's keys and values into the paged KV cache: the one declared mutation of the graph.

Source: Kwon et al. 2023, https://arxiv.org/abs/2309.06180, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .contract import Build, Cost, contract


@contract(seam=True, mutates=("k_cache", "v_cache"), fake=lambda *args: None)
def kv_append(k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping_T: Tensor) -> None:
    """Store row t of k and v (T, K, D) at slot_mapping[t] = block · P + offset; a slot of -1 stores nothing.

    Caches are (N blocks, K heads, P tokens a block, D). Moves 4·T·K·D elements.
    """
    block_size = k_cache.shape[2]
    kept = slot_mapping_T >= 0
    slots = slot_mapping_T[kept]
    block, offset = slots // block_size, slots % block_size
    k_cache[block, :, offset] = k_TKD[kept].to(k_cache.dtype)
    v_cache[block, :, offset] = v_TKD[kept].to(v_cache.dtype)


@kv_append.costs
def cost(k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping_T: Tensor) -> Cost:
    return Cost(bytes=2 * (k_TKD.nbytes + v_TKD.nbytes) + slot_mapping_T.nbytes, flops=0)


@kv_append.inputs(
    examples=({"T": 1, "K": 1, "D": 16, "P": 4}, {"T": 9, "K": 3, "D": 80, "P": 8}, {"T": 0, "K": 2, "D": 16, "P": 4}),
    shapes={"llama-3-8b prefill": {"T": 4096, "K": 8, "D": 128, "P": 16}},
    sizes={"T": (0, 9), "K": (1, 4), "D": [16, 40, 64], "P": [4, 16]},
)
def make(T: int, K: int, D: int, P: int, *, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator(device).manual_seed(seed)
    k_TKD, v_TKD = (torch.randn(T, K, D, generator=generator, device=device).to(dtype) for _ in range(2))
    blocks = -(-T // P) + 2
    caches = [torch.zeros(blocks, K, P, D, dtype=dtype, device=device) for _ in range(2)]
    slots = torch.randperm(blocks * P, generator=generator, device=device)[:T]
    slots[1::4] = -1
    return k_TKD, v_TKD, *caches, slots


@triton.jit
def _kv_append_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, slot_ptr, k_token, k_head, v_token, v_head, k_block, k_cache_head, v_block,
    v_cache_head, P, D, BLOCK: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    mask = column < tl.where(slot >= 0, D, 0)  # a slot of -1 stores nothing
    block, offset = slot // P, slot % P
    k = tl.load(k_ptr + token * k_token + head * k_head + column, mask=mask)
    v = tl.load(v_ptr + token * v_token + head * v_head + column, mask=mask)
    tl.store(k_cache_ptr + block * k_block + head * k_cache_head + offset * D + column, k, mask=mask)
    tl.store(v_cache_ptr + block * v_block + head * v_cache_head + offset * D + column, v, mask=mask)


def config(D: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: a head's row is one program."""
    return {"BLOCK": triton.next_power_of_2(D), "num_warps": 1}


@kv_append.builds
def builds(dtype: str) -> Iterator[Build]:
    for width in (64, 128, 256):
        yield Build(_kv_append_kernel, config(width), {"slot_ptr": "*i64"})


def _refuses(k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping_T: Tensor) -> str | None:
    if not (k_TKD.dtype == v_TKD.dtype == k_cache.dtype == v_cache.dtype):
        return f"k, v and the caches must share a dtype, got {k_TKD.dtype}, {v_TKD.dtype}, {k_cache.dtype}"
    if k_TKD.stride(2) != 1 or v_TKD.stride(2) != 1:
        return f"k and v must be contiguous in D, their strides are {k_TKD.stride()}, {v_TKD.stride()}"
    if k_cache.stride()[2:] != (k_cache.shape[3], 1) or v_cache.stride()[2:] != (v_cache.shape[3], 1):
        return "the caches must be contiguous in P and D"
    return None


@kv_append.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
def kv_append_triton(k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping_T: Tensor) -> None:
    tokens, heads, width = k_TKD.shape
    if tokens:
        _kv_append_kernel[(tokens, heads)](
            k_TKD, v_TKD, k_cache, v_cache, slot_mapping_T, *k_TKD.stride()[:2], *v_TKD.stride()[:2],
            *k_cache.stride()[:2], *v_cache.stride()[:2], k_cache.shape[2], width, **config(width),
        )  # fmt: skip
