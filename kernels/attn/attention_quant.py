"""Attention whose rows leave it quantized, as the linear that follows reads them: a round trip of the rows saved.

Source: an epilogue on the rows, as in Ye et al. 2025 (FlashInfer), https://arxiv.org/abs/2501.01005; the formats are
those of kernels/quant/quantize.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, Cost, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.quant.quantize import (
    LIMITS,
    empty_quantized,
    limits_scheme,
    quantize,
    quantize_rows,
    quantize_triton,
    refuses_group,
    scheme,
)

from .attention import BATCH, CACHES, SCALES, attention, attention_cost, limits_attention
from .attention_triton import FEATURES, attention_triton, kernel_builds, launch, num_splits, refuses


def _fake(q_THD: Tensor, dtype: torch.dtype, group: int, out_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return empty_quantized(q_THD.flatten(1), dtype, group if out_scale is None else 0)


@contract(
    args={**BATCH, **CACHES, **SCALES, "out_scale": "1 float32"}, seam=True, fake=_fake, reads_values=True,
    limits=(
        lambda q_THD, k_cache, softcap: limits_attention(q_THD, k_cache, softcap),
        lambda dtype, group, out_scale: limits_scheme(dtype, group, out_scale),
    ),
)  # fmt: skip
def attention_quant(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor, scale: float, window: int, softcap: float, sinks_H: Tensor | None,
    alibi_slopes_H: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, dtype: torch.dtype, group: int,
    out_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return quantize(attention(…) as rows (T, H·D), dtype, group, out_scale): (q, scale), as these ops define them."""
    out_THD = attention.meaning(
        q_THD, k_cache, v_cache, block_table_RB, seq_lens_R, query_starts_S, scale, window, softcap, sinks_H,
        alibi_slopes_H, k_scale, v_scale,
    )  # fmt: skip
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    return quantize_rows(out_THD.flatten(1).to(wide), dtype, group, out_scale)


@attention_quant.costs
def cost(q_THD: Tensor, k_cache: Tensor, seq_lens_R: Tensor, query_starts_S: Tensor, window: int, group: int) -> Cost:
    whole, rows = attention_cost(q_THD, k_cache, seq_lens_R, query_starts_S, window), q_THD.flatten(1)
    written = rows.numel() + 4 * rows.shape[0] * (rows.shape[1] // group if group else 1)
    return Cost(bytes=whole.bytes - q_THD.nbytes + written, flops=whole.flops + 3 * rows.numel())


@attention_quant.inputs(
    examples=[
        {**sizes, name: choice} for sizes, (name, choice) in zip(
            attention.examples, (("static", True), ("heads", 2), ("int8", True), ("heads", 2), ("heads", 1)),
            strict=True,
        )
    ],
    shapes={
        name: {**attention.shapes[name], "static": True} for name in ("llama-3-8b decode", "llama-3-8b prefill")
    },
    sizes={
        **attention.sizes, "context": [0, 20, 130], "heads": [0, 1, 1], "int8": [False, False, False, True],
        "static": [False, True],
    },
    dtypes=(torch.float32,),  # in 16 bits attention's error exceeds float8's least steps: test_attention.py
)  # fmt: skip
def make(draw: Draw, heads: int = 0, int8: bool = False, static: bool = False, **sizes: Any) -> tuple[Any, ...]:
    """Groups of `heads` heads share a scale, 0: all of them."""
    return *attention.drawn(draw, **sizes), *scheme(heads * sizes["D"], int8, static, draw.device)


@attention_quant.builds
def builds(dtype: str) -> Iterator[Build]:
    for scales in ({"static_ptr": "*fp32"}, {"group_scale_ptr": "*fp32", **FEATURES}):
        yield from kernel_builds(dtype, {"out_ptr": "*fp8e4nv", **scales}, ((8, 8, 8), (8, 4096, 2)))


def _refuses(q_THD: Tensor, dtype: torch.dtype, group: int, out_scale: Tensor | None) -> str | None:
    width = q_THD.shape[2]
    if dtype != torch.float8_e4m3fn or (group != width if out_scale is None else group != 0):
        return f"wanted float8_e4m3fn with one scale, or groups of a head's {width} columns, got {dtype}, group {group}"
    return refuses_group(group)  # where the keys are split, quantize follows


@attention_quant.provider("triton", devices=("cuda",), refuses=(_refuses, refuses), triton=True)
def attention_quant_triton(q_THD: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    attended, (dtype, group, out_scale) = args[:12], (*args[12:], None)[:3]
    if num_splits(q_THD, *attended) > 1:
        return quantize_triton(attention_triton(q_THD, *attended).flatten(1), dtype, group, out_scale)
    tokens, heads, _ = q_THD.shape
    out = torch.zeros((tokens, q_THD[0].numel()), dtype=dtype, device=q_THD.device)  # rows that no request owns
    if out_scale is not None:
        launch(out, q_THD, *attended, static=out_scale)
        return out, out_scale.expand(tokens, 1).contiguous()
    scales = torch.full((tokens, heads), 1e-10 / LIMITS[dtype], device=q_THD.device)
    launch(out, q_THD, *attended, group_scale=scales)
    return out, scales


@attention_quant.provider("composed", devices=("cpu", "cuda"), strided=True, launches=True, composed=True)
def attention_quant_composed(q_THD: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    """The two ops by their own kernels: on CUDA for schemes that the fused kernel refuses, as one scale a row."""
    dtype, group, out_scale = (*args[12:], None)[:3]
    return quantize(attention(q_THD, *args[:12]).flatten(1), dtype, group, out_scale)
