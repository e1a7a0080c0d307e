"""Causal attention over a paged KV cache, for a ragged batch: prefill, chunked prefill and decode in one op.

Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; paging: Kwon et al. 2023, https://arxiv.org/abs/2309.06180.
Window: Beltagy et al. 2020, https://arxiv.org/abs/2004.05150; softcap: Gemma 2, https://arxiv.org/abs/2408.00118;
sinks: gpt-oss, https://arxiv.org/abs/2508.10925; slopes: Press et al. 2021, https://arxiv.org/abs/2108.12409.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Cost, contract
from seamwise.kernels.draw import Draw

SPLIT_UNIT = 64  # keys; the ranges that splits attend over are whole multiples of it


# What every attention over the paged cache takes: N blocks of P tokens, K heads of keys; queries start at R + 1 rows.
BATCH = {"block_table_RB": "int32", "seq_lens_R": "int32", "query_starts_S": "R+1 int32"}
CACHES = {"k_cache": "N K [P D]", "v_cache": "N K [P D]"}
SCALES = {"k_scale": "1|K float32", "v_scale": "1|K float32"}


def limits_attention(q_THD: Tensor, k_cache: Tensor, softcap: float = 0.0, splits: int = 1) -> str | None:
    """Return what is wrong with the arguments of attention that their shapes do not say, or None."""
    heads, kv_heads = q_THD.shape[1], k_cache.shape[1]
    if not kv_heads or heads % kv_heads:
        return f"q has {heads} heads, wanted a multiple of the cache's {kv_heads}"
    if softcap < 0 or splits < 1:
        return f"wanted softcap >= 0 and splits >= 1, got {softcap}, {splits}"
    return None


@contract(
    args=BATCH | CACHES | SCALES, seam=True, fake=lambda q_THD: q_THD.new_empty(q_THD.shape), reads_values=True,
    limits=lambda q_THD, k_cache, softcap: limits_attention(q_THD, k_cache, softcap),
)  # fmt: skip
def attention(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor, scale: float, window: int = 0, softcap: float = 0.0, sinks_H: Tensor | None = None,
    alibi_slopes_H: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return softmax(q kᵀ · scale, causal) v: (T, H, D) in q's dtype, float32 or wider inside.

    q (T, H, D): request r owns rows query_starts[r] : query_starts[r + 1]; its i-th of n rows sits at position
    seq_lens[r] - n + i and sees every earlier position and itself. Head h reads KV head h // (H / K). Caches are
    (N, K, P, D); block_table (R, B) int32 lists each request's blocks. Rows no request owns are zero.

    window        a query sees the last `window` positions only, its own among them; 0: all; -n: those of its chunk,
                  which begins at a multiple of n
    softcap       scores become softcap · tanh(scores / softcap); 0: they stay
    sinks         (H,) a logit that takes part in every softmax of its head, and has no value
    alibi_slopes  (H,) slope · (key's position - query's) is added to the scores
    k_scale       keys and values are the caches' times these, (1,) or (K,) float32: caches may be float8_e4m3fn
    Raises ValueError for a negative softcap.
    """
    out_STHD, _ = attend(
        q_THD, k_cache, v_cache, block_table_RB, seq_lens_R, query_starts_S, scale, window, softcap, sinks_H,
        alibi_slopes_H, k_scale, v_scale,
    )  # fmt: skip
    return out_STHD[0].to(q_THD.dtype)


