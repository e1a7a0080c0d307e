"""Causal attention over a paged KV cache, for a ragged batch: prefill, chunked prefill and decode in one op.

Source: Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; paging: Kwon et al. 2023, https://arxiv.org/abs/2309.06180.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .contract import Cost, contract


@contract(seam=True, fake=lambda q_THD, *args: torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device))
def attention(
    q_THD: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table_RB: Tensor,
    seq_lens_R: Tensor,
    query_starts_S: Tensor,
    scale: float,
) -> Tensor:
    """Return softmax(q kᵀ · scale, causal) v: (T, H, D) in q's dtype, float32 or wider inside.

    q (T, H, D): request r owns rows query_starts[r] : query_starts[r + 1]; its i-th of n rows sits at position
    seq_lens[r] - n + i and sees every earlier position and itself. Head h reads KV head h // (H / K). Caches are
    (N, K, P, D); block_table (R, B) int32 lists each request's blocks. Rows no request owns are zero.
    """
    heads, kv_heads, block_size = q_THD.shape[1], k_cache.shape[1], k_cache.shape[2]
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    out_THD = torch.zeros(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    starts, lengths = query_starts_S.tolist(), seq_lens_R.tolist()
    for r, length in enumerate(lengths):
        first, last = starts[r], starts[r + 1]
        if first == last:
            continue
        blocks = block_table_RB[r, : (length + block_size - 1) // block_size].long()
        k_KLD, v_KLD = (c[blocks].transpose(0, 1).flatten(1, 2)[:, :length].to(wide) for c in (k_cache, v_cache))
        q_KGnD = q_THD[first:last].to(wide).transpose(0, 1).unflatten(0, (kv_heads, heads // kv_heads))
        scores = torch.einsum("kgnd,kld->kgnl", q_KGnD, k_KLD) * scale
        position = torch.arange(length - (last - first), length, device=q_THD.device)
        hidden = torch.arange(length, device=q_THD.device) > position[:, None]
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out_THD[first:last] = (
            torch.einsum("kgnl,kld->kgnd", weights, v_KLD).flatten(0, 1).transpose(0, 1).to(q_THD.dtype)
        )
    return out_THD


@attention.costs
def cost(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor, scale: float,
) -> Cost:  # fmt: skip
    heads, head_dim, kv_heads = q_THD.shape[1], q_THD.shape[2], k_cache.shape[1]
    queries = (query_starts_S[1:] - query_starts_S[:-1]).tolist()
    lengths = [s if n else 0 for s, n in zip(seq_lens_R.tolist(), queries, strict=True)]
    kv_bytes = 2 * sum(lengths) * kv_heads * head_dim * k_cache.element_size()
    seen = sum(n * s - n * (n - 1) // 2 for n, s in zip(queries, lengths, strict=True))
    return Cost(bytes=2 * q_THD.nbytes + kv_bytes, flops=4 * seen * heads * head_dim)


@attention.inputs(
    examples=(
        {"R": 1, "queries": 1, "context": 5, "H": 2, "K": 1, "D": 16, "P": 4},
        {"R": 3, "queries": 7, "context": 9, "H": 6, "K": 2, "D": 80, "P": 8},
        {"R": 2, "queries": 40, "context": 0, "H": 9, "K": 3, "D": 64, "P": 16},
    ),
    shapes={
        "llama-3-8b decode": {"R": 64, "queries": 1, "context": 1024, "H": 32, "K": 8, "D": 128, "P": 16},
        "llama-3-8b prefill": {"R": 2, "queries": 2048, "context": 0, "H": 32, "K": 8, "D": 128, "P": 16},
    },
    sizes={
        "R": (1, 3), "queries": (1, 9), "context": (0, 20), "H": [6, 12], "K": [1, 2, 6], "D": [16, 24, 64], "P": [4, 16],
    },
)
def make(
    R: int, queries: int, context: int, H: int, K: int, D: int, P: int, *, dtype: torch.dtype, device: str, seed: int
) -> tuple[Any, ...]:
    """Requests of context, context + 1, … tokens before their queries, over shuffled blocks."""
    generator = torch.Generator(device).manual_seed(seed)
    lengths = [context + r + queries for r in range(R)]
    counts = [-(-n // P) for n in lengths]
    order = torch.randperm(sum(counts), generator=generator, device=device).to(torch.int32) + 1
    table = torch.zeros(R, max(counts), dtype=torch.int32, device=device)
    for r, blocks in enumerate(order.split(counts)):
        table[r, : counts[r]] = blocks
    q_THD = torch.randn(R * queries, H, D, generator=generator, device=device).to(dtype)
    caches = [torch.randn(sum(counts) + 1, K, P, D, generator=generator, device=device).to(dtype) for _ in range(2)]
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    starts = torch.arange(0, (R + 1) * queries, queries, dtype=torch.int32, device=device)
    return q_THD, *caches, table, seq_lens, starts, D**-0.5
