"""Attention over parts of each request's keys, as states that merge_states makes whole: half of a split decode.

Source: Dao et al. 2023, flash-decoding, https://pytorch.org/blog/flash-decoding/; attention states: Ye et al. 2025
(FlashInfer), https://arxiv.org/abs/2501.01005, section 2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Cost, contract
from seamwise.kernels.draw import Draw

from .attention import BATCH, CACHES, SCALES, attend, attention, attention_cost, limits_attention
from .attention_triton import STATES, kernel_builds, launch, refuses


def _fake(q_THD: Tensor, splits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape, wide = (splits, *q_THD.shape), torch.promote_types(q_THD.dtype, torch.float32)
    return q_THD.new_empty(shape, dtype=dtype), q_THD.new_empty(shape[:3], dtype=wide)


@contract(args=BATCH | CACHES | SCALES, limits=limits_attention, seam=True, fake=_fake, reads_values=True)
def attention_partial(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor, scale: float, window: int, softcap: float, sinks_H: Tensor | None,
    alibi_slopes_H: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, splits: int, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (outs, lse): attention's rows over S parts of the keys, and their log-sum-exp.

    outs (S, T, H, D) in dtype, as merge_states wants them float32; natural lse (S, T, H) float32.

    Arguments as attention's. A request's keys are cut into `splits` ranges of as many units of 64 keys each, from the
    first that its queries see (attention.key_ranges); the first part has seen the sinks. A row that sees no key of a
    part is zero there and has lse -inf, and so have rows that no request owns. Raises ValueError for splits < 1.
    """
    outs_STHD, lse_STH = attend(
        q_THD, k_cache, v_cache, block_table_RB, seq_lens_R, query_starts_S, scale, window, softcap, sinks_H,
        alibi_slopes_H, k_scale, v_scale, splits,
    )  # fmt: skip
    return outs_STHD.to(dtype), lse_STH


@attention_partial.costs
def cost(
    q_THD: Tensor, k_cache: Tensor, seq_lens_R: Tensor, query_starts_S: Tensor, window: int, splits: int,
    dtype: torch.dtype,
) -> Cost:  # fmt: skip
    whole = attention_cost(q_THD, k_cache, seq_lens_R, query_starts_S, window)
    written = splits * (q_THD.numel() * dtype.itemsize + q_THD.shape[0] * q_THD.shape[1] * 4)
    return Cost(bytes=whole.bytes - q_THD.nbytes + written, flops=whole.flops)


@attention_partial.inputs(
    examples=[{**sizes, "splits": splits} for sizes, splits in zip(attention.examples, (1, 2, 3, 2, 2), strict=True)],
    shapes={"llama-3-8b long decode": {**attention.shapes["llama-3-8b long decode"], "splits": 32}},
    sizes={**attention.sizes, "splits": (1, 4)},
)
def make(draw: Draw, splits: int, **sizes: Any) -> tuple[Any, ...]:
    return *attention.drawn(draw, **sizes), splits, draw.dtype


attention_partial.builds(lambda dtype: kernel_builds(dtype, STATES, ((8, 4096, 2),)))  # attention has the others


@attention_partial.provider("triton", devices=("cuda",), refuses=refuses, triton=True)
def attention_partial_triton(q_THD: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    *attended, splits, dtype = args
    outs = torch.zeros((splits, *q_THD.shape), dtype=dtype, device=q_THD.device)
    lse = torch.full(outs.shape[:3], float("-inf"), dtype=torch.float32, device=q_THD.device)
    launch(outs, q_THD, *attended, lse=lse)
    return outs, lse
