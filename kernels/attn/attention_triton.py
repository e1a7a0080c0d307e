"""The Triton provider of attention: prefill and decode in one varlen kernel over the paged cache.

A program takes a tile of one request's queries and all query heads of one KV head (GQA packed into the rows of one
matrix), and walks the keys with an online softmax (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867;
Dao 2023, https://arxiv.org/abs/2307.08691). The grid depends on shapes alone, so a CUDA graph of it stays right:
tile i looks for its request, and leaves when there is none. Where the tiles are too few for the device, several
programs share the keys of one and their states are merged (Dao et al. 2023, https://pytorch.org/blog/flash-decoding/).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build
from seamwise.kernels.lazy_triton import tl, triton
from seamwise.kernels.quant.quantize import largest_magnitude

from .attention import SPLIT_UNIT, attention
from .merge_states import merge_states_triton


@triton.jit
def _tanh(x):
    """Within 4 ulp: the series below 1/4, where 1 - exp(-x) would lose digits."""
    square, shrunk = x * x, tl.exp(-2.0 * tl.abs(x))
    high = (1.0 - shrunk) / (1.0 + shrunk)
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    return tl.where(square < 0.0625, x * series, tl.where(x < 0.0, -high, high))


@triton.jit
def find_request(start_ptr, requests, tile, QUERIES: tl.constexpr):
    """Return the last request whose first tile, starts[r] // QUERIES + r, is not behind this one."""
    low, high = 0, requests
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(start_ptr + middle) // QUERIES + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def _first_seen(position, WINDOW: tl.constexpr):
    """Return the first key that the query at a position sees: of the last WINDOW, or of its chunk of -WINDOW."""
    if WINDOW < 0:
        return position // -WINDOW * -WINDOW
    return tl.maximum(position - WINDOW + 1, 0)


