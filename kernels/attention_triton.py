"""The Triton provider of attention: prefill and decode in one varlen kernel over the paged cache.

A program takes a tile of one request's queries and all query heads of one KV head (GQA packed into the rows of one
matrix), and walks the keys with an online softmax (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867;
Dao 2023, https://arxiv.org/abs/2307.08691). The grid depends on shapes alone, so a CUDA graph of it stays right:
tile i looks for its request, and leaves when there is none.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import attention
from .contract import Build


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, start_ptr, out_ptr, requests, table_stride, q_token, q_head, k_block,
    k_head, v_block, v_head, scale, P, D, H, GROUP: tl.constexpr, PACK: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, kv_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    # The last request whose first tile, starts[r] // QUERIES + r, is not behind this one.
    low, high = 0, requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(start_ptr + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    request = low
    first = tl.load(start_ptr + request)
    count = tl.load(start_ptr + request + 1) - first
    done = (tile - (first // QUERIES + request)) * QUERIES
    if done < count:
        length = tl.load(length_ptr + request)
        row = tl.arange(0, QUERIES * PACK)  # [ROWS]
        query, member = done + row // PACK, row % PACK
        valid = (query < count) & (member < GROUP)
        position = length - count + query
        column = tl.arange(0, WIDTH)  # [WIDTH]
        head = kv_head * GROUP + member
        q_at = (first + query).to(tl.int64)[:, None] * q_token + head[:, None] * q_head + column[None, :]
        q = tl.load(q_ptr + q_at, mask=valid[:, None] & (column < D)[None, :], other=0.0)  # [ROWS, WIDTH]
        best = tl.full([QUERIES * PACK], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES * PACK], tl.float32)
        sums = tl.zeros([QUERIES * PACK, WIDTH], tl.float32)
        factor = tl.cast(scale, tl.float32) * 1.4426950408889634
        last = tl.minimum(length, length - count + done + QUERIES)  # keys the tile's last query sees
        for begin in range(0, last, KEYS):
            key = begin + tl.arange(0, KEYS)  # [KEYS]
            known = key < last
            block = tl.load(table_ptr + tl.cast(request, tl.int64) * table_stride + key // P, mask=known, other=0)
            inner = (key % P).to(tl.int64) * D
            k_at = block.to(tl.int64) * k_block + kv_head * k_head + inner
            k = tl.load(k_ptr + k_at[None, :] + column[:, None], mask=known[None, :] & (column < D)[:, None], other=0.0)
            scores = tl.dot(q, k, input_precision=PRECISION) * factor  # [ROWS, KEYS]
            seen = (key[None, :] <= position[:, None]) & known[None, :]
            scores = tl.where(seen, scores, float("-inf"))
            now = tl.maximum(best, tl.max(scores, 1))
            safe = tl.where(now == float("-inf"), 0.0, now)
            weights = tl.exp2(scores - safe[:, None])
            fade = tl.exp2(best - safe)
            v_at = block.to(tl.int64) * v_block + kv_head * v_head + inner
            v = tl.load(v_ptr + v_at[:, None] + column[None, :], mask=known[:, None] & (column < D)[None, :], other=0.0)
            sums = sums * fade[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            total = total * fade + tl.sum(weights, 1)
            best = now
        result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        out_at = ((first + query).to(tl.int64)[:, None] * H + head[:, None]) * D + column[None, :]
        tl.store(out_ptr + out_at, result.to(q.dtype), mask=valid[:, None] & (column < D)[None, :])


def config(group: int, tokens: int, requests: int, width: int, itemsize: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: 16 rows where every request decodes, more for prefill, as registers allow."""
    pack = triton.next_power_of_2(group)
    block = max(16, triton.next_power_of_2(width))
    decodes, narrow = tokens <= 2 * requests, itemsize == 2
    rows = max(16 if decodes or not narrow else 64, pack)
    keys = max(16, min(64, (4096 if narrow else 2048) // block))
    return {
        "PACK": pack, "QUERIES": rows // pack, "KEYS": keys, "WIDTH": block, "num_warps": 4 if block <= 128 else 8,
        "num_stages": 2,
    }  # fmt: skip


@attention.builds
def builds(dtype: str) -> Iterator[Build]:
    integers = dict.fromkeys(("table_ptr", "length_ptr", "start_ptr"), "*i32")
    itemsize, precision = (4, "ieee") if dtype == "fp32" else (2, "tf32")
    for width in (64, 128, 256):
        for group, tokens, requests in ((1, 8, 8), (8, 8, 8), (3, 512, 2), (8, 4096, 2), (16, 4096, 2)):
            if (dtype, width) != ("fp32", 256):  # refused
                chosen = config(group, tokens, requests, width, itemsize)
                constants = {**chosen, "GROUP": group, "PRECISION": precision}
                yield Build(_attention_kernel, constants, {"scale": "fp32", **integers})


def _refuses(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor, scale: float,
) -> str | None:  # fmt: skip
    if not (q_THD.dtype == k_cache.dtype == v_cache.dtype):
        return f"q and the caches must share a dtype, got {q_THD.dtype}, {k_cache.dtype}, {v_cache.dtype}"
    if q_THD.stride(2) != 1 or q_THD.shape[1] % k_cache.shape[1]:
        return f"q must be contiguous in D and its {q_THD.shape[1]} heads a multiple of {k_cache.shape[1]} KV heads"
    if k_cache.stride()[2:] != (k_cache.shape[3], 1) or v_cache.stride()[2:] != (v_cache.shape[3], 1):
        return "the caches must be contiguous in P and D"
    widest = 128 if q_THD.dtype == torch.float32 else 256  # wider ones spill registers
    if q_THD.shape[2] > widest:
        return f"heads are {q_THD.shape[2]} wide, wanted at most {widest} for {q_THD.dtype}"
    return None


@attention.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
def attention_triton(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    tokens, heads, width = q_THD.shape
    kv_heads, requests = k_cache.shape[1], seq_lens_R.shape[0]
    out = torch.zeros(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)  # rows that no request owns stay zero
    if not tokens or not requests:
        return out
    group = heads // kv_heads
    chosen = config(group, tokens, requests, width, q_THD.element_size())
    precision = "ieee" if q_THD.dtype == torch.float32 else "tf32"  # read for float32 inputs only
    _attention_kernel[(tokens // chosen["QUERIES"] + requests, kv_heads)](
        q_THD, k_cache, v_cache, block_table_RB, seq_lens_R, query_starts_S, out, requests, block_table_RB.stride(0),
        *q_THD.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2], scale, k_cache.shape[2], width, heads,
        GROUP=group, PRECISION=precision, **chosen,
    )  # fmt: skip
    return out
