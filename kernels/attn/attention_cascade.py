"""Attention over a prefix that all requests share, and over what each has of its own: the prefix is read once.

Source: Juravsky et al. 2024 (Hydragen), https://arxiv.org/abs/2402.05099; as cascades: Ye et al. 2025 (FlashInfer),
https://arxiv.org/abs/2501.01005, section 3.1.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Cost, contract
from seamwise.kernels.draw import Draw

from .attention import BATCH, CACHES, SCALES, attention, attention_cost, limits_attention
from .attention_triton import STATES, kernel_builds, launch, refuses
from .merge_states import merge_states_triton


@contract(
    args={**BATCH, **CACHES, **SCALES, "prefix_N": "F int32"}, seam=True, reads_values=True,
    limits=lambda q_THD, k_cache, softcap: limits_attention(q_THD, k_cache, softcap),
    fake=lambda q_THD: q_THD.new_empty(q_THD.shape),
)  # fmt: skip
def attention_cascade(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, prefix_N: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor, scale: float, softcap: float = 0.0, sinks_H: Tensor | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return attention where every request's keys begin with the blocks prefix (N,) int32, all of them full.

    block_table lists the blocks that follow; seq_lens counts the tokens in both, and queries lie behind the prefix.
    Otherwise arguments and result are attention's. It has no window and no slopes: with a window, a prefix is seldom
    seen by all.
    """
    table_RB = torch.cat((prefix_N.expand(len(block_table_RB), -1), block_table_RB), 1)
    return attention.meaning(
        q_THD, k_cache, v_cache, table_RB, seq_lens_R, query_starts_S, scale, 0, softcap, sinks_H, None, k_scale,
        v_scale,
    )  # fmt: skip


@attention_cascade.costs
def cost(q_THD: Tensor, k_cache: Tensor, prefix_N: Tensor, seq_lens_R: Tensor, query_starts_S: Tensor) -> Cost:
    whole = attention_cost(q_THD, k_cache, seq_lens_R, query_starts_S)
    requests = int((query_starts_S[1:] > query_starts_S[:-1]).sum())
    shared = (requests - 1) * len(prefix_N) * 2 * k_cache[0].nbytes if requests else 0
    return Cost(bytes=whole.bytes - shared, flops=whole.flops)


@attention_cascade.inputs(
    examples=(
        {"R": 1, "queries": 1, "context": 9, "H": 2, "K": 1, "D": 16, "P": 4, "prefix": 1},
        {"R": 3, "queries": 2, "context": 40, "H": 6, "K": 2, "D": 80, "P": 8, "prefix": 5, "sinks": True},
        {"R": 2, "queries": 5, "context": 16, "H": 4, "K": 2, "D": 32, "P": 16, "prefix": 0, "softcap": 2.0},
    ),
    shapes={
        "llama-3-8b 64 requests, 4096 shared": {
            "R": 64, "queries": 1, "context": 4352, "H": 32, "K": 8, "D": 128, "P": 16, "prefix": 256,
        },
    },
    sizes={
        **{name: choice for name, choice in attention.sizes.items() if name not in ("window", "alibi")},
        "queries": (1, 4), "context": [48, 60], "prefix": (0, 3),
    },
)  # fmt: skip
def make(draw: Draw, prefix: int, **sizes: Any) -> tuple[Any, ...]:
    """attention's requests, whose first `prefix` blocks are the first request's."""
    q_THD, *caches, table, seq_lens, starts, scale, _, softcap, sinks_H, _, k_scale, v_scale = attention.drawn(
        draw, **sizes
    )
    shared = table[0, :prefix].clone()
    return (
        q_THD, *caches, shared, table[:, prefix:].contiguous(), seq_lens, starts, scale, softcap, sinks_H, k_scale,
        v_scale,
    )  # fmt: skip


attention_cascade.builds(
    lambda dtype: kernel_builds(dtype, STATES, ((1, 64, 1), (8, 64, 1), (8, 4096, 1)), CAUSAL=False)
)


@attention_cascade.provider("triton", devices=("cuda",), refuses=refuses, triton=True)
def attention_cascade_triton(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, prefix_N: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor, scale: float, softcap: float = 0.0, sinks_H: Tensor | None = None,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend over the prefix with all queries as those of one request, then over the rest, and merge."""
    requests, shared = seq_lens_R.shape[0], prefix_N.shape[0] * k_cache.shape[2]
    outs = torch.empty((2, *q_THD.shape), dtype=torch.float32, device=q_THD.device)  # read where lse > -inf
    lse = torch.full(outs.shape[:3], float("-inf"), dtype=torch.float32, device=q_THD.device)
    if requests and shared:
        length = torch.full((1,), shared, dtype=torch.int32, device=q_THD.device)
        every = query_starts_S[::requests].contiguous()  # from 0 to the end of the rows that requests own
        launch(
            outs[:1], q_THD, k_cache, v_cache, prefix_N[None], length, every, scale, 0, softcap, None, None, k_scale,
            v_scale, lse=lse[:1], causal=False,
        )  # fmt: skip
    launch(
        outs[1:], q_THD, k_cache, v_cache, block_table_RB, seq_lens_R - shared, query_starts_S, scale, 0, softcap,
        sinks_H, None, k_scale, v_scale, lse=lse[1:],
    )  # fmt: skip
    return merge_states_triton(outs, lse, q_THD.dtype)[0]
