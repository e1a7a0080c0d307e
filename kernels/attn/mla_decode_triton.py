"""The Triton kernel of multi-head latent attention, for its absorbed form over the cache and its expanded form.

A program takes a tile of one request's queries and some of their heads, and a share of the keys, with an online softmax
(Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867). Scores are the sum of two dots, because 576 columns are
no power of two. Where programs are few they split the keys, and their results merge by their log-sum-exps
(Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html). All follows from shapes alone, so a CUDA
graph stays right.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from seamwise.kernels.contract import Build
from seamwise.kernels.lazy_triton import tl, triton

from .attention_triton import find_request
from .merge_states import merge_states
from .mla_append import FLOAT8
from .mla_decode import mla_decode


@triton.jit
def mla_kernel(
    q_ptr, q_rope_ptr, k_ptr, k_rope_ptr, v_ptr, table_ptr, length_ptr, start_ptr, cache_scale_ptr, out_ptr, lse_ptr,
    requests, tokens, table_stride, q_token, q_head, q_rope_token, q_rope_head, k_block, k_token, k_head, k_rope_block,
    k_rope_token, scale, blocks, room, P, H, D: tl.constexpr, D_BLOCK: tl.constexpr, R: tl.constexpr,
    R_BLOCK: tl.constexpr, V: tl.constexpr, V_BLOCK: tl.constexpr, QUERIES: tl.constexpr, PACK: tl.constexpr,
    KEYS: tl.constexpr, EXPANDED: tl.constexpr, CONTEXT: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write out (SPLITS, T, H, V) and, where lse_ptr is given, each row's log-sum-exp (SPLITS, T, H).

    Absorbed: keys and values are the cache's rows, the same for all heads. EXPANDED: they are those of the step's own
    tokens, each head with its own (PACK is 1). CONTEXT: only what came before the step's tokens is seen.
    """
    tile, head_tile, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = find_request(start_ptr, requests, tile, QUERIES)
    first = tl.load(start_ptr + request)
    count = tl.load(start_ptr + request + 1) - first
    done = (tile - (first // QUERIES + request)) * QUERIES
    if done < count:
        context = tl.load(length_ptr + request) - count
        if EXPANDED:
            context = 0
        row = tl.arange(0, QUERIES * PACK)  # [ROWS]
        query, head = done + row // PACK, head_tile * PACK + row % PACK
        valid = (query < count) & (head < H)
        position = context + query
        token = (first + query).to(tl.int64)
        valid = valid & (token < tokens)
        column, rope_column = tl.arange(0, D_BLOCK), tl.arange(0, R_BLOCK)  # [D_BLOCK], [R_BLOCK]
        value_column = tl.arange(0, V_BLOCK)  # [V_BLOCK]
        q_at = token * q_token + head * q_head
        q = tl.load(q_ptr + q_at[:, None] + column[None, :], mask=valid[:, None] & (column < D)[None, :], other=0.0)
        q_rope_at = (token * q_rope_token + head * q_rope_head)[:, None] + rope_column[None, :]
        q_rope = tl.load(q_rope_ptr + q_rope_at, mask=valid[:, None] & (rope_column < R)[None, :], other=0.0)
        best = tl.full([QUERIES * PACK], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES * PACK], tl.float32)
        sums = tl.zeros([QUERIES * PACK, V_BLOCK], tl.float32)
        factor = tl.cast(scale, tl.float32) * 1.4426950408889634
        restore = 1.0
        if cache_scale_ptr is not None:
            restore = tl.load(cache_scale_ptr)
        last = context if CONTEXT else context + tl.minimum(done + QUERIES, count)
        share = tl.cdiv(tl.cdiv(last, SPLITS), KEYS) * KEYS
        end = tl.minimum(last, (split + 1) * share)
        if not EXPANDED:
            end = tl.minimum(end, room)
        for begin in range(split * share, end, KEYS):
            key = begin + tl.arange(0, KEYS)  # [KEYS]
            known = key < end
            if EXPANDED:
                place = (first + key).to(tl.int64)
                k_at = place * k_token + head_tile * k_head
                k_rope_at = place * k_rope_token
            else:
                table_at = tl.cast(request, tl.int64) * table_stride + key // P
                block = tl.load(table_ptr + table_at, mask=known, other=0).to(tl.int64)
                known = known & (block >= 0) & (block < blocks)  # no other memory is read, whatever the table says
                k_at = block * k_block + (key % P) * k_token
                k_rope_at = block * k_rope_block + (key % P) * k_rope_token
            k_mask = known[:, None] & (column < D)[None, :]
            k = tl.load(k_ptr + k_at[:, None] + column[None, :], mask=k_mask, other=0.0).to(q.dtype)
            k_rope_mask = known[:, None] & (rope_column < R)[None, :]
            k_rope = tl.load(k_rope_ptr + k_rope_at[:, None] + rope_column[None, :], mask=k_rope_mask, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
            scores = tl.dot(q_rope, tl.trans(k_rope.to(q.dtype)), scores, input_precision=PRECISION)
            seen = (key[None, :] <= position[:, None]) & known[None, :]
            scores = tl.where(seen, scores * (factor * restore), float("-inf"))
            now = tl.maximum(best, tl.max(scores, 1))
            safe = tl.where(now == float("-inf"), 0.0, now)
            weights = tl.exp2(scores - safe[:, None])
            fade = tl.exp2(best - safe)
            if EXPANDED:
                v_mask = known[:, None] & (value_column < V)[None, :]
                v = tl.load(v_ptr + k_at[:, None] + value_column[None, :], mask=v_mask, other=0.0)
            else:
                v = k
            sums = tl.dot(weights.to(v.dtype), v, sums * fade[:, None], input_precision=PRECISION)
            total = total * fade + tl.sum(weights, 1)
            best = now
        empty = total == 0.0
        result = sums * (restore / tl.where(empty, 1.0, total))[:, None]
        out_row = (tl.cast(split, tl.int64) * tokens + token) * H + head
        out_at = out_row[:, None] * V + value_column[None, :]
        out = result.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + out_at, out, mask=valid[:, None] & (value_column < V)[None, :])
        if lse_ptr is not None:
            lse = (best + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453  # -inf where nothing is seen
            tl.store(lse_ptr + out_row, lse, mask=valid)


def config(heads: int, tokens: int, requests: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> dict[str, int]:
    """Launch configuration. Unmeasured: the most rows that spill no registers on any of sm_80, 90 and 100.

    Of decode in 16 bits the keys have two buffers, as attention's (attention_triton.py): 94 kB for sm_90.
    """
    pack = triton.next_power_of_2(heads)
    wide = dtype == torch.float32
    # 64 rows of 512 columns spill on sm_90, and 32 do while float8 is converted
    most = 16 if wide or cache_dtype == FLOAT8 else 32
    decodes = tokens <= 2 * requests
    rows = 16 if decodes and pack <= 16 else most
    pack = min(pack, rows)
    stages = 5 if decodes and rows == 16 and not wide else 2
    return {"PACK": pack, "QUERIES": rows // pack, "KEYS": 16 if wide else 32, "num_warps": 8, "num_stages": stages}


def num_splits(programs: int, most_keys: int) -> int:
    """Return over how many programs a tile's keys are split. Unmeasured: about 256 programs fill a GPU."""
    wanted = min(256 // max(programs, 1), most_keys // 256, 32)
    return 1 << max(wanted, 1).bit_length() - 1


def widths(latent: int, rope: int, value: int) -> dict[str, int]:
    """Return the widths of both parts of a key and of a value, with the powers of two that hold them."""
    known = {"D": latent, "R": rope, "V": value}
    return known | {f"{name}_BLOCK": max(16, triton.next_power_of_2(width)) for name, width in known.items()}


TYPES = {
    **dict.fromkeys(("table_ptr", "length_ptr", "start_ptr"), "*i32"), "lse_ptr": "*fp32", "cache_scale_ptr": "*fp32",
    "scale": "fp32",
}  # fmt: skip


def widest_latent(dtype: torch.dtype, cache_dtype: torch.dtype) -> int:
    """Return the widest latent that spills no registers on any of sm_80, 90 and 100."""
    return 512 if dtype != torch.float32 else 64 if cache_dtype == FLOAT8 else 256


@mla_decode.builds
def builds(dtype: str) -> Iterator[Build]:
    element, precision = (torch.bfloat16, "tf32") if dtype == "bf16" else (torch.float32, "ieee")
    for heads, tokens, stored in ((16, 1, element), (128, 1, element), (16, 4096, element), (16, 1, FLOAT8)):
        latent, types = widest_latent(element, stored), TYPES
        constants = {
            **widths(latent, 64, latent), **config(heads, tokens, 1, element, stored), "EXPANDED": False,
            "PRECISION": precision, "SPLITS": 1,
        }  # fmt: skip
        if stored == FLOAT8:
            types = types | dict.fromkeys(("k_ptr", "k_rope_ptr", "v_ptr"), "*fp8e4nv")
        else:
            constants["cache_scale_ptr"] = None
        yield Build(mla_kernel, {**constants, "CONTEXT": True}, types)
        yield Build(mla_kernel, {**constants, "CONTEXT": False, "SPLITS": 8}, {**types, "out_ptr": "*fp32"})


def refuses_absorbed(dtype: torch.dtype, cache: Tensor, latent: int) -> str | None:
    """Return why `attend_absorbed` cannot serve queries of a dtype, or None."""
    if cache.dtype not in (dtype, FLOAT8):
        return f"the cache must have q's dtype {dtype} or float8_e4m3fn, got {cache.dtype}"
    if latent > (widest := widest_latent(dtype, cache.dtype)):
        return f"latents are {latent} wide, wanted at most {widest} for {dtype} over {cache.dtype}"
    return None


def attend_absorbed(
    q_THE: Tensor, cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor, query_starts_S: Tensor, scale: float,
    latent: int, cache_scale: Tensor | None = None, *, context: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return (out (T, H, latent), None) or, of the `context` before the step's tokens alone, (out, lse (T, H)).

    A row that sees nothing, or that no request owns, has an lse of -inf.
    """
    tokens, heads, width = q_THE.shape
    requests, columns = block_table_RB.shape
    out_THC = q_THE.new_zeros(tokens, heads, latent)  # rows that no request owns stay zero
    chosen = config(heads, tokens, requests, q_THE.dtype, cache.dtype)
    tiles, head_tiles = tokens // chosen["QUERIES"] + requests, triton.cdiv(heads, chosen["PACK"])
    working = max(requests, triton.cdiv(tokens, chosen["QUERIES"]))  # of the tiles, up to one a request find no work
    splits = num_splits(working * head_tiles, columns * cache.shape[1])
    part, lse_STH = out_THC, None
    if splits > 1:
        part = torch.empty(splits, *out_THC.shape, dtype=torch.float32, device=q_THE.device)
    if context or splits > 1:
        lse_STH = torch.full((splits, tokens, heads), float("-inf"), dtype=torch.float32, device=q_THE.device)
    if tokens and requests:
        mla_kernel[(tiles, head_tiles, splits)](
            q_THE, q_THE[..., latent:], cache, cache[..., latent:], cache, block_table_RB, seq_lens_R, query_starts_S,
            cache_scale, part, lse_STH, requests, tokens, block_table_RB.stride(0), *q_THE.stride()[:2],
            *q_THE.stride()[:2], *cache.stride()[:2], 0, *cache.stride()[:2], scale, cache.shape[0],
            columns * cache.shape[1], cache.shape[1], heads, **widths(latent, width - latent, latent), **chosen,
            EXPANDED=False, CONTEXT=context, SPLITS=splits,
            PRECISION="ieee" if q_THE.dtype == torch.float32 else "tf32",
        )  # fmt: skip
    if lse_STH is None:
        return out_THC, None
    return (out_THC, lse_STH[0]) if splits == 1 else merge_states(part, lse_STH, q_THE.dtype)


@mla_decode.provider(
    "triton",
    devices=("cuda",),
    triton=True,
    refuses=lambda q_THE, cache, latent: refuses_absorbed(q_THE.dtype, cache, latent),
)
def mla_decode_triton(
    q_THE: Tensor, cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor, query_starts_S: Tensor, scale: float,
    latent: int, cache_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out_THC, _ = attend_absorbed(q_THE, cache, block_table_RB, seq_lens_R, query_starts_S, scale, latent, cache_scale)
    return out_THC