def attend(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor, scale: float, window: int = 0, softcap: float = 0.0, sinks_H: Tensor | None = None,
    alibi_slopes_H: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    splits: int = 1,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return attention over each split of every request's keys, and its log-sum-exp: the meaning of all these ops."""
    kv_heads, block_size = k_cache.shape[1:3]
    wide, device = torch.promote_types(q_THD.dtype, torch.float32), q_THD.device
    out_STHD = torch.zeros((splits, *q_THD.shape), dtype=wide, device=device)
    lse_STH = torch.full((splits, *q_THD.shape[:2]), float("-inf"), dtype=wide, device=device)
    starts, lengths = query_starts_S.tolist(), seq_lens_R.tolist()
    for r, length in enumerate(lengths):
        rows, count = slice(starts[r], starts[r + 1]), starts[r + 1] - starts[r]
        if not count:
            continue
        blocks = block_table_RB[r, : (length + block_size - 1) // block_size].long()
        k_KLD, v_KLD = (c[blocks].to(wide).transpose(0, 1).flatten(1, 2)[:, :length] for c in (k_cache, v_cache))
        k_KLD = k_KLD if k_scale is None else k_KLD * k_scale[:, None, None]
        v_KLD = v_KLD if v_scale is None else v_KLD * v_scale[:, None, None]
        q_KGnD = q_THD[rows].to(wide).transpose(0, 1).unflatten(0, (kv_heads, -1))
        scores = torch.einsum("kgnd,kld->kgnl", q_KGnD, k_KLD) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        key, query = torch.arange(length, device=device), torch.arange(length - count, length, device=device)[:, None]
        away = key - query
        if alibi_slopes_H is not None:
            scores = scores + alibi_slopes_H.to(wide).view(kv_heads, -1, 1, 1) * away
        hidden = (away > 0) | (key < first_seen(query, window))
        scores = scores.masked_fill(hidden, float("-inf"))
        for s, (begin, end) in enumerate(key_ranges(length, count, window, splits)):
            logits = scores[..., begin:end]
            if s == 0 and sinks_H is not None:
                sink = sinks_H.to(wide).view(kv_heads, -1, 1, 1).expand(*scores.shape[:3], 1)
                logits = torch.cat((logits, sink), -1)
            lse_KGn = logits.logsumexp(-1)
            weights = logits.softmax(-1)[..., : end - begin].masked_fill((lse_KGn == float("-inf"))[..., None], 0)
            out_KGnD = torch.einsum("kgnl,kld->kgnd", weights, v_KLD[:, begin:end])
            out_STHD[s, rows], lse_STH[s, rows] = out_KGnD.flatten(0, 1).transpose(0, 1), lse_KGn.flatten(0, 1).T
    return out_STHD, lse_STH


def first_seen(query: Any, window: int) -> Any:
    """Return the first position that the query at one sees, of a number or a tensor; below 0 where it sees all."""
    if window > 0:
        return query - window + 1
    if window < 0:
        return query // -window * -window
    return query * 0


def key_ranges(length: int, count: int, window: int, splits: int) -> list[tuple[int, int]]:
    """Cut the keys that a request's last `count` queries see into at most `splits` ranges, in units of SPLIT_UNIT."""
    seen = max(0, first_seen(length - count, window))
    first = seen // SPLIT_UNIT * SPLIT_UNIT
    step = -(-(length - first) // (SPLIT_UNIT * splits)) * SPLIT_UNIT
    return [(max(begin, seen), min(begin + step, length)) for begin in range(first, length, step)]


@attention.costs
def attention_cost(q_THD: Tensor, k_cache: Tensor, seq_lens_R: Tensor, query_starts_S: Tensor, window: int = 0) -> Cost:
    """Return the cost; of the keys, those that some query sees are read."""
    heads, head_dim, kv_heads = q_THD.shape[1], q_THD.shape[2], k_cache.shape[1]
    queries = (query_starts_S[1:] - query_starts_S[:-1]).tolist()
    spans = [(n, s) for n, s in zip(queries, seq_lens_R.tolist(), strict=True) if n]
    read = sum(s - max(0, first_seen(s - n, window)) for n, s in spans)
    seen = sum(p + 1 - max(0, first_seen(p, window)) for n, s in spans for p in range(s - n, s))
    kv_bytes = 2 * read * kv_heads * head_dim * k_cache.element_size()
    return Cost(bytes=2 * q_THD.nbytes + kv_bytes, flops=4 * seen * heads * head_dim)


@attention.inputs(
    examples=(
        {"R": 1, "queries": 1, "context": 5, "H": 2, "K": 1, "D": 16, "P": 4},
        {"R": 3, "queries": 7, "context": 9, "H": 6, "K": 2, "D": 80, "P": 8, "window": 5, "sinks": True},
        {"R": 2, "queries": 3, "context": 130, "H": 4, "K": 2, "D": 32, "P": 8, "alibi": True, "window": 60},
        {"R": 2, "queries": 70, "context": 9, "H": 4, "K": 2, "D": 32, "P": 8, "window": -24},
        {"R": 2, "queries": 40, "context": 0, "H": 9, "K": 3, "D": 64, "P": 16, "softcap": 2.0, "fp8": "head"},
    ),
    shapes={
        "llama-3-8b decode": {"R": 64, "queries": 1, "context": 1024, "H": 32, "K": 8, "D": 128, "P": 16},
        "llama-3-8b long decode": {"R": 1, "queries": 1, "context": 32768, "H": 32, "K": 8, "D": 128, "P": 16},
        "llama-3-8b prefill": {"R": 2, "queries": 2048, "context": 0, "H": 32, "K": 8, "D": 128, "P": 16},
        "llama-3-8b float8 cache": {
            "R": 64, "queries": 1, "context": 1024, "H": 32, "K": 8, "D": 128, "P": 16, "fp8": "tensor",
        },
        "gpt-oss-20b decode": {
            "R": 64, "queries": 1, "context": 1024, "H": 64, "K": 8, "D": 64, "P": 16, "window": 128, "sinks": True,
        },
    },
    sizes={
        "R": (1, 3), "queries": (1, 9), "context": [0, 1, 20, 130, 150, 200], "H": [2, 12], "K": [1, 2],
        "D": [16, 24, 64], "P": [4, 16], "window": [0, 1, 7, 90, -1, -8, -50], "softcap": [0.0, 0.0, 2.0],
        "sinks": [False, True], "alibi": [False, False, False, True], "fp8": ["", "", "", "tensor", "head"],
    },
)  # fmt: skip
def make(
    draw: Draw, R: int, queries: int, context: int, H: int, K: int, D: int, P: int, window: int = 0,
    softcap: float = 0.0, sinks: bool = False, alibi: bool = False, fp8: str = "",
) -> tuple[Any, ...]:  # fmt: skip
    """`fp8` makes the caches float8, with one scale for a "tensor" or for each KV "head"."""
    table_RB, *batch = draw.batch(R, queries, context, P)
    kv_dtype = torch.float8_e4m3fn if fp8 else draw.dtype
    caches = [draw.normal(int(table_RB.max()) + 1, K, P, D).to(kv_dtype) for _ in range(2)]
    scales = [draw.uniform(K if fp8 == "head" else 1) + 0.5 if fp8 else None for _ in range(2)]
    return (
        draw(R * queries, H, D), *caches, table_RB, *batch, D**-0.5, window, softcap, draw(H) if sinks else None,
        draw.normal(H) / 10 if alibi else None, *scales,
    )  # fmt: skip