@triton.jit
def _attention_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, start_ptr, out_ptr, lse_ptr, sink_ptr, slope_ptr, k_scale_ptr,
    v_scale_ptr, static_ptr, group_scale_ptr, tokens, requests, table_stride, q_token, q_head, k_block, k_head, v_block,
    v_head, k_scale_step, v_scale_step, scale, blocks, room, P, D, H, GROUP: tl.constexpr, PACK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, PRECISION: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Write rows; with lse_ptr the states of a split, with static_ptr or group_scale_ptr rows quantized to float8."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    request = find_request(start_ptr, requests, tile, QUERIES)
    first = tl.load(start_ptr + request)
    stop = tl.load(start_ptr + request + 1)
    begun = first + (tile - (first // QUERIES + request)) * QUERIES
    if begun < stop:
        length = tl.load(length_ptr + request)
        row = tl.arange(0, QUERIES * PACK)  # [ROWS]
        token, member = begun + row // PACK, row % PACK
        valid = (token < tl.minimum(stop, tokens)) & (member < GROUP)
        position = length - stop + token
        column = tl.arange(0, WIDTH)  # [WIDTH]
        head = kv_head * GROUP + member
        q_at = token.to(tl.int64)[:, None] * q_token + head[:, None] * q_head + column[None, :]
        q = tl.load(q_ptr + q_at, mask=valid[:, None] & (column < D)[None, :], other=0.0)  # [ROWS, WIDTH]
        best = tl.full([QUERIES * PACK], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES * PACK], tl.float32)
        if sink_ptr is not None:  # the state that has seen the sink, in the first split
            sink = tl.load(sink_ptr + head, mask=valid & (member < tl.where(split == 0, GROUP, 0)), other=float("-inf"))
            best = sink.to(tl.float32) * 1.4426950408889634
            total = tl.where(best == float("-inf"), 0.0, 1.0)
        sums = tl.zeros([QUERIES * PACK, WIDTH], tl.float32)
        factor = tl.cast(scale, tl.float32) * (1.0 if SOFTCAP > 0 else 1.4426950408889634)
        if k_scale_ptr is not None:
            factor *= tl.load(k_scale_ptr + kv_head * k_scale_step)
        if slope_ptr is not None:
            slope = tl.load(slope_ptr + head, mask=valid, other=0.0).to(tl.float32) * 1.4426950408889634
        start, end = 0, tl.minimum(length, room)  # of the keys that the tile's queries see
        end = tl.minimum(end, length - stop + begun + QUERIES)
        if WINDOW != 0:
            seen_from = _first_seen(length - stop + begun, WINDOW)
            start = seen_from // KEYS * KEYS
        if lse_ptr is not None:  # key_ranges in attention.py
            base = 0
            if WINDOW != 0:
                base = _first_seen(length - stop + first, WINDOW) // UNIT * UNIT
            share = tl.cdiv(length - base, UNIT * tl.num_programs(2)) * UNIT
            start = tl.maximum(start, base + split * share)
            end = tl.minimum(end, base + (split + 1) * share)
        for begin in range(start, end, KEYS):
            key = begin + tl.arange(0, KEYS)  # [KEYS]
            known = key < end
            if WINDOW != 0:
                known = known & (key >= seen_from)
            block = tl.load(table_ptr + tl.cast(request, tl.int64) * table_stride + key // P, mask=known, other=0)
            known = known & (block >= 0) & (block < blocks)  # no other memory is read, whatever the table says
            inner = (key % P).to(tl.int64) * D
            k_at = block.to(tl.int64) * k_block + kv_head * k_head + inner
            k = tl.load(k_ptr + k_at[None, :] + column[:, None], mask=known[None, :] & (column < D)[:, None], other=0.0)
            scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * factor  # [ROWS, KEYS]
            if SOFTCAP > 0:
                scores = (SOFTCAP * 1.4426950408889634) * _tanh(scores * (1.0 / SOFTCAP))
            if slope_ptr is not None:
                scores += slope[:, None] * (key[None, :] - position[:, None]).to(tl.float32)
            seen = known[None, :] & (key[None, :] <= position[:, None])
            if WINDOW != 0:
                seen = seen & (key[None, :] >= _first_seen(position, WINDOW)[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            now = tl.maximum(best, tl.max(scores, 1))
            safe = tl.where(now == float("-inf"), 0.0, now)
            weights = tl.exp2(scores - safe[:, None])
            fade = tl.exp2(best - safe)
            v_at = block.to(tl.int64) * v_block + kv_head * v_head + inner
            v = tl.load(v_ptr + v_at[:, None] + column[None, :], mask=known[:, None] & (column < D)[None, :], other=0.0)
            sums = sums * fade[:, None] + tl.dot(weights.to(q.dtype), v.to(q.dtype), input_precision=PRECISION)
            total = total * fade + tl.sum(weights, 1)
            best = now
        result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
        if v_scale_ptr is not None:
            result *= tl.load(v_scale_ptr + kv_head * v_scale_step)
        out_row = token.to(tl.int64) * H + head
        if lse_ptr is not None:
            before = split * tl.cast(tokens, tl.int64) * H
            lse_ptr += before
            out_ptr += before * D
            tl.store(lse_ptr + out_row, (best + tl.log2(total)) * 0.6931471805599453, mask=valid)
        else:
            result = result.to(q.dtype)
        if group_scale_ptr is not None:  # a group is a head's row
            step = tl.math.div_rn(largest_magnitude(result.to(tl.float32)), 448.0)
            tl.store(group_scale_ptr + out_row, step, mask=valid)
        if static_ptr is not None:
            step = tl.zeros([QUERIES * PACK], tl.float32) + tl.load(static_ptr)
        if (group_scale_ptr is not None) or (static_ptr is not None):
            spread = tl.broadcast_to(step[:, None], [QUERIES * PACK, WIDTH])
            result = tl.math.div_rn(result.to(tl.float32), spread)
            result = tl.clamp(result, -448.0, 448.0, tl.PropagateNan.ALL)
        out_at = out_row[:, None] * D + column[None, :]
        tl.store(out_ptr + out_at, result.to(out_ptr.dtype.element_ty), mask=valid[:, None] & (column < D)[None, :])


def config(group: int, tokens: int, requests: int, width: int, itemsize: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: 16 rows where every request decodes, more for prefill, as registers allow.

    Decode waits for memory, so keys and values have two buffers each: Triton's pipeliner divides the stages less one
    by the levels of indirection (block table, then keys), and 2 to 4 stages give one buffer
    (https://github.com/triton-lang/triton/pull/4721); compiled for sm_90 they are 38 kB at 32 keys of 128 columns.
    """
    pack = triton.next_power_of_2(group)
    block = max(16, triton.next_power_of_2(width))
    decodes, narrow = tokens <= 2 * requests, itemsize == 2
    rows = max(16 if decodes or not narrow else 64, pack)
    keys = max(16, min(SPLIT_UNIT, (4096 if narrow else 2048) // block))
    return {
        "PACK": pack, "QUERIES": rows // pack, "KEYS": keys, "WIDTH": block, "num_warps": 4 if block <= 128 else 8,
        "num_stages": 5 if decodes and narrow else 2,
    }  # fmt: skip


FEATURES = {"sink_ptr": "*fp32", "slope_ptr": "*fp32", "k_scale_ptr": "*fp32", "v_scale_ptr": "*fp32"}
STATES = {"out_ptr": "*fp32", "lse_ptr": "*fp32"}
_OPTIONAL = (*FEATURES, "lse_ptr", "static_ptr", "group_scale_ptr")
_FLOAT8 = {"k_ptr": "*fp8e4nv", "v_ptr": "*fp8e4nv"}


def kernel_builds(
    dtype: str, types: dict[str, str], shapes: Iterable[tuple[int, int, int]], **constants: Any
) -> Iterator[Build]:
    """Yield the kernel's builds at (group, tokens, requests); `types` are those of the optional pointers in use."""
    integers = dict.fromkeys(("table_ptr", "length_ptr", "start_ptr"), "*i32")
    itemsize, precision = (4, "ieee") if dtype == "fp32" else (2, "tf32")
    for width in (64, 128, 256):
        for group, tokens, requests in shapes:
            if dtype != "fp32" or width <= (64 if "k_ptr" in types else 128):  # wider ones are refused
                chosen = {
                    **config(group, tokens, requests, width, itemsize), "GROUP": group, "PRECISION": precision,
                    "UNIT": SPLIT_UNIT, "WINDOW": 0, "SOFTCAP": 0.0, **constants,
                    **{name: None for name in _OPTIONAL if name not in types},
                }  # fmt: skip
                yield Build(_attention_kernel, chosen, {"scale": "fp32", **integers, **types})


@attention.builds
def builds(dtype: str) -> Iterator[Build]:
    yield from kernel_builds(dtype, {}, ((1, 8, 8), (8, 8, 8), (3, 512, 2), (8, 4096, 2), (16, 4096, 2)))
    everything = {"WINDOW": 128, "SOFTCAP": 50.0}
    yield from kernel_builds(dtype, FEATURES, ((8, 8, 8), (8, 4096, 2)), **everything)
    yield from kernel_builds(dtype, FEATURES | _FLOAT8, ((8, 8, 8), (8, 4096, 2)), **everything)
    yield from kernel_builds(dtype, STATES, ((1, 8, 8), (8, 8, 8), (3, 512, 2)))
    yield from kernel_builds(dtype, STATES | FEATURES, ((8, 8, 8),), **everything)


def refuses(q_THD: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    """Return why the kernel cannot serve these arguments, or None."""
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (q_THD.dtype, torch.float8_e4m3fn):
        return f"the caches must share q's dtype or be float8, got {q_THD.dtype}, {k_cache.dtype}, {v_cache.dtype}"
    widest = (64 if k_cache.dtype != q_THD.dtype else 128) if q_THD.dtype == torch.float32 else 256  # wider ones spill
    if q_THD.shape[2] > widest or q_THD.dtype.itemsize > 4:
        return f"heads are {q_THD.shape[2]} wide, wanted at most {widest} for {q_THD.dtype} over {k_cache.dtype}"
    return None


def launch(
    out: Tensor, q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor, scale: float, window: int = 0, softcap: float = 0.0, sinks_H: Tensor | None = None,
    alibi_slopes_H: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None, *,
    lse: Tensor | None = None, static: Tensor | None = None, group_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Run the kernel; rows that no request owns are left as they are. With `lse` (S, T, H), out holds S splits."""
    tokens, heads, width = q_THD.shape
    kv_heads, requests = k_cache.shape[1], seq_lens_R.shape[0]
    if not tokens or not requests:
        return
    group = heads // kv_heads
    chosen = config(group, tokens, requests, width, q_THD.element_size())
    precision = "ieee" if q_THD.dtype == torch.float32 else "tf32"  # read for float32 inputs only
    grid = (tokens // chosen["QUERIES"] + requests, kv_heads, 1 if lse is None else lse.shape[0])
    _attention_kernel[grid](
        q_THD, k_cache, v_cache, block_table_RB, seq_lens_R, query_starts_S, out, lse, sinks_H, alibi_slopes_H, k_scale,
        v_scale, static, group_scale, tokens, requests, block_table_RB.stride(0), *q_THD.stride()[:2],
        *k_cache.stride()[:2], *v_cache.stride()[:2], *(int(s is not None and len(s) > 1) for s in (k_scale, v_scale)),
        scale, k_cache.shape[0], block_table_RB.shape[1] * k_cache.shape[2], k_cache.shape[2], width, heads,
        GROUP=group, PRECISION=precision, WINDOW=window, SOFTCAP=softcap, UNIT=SPLIT_UNIT, **chosen,
    )  # fmt: skip


def num_splits(q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_RB: Tensor, *rest: Any) -> int:
    """Return over how many programs to spread the keys. Unmeasured: four for each multiprocessor, and at most 64.

    Counted are tiles that have work: of the grid's, up to one a request finds none.
    """
    tokens, heads, width = q_THD.shape
    kv_heads, requests = k_cache.shape[1], block_table_RB.shape[0]
    chosen = config(heads // kv_heads, tokens, requests, width, q_THD.element_size())
    programs = max(requests, -(-tokens // chosen["QUERIES"])) * kv_heads
    device = q_THD.device
    cores = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
    units = block_table_RB.shape[1] * k_cache.shape[2] // SPLIT_UNIT
    return min(4 * cores // max(programs, 1), units, 64)


@attention.provider("triton", devices=("cuda",), refuses=refuses, triton=True)
def attention_triton(q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_RB: Tensor, *rest: Any) -> Tensor:
    """Attend, with keys split where tiles are few: chosen here, because a compiled step is lowered for any sizes."""
    splits = num_splits(q_THD, k_cache, v_cache, block_table_RB)
    if splits < 2:
        out = torch.zeros(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)  # rows that no request owns stay zero
        launch(out, q_THD, k_cache, v_cache, block_table_RB, *rest)
        return out
    outs = torch.empty((splits, *q_THD.shape), dtype=torch.float32, device=q_THD.device)  # read where lse > -inf
    lse = torch.full(outs.shape[:3], float("-inf"), dtype=torch.float32, device=q_THD.device)
    launch(outs, q_THD, k_cache, v_cache, block_table_RB, *rest, lse=lse)
    return merge_states_triton(outs, lse, q_THD.dtype)[0]
