"""Multi-head latent attention over the paged cache, keys and values being expanded from its latents by kv_b.

Few queries are absorbed: they go into the latent space, where `mla_decode` attends. With many, expanding the step's own
tokens costs less than attending 576 columns wide; only what came before them is then read absorbed, and both parts
merge by their log-sum-exps. Nothing waits for the device: how long contexts are is read there alone.
Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1 and appendix C.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, Cost, contract
from seamwise.kernels.draw import Draw

from .merge_states import merge_states
from .mla_decode import counts, draw_cache, mla_decode, ragged_rows
from .mla_decode_triton import TYPES, attend_absorbed, mla_kernel, refuses_absorbed, widths


def _empty(q_nope_THN: Tensor, kv_b_HXC: Tensor) -> Tensor:
    tokens, heads, nope = q_nope_THN.shape
    return q_nope_THN.new_empty((tokens, heads, kv_b_HXC.shape[1] - nope))


_ARGS = {
    "cache": "Z P C+R", "block_table_RB": "Q B int32", "seq_lens_R": "Q int32", "query_starts_S": "Q+1 int32",
    "cache_scale": "1 float32",
}  # fmt: skip


def _limits(q_nope_THN: Tensor, kv_b_HXC: Tensor) -> str | None:
    nope, expanded = q_nope_THN.shape[2], kv_b_HXC.shape[1]
    return None if nope < expanded else f"kv_b expands to {expanded} columns, wanted more than q_nope's {nope}"


@contract(args=_ARGS, limits=_limits, seam=True, fake=_empty, reads_values=True)
def mla_prefill(
    q_nope_THN: Tensor, q_rope_THR: Tensor, cache: Tensor, kv_b_HXC: Tensor, block_table_RB: Tensor,
    seq_lens_R: Tensor, query_starts_S: Tensor, scale: float, cache_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return softmax((q_nope k_nopeᵀ + q_rope k_ropeᵀ) · scale, causal) v: (T, H, V) in q's dtype, float32 inside.

    The cache (N, P, C + R) holds each token's [latent, k_rope], times cache_scale, (1,) float32, where given; kv_b
    (H, N + V, C) expands a latent to each head's [k_nope, v]. Block table, lengths and query starts are as in
    `attention`; the step's own tokens are in the cache already. Rows no request owns are zero.
    """
    wide = torch.promote_types(q_nope_THN.dtype, torch.float32)
    tokens, heads, nope = q_nope_THN.shape
    latent = kv_b_HXC.shape[2]
    out_THV = q_nope_THN.new_zeros((tokens, heads, kv_b_HXC.shape[1] - nope))
    for own, rows_LE, hidden_nL in ragged_rows(cache, block_table_RB, seq_lens_R, query_starts_S):
        keys_LE = rows_LE.to(wide) if cache_scale is None else rows_LE.to(wide) * cache_scale
        kv_LHX = torch.einsum("lc,hxc->lhx", keys_LE[:, :latent], kv_b_HXC.to(wide))
        scores = torch.einsum("nhd,lhd->hnl", q_nope_THN[own].to(wide), kv_LHX[..., :nope])
        scores = (scores + torch.einsum("nhr,lr->hnl", q_rope_THR[own].to(wide), keys_LE[:, latent:])) * scale
        weights = scores.masked_fill(hidden_nL, float("-inf")).softmax(-1)
        out_THV[own] = torch.einsum("hnl,lhv->nhv", weights, kv_LHX[..., nope:]).to(q_nope_THN.dtype)
    return out_THV


@mla_prefill.costs
def cost(
    q_nope_THN: Tensor, q_rope_THR: Tensor, cache: Tensor, kv_b_HXC: Tensor, seq_lens_R: Tensor, query_starts_S: Tensor
) -> Cost:
    heads, expanded, latent = kv_b_HXC.shape
    keys, seen = counts(seq_lens_R, query_starts_S)
    values = expanded - q_nope_THN.shape[2]
    out_bytes = q_nope_THN.shape[0] * heads * values * q_nope_THN.element_size()
    moved = q_nope_THN.nbytes + q_rope_THR.nbytes + kv_b_HXC.nbytes + out_bytes
    attended, expanding = 2 * seen * heads * (expanded + q_rope_THR.shape[2]), 2 * keys * heads * expanded * latent
    return Cost(bytes=moved + keys * cache.shape[2] * cache.element_size(), flops=attended + expanding)


@mla_prefill.inputs(
    examples=(
        {"R": 1, "queries": 1, "context": 5, "H": 2, "nope": 16, "rope": 8, "V": 16, "C": 32, "P": 4},
        {"R": 1, "queries": 40, "context": 6, "H": 2, "nope": 16, "rope": 8, "V": 16, "C": 32, "P": 4, "float8": True},
        {"R": 2, "queries": 35, "context": 0, "H": 1, "nope": 24, "rope": 16, "V": 12, "C": 48, "P": 8},
    ),
    shapes={
        "deepseek-v3 prefill tp8": {
            "R": 1, "queries": 4096, "context": 0, "H": 16, "nope": 128, "rope": 64, "V": 128, "C": 512, "P": 64,
        },
        "deepseek-v3 chunked prefill tp8": {
            "R": 2, "queries": 1024, "context": 8192, "H": 16, "nope": 128, "rope": 64, "V": 128, "C": 512, "P": 64,
        },
    },
    sizes={
        "R": (1, 3), "queries": [1, 3, 40], "context": (0, 30), "H": [1, 3], "nope": [16, 24], "rope": [8, 16],
        "V": [16, 24], "C": [32, 48], "P": [4, 16], "float8": [False, True],
    },
)  # fmt: skip
def make(
    draw: Draw, R: int, queries: int, context: int, H: int, nope: int, rope: int, V: int, C: int, P: int,
    float8: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    table_RB, *batch = draw.batch(R, queries, context, P)
    cache, cache_scale = draw_cache(draw, int(table_RB.max()) + 1, P, C + rope, float8)
    q_THQ = draw(R * queries, H, nope + rope)
    kv_b_HXC = (draw.normal(H, nope + V, C) * C**-0.5).to(draw.dtype)
    scale = (nope + rope) ** -0.5
    return q_THQ[..., :nope], q_THQ[..., nope:].clone(), cache, kv_b_HXC, table_RB, *batch, scale, cache_scale


def config(dtype: torch.dtype) -> dict[str, int]:
    """Launch configuration of the expanded form. Unmeasured: the most rows and keys that spill nowhere."""
    rows, keys = (16, 16) if dtype == torch.float32 else (64, 64)
    return {"QUERIES": rows, "PACK": 1, "KEYS": keys, "num_warps": 8, "num_stages": 2}


@mla_prefill.builds
def builds(dtype: str) -> Iterator[Build]:
    element, precision = (torch.bfloat16, "tf32") if dtype == "bf16" else (torch.float32, "ieee")
    constants = {
        **widths(128, 64, 128), **config(element), "EXPANDED": True, "CONTEXT": False, "SPLITS": 1,
        "PRECISION": precision, "cache_scale_ptr": None,
    }  # fmt: skip
    yield Build(mla_kernel, constants, {**TYPES, "out_ptr": "*fp32"})


def absorbs(q_nope_THN: Tensor, q_rope_THR: Tensor, kv_b_HXC: Tensor, requests: float) -> bool:
    """Return whether the absorbed form takes fewer flops a key, for queries spread evenly over the requests."""
    _, expanded, latent = kv_b_HXC.shape
    absorbed_columns, expanded_columns = 2 * latent + q_rope_THR.shape[2], expanded + q_rope_THR.shape[2]
    return q_nope_THN.shape[0] * (absorbed_columns - expanded_columns) < latent * expanded * requests


def absorb(q_nope_THN: Tensor, q_rope_THR: Tensor, kv_b_HXC: Tensor) -> Tensor:
    """Return [W_UKᵀ q_nope, q_rope]: (T, H, C + R)."""
    w_uk_HNC = kv_b_HXC[:, : q_nope_THN.shape[2]]
    return torch.cat((torch.einsum("thn,hnc->thc", q_nope_THN, w_uk_HNC), q_rope_THR), -1)


def project(latent_THC: Tensor, kv_b_HXC: Tensor, nope: int) -> Tensor:
    """Return W_UV o: (T, H, V)."""
    return torch.einsum("thc,hvc->thv", latent_THC, kv_b_HXC[:, nope:]).contiguous()


@mla_prefill.provider("absorbed", devices=("cpu",), strided=True)
def mla_prefill_absorbed(
    q_nope_THN: Tensor, q_rope_THR: Tensor, cache: Tensor, kv_b_HXC: Tensor, block_table_RB: Tensor,
    seq_lens_R: Tensor, query_starts_S: Tensor, scale: float, cache_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    batch = (block_table_RB, seq_lens_R, query_starts_S, scale)
    # To absorb and project a query costs what expanding a key does: known keys count by what they are more.
    more = 1 - q_nope_THN.shape[0] / max(int(seq_lens_R.sum()), 1)
    if not absorbs(q_nope_THN, q_rope_THR, kv_b_HXC, seq_lens_R.shape[0] * more):
        return mla_prefill.meaning(q_nope_THN, q_rope_THR, cache, kv_b_HXC, *batch, cache_scale)
    q_THE = absorb(q_nope_THN, q_rope_THR, kv_b_HXC)
    return project(mla_decode(q_THE, cache, *batch, kv_b_HXC.shape[2], cache_scale), kv_b_HXC, q_nope_THN.shape[2])


def _refuses(q_nope_THN: Tensor, q_rope_THR: Tensor, cache: Tensor, kv_b_HXC: Tensor) -> str | None:
    if not (q_nope_THN.dtype == q_rope_THR.dtype == kv_b_HXC.dtype):
        return f"q and kv_b must share a dtype, got {q_nope_THN.dtype}, {q_rope_THR.dtype}, {kv_b_HXC.dtype}"
    nope, (_, expanded, latent) = q_nope_THN.shape[2], kv_b_HXC.shape
    if max(nope, expanded - nope) > 128:
        return f"heads are {nope} and {expanded} - {nope} wide, wanted at most 128"
    return refuses_absorbed(q_nope_THN.dtype, cache, latent)


@mla_prefill.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
def mla_prefill_triton(
    q_nope_THN: Tensor, q_rope_THR: Tensor, cache: Tensor, kv_b_HXC: Tensor, block_table_RB: Tensor,
    seq_lens_R: Tensor, query_starts_S: Tensor, scale: float, cache_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    nope, latent, batch = q_nope_THN.shape[2], kv_b_HXC.shape[2], (block_table_RB, seq_lens_R, query_starts_S)
    expands = not absorbs(q_nope_THN, q_rope_THR, kv_b_HXC, seq_lens_R.shape[0])
    q_THE = absorb(q_nope_THN, q_rope_THR, kv_b_HXC)
    latent_THC, context_lse_TH = attend_absorbed(q_THE, cache, *batch, scale, latent, cache_scale, context=expands)
    context_THV = project(latent_THC, kv_b_HXC, nope)
    if context_lse_TH is None or not expands:
        return context_THV
    rows_TE = own_rows(cache, *batch, q_nope_THN.shape[0])
    rows_TE = rows_TE.to(q_nope_THN.dtype) if cache_scale is None else (rows_TE.float() * cache_scale).to(q_THE.dtype)
    own_THV, own_lse_TH = attend_expanded(q_nope_THN, q_rope_THR, rows_TE, kv_b_HXC, seq_lens_R, query_starts_S, scale)
    outs = torch.stack((own_THV, context_THV.float()))
    return merge_states(outs, torch.stack((own_lse_TH, context_lse_TH)), q_nope_THN.dtype)[0]


def own_rows(cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor, query_starts_S: Tensor, tokens: int) -> Tensor:
    """Return the cached rows of the step's own tokens, (T, E); those of rows no request owns mean nothing."""
    token_T = torch.arange(tokens, device=cache.device)
    request_T = torch.searchsorted(query_starts_S[1:], token_T, right=True).clamp(max=seq_lens_R.shape[0] - 1)
    length_T = seq_lens_R[request_T]
    position_T = (length_T - query_starts_S[request_T + 1] + token_T).minimum(length_T - 1).clamp(min=0)
    return cache[block_table_RB[request_T, position_T // cache.shape[1]], position_T % cache.shape[1]]


def attend_expanded(
    q_nope_THN: Tensor, q_rope_THR: Tensor, rows_TE: Tensor, kv_b_HXC: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return attention of each request's own tokens over themselves alone, float32 (T, H, V), and its lse (T, H)."""
    tokens, heads, nope = q_nope_THN.shape
    _, expanded, latent = kv_b_HXC.shape
    kv_THX = (rows_TE[:, :latent] @ kv_b_HXC.flatten(0, 1).T).unflatten(1, (heads, expanded))
    out_THV = torch.zeros(tokens, heads, expanded - nope, dtype=torch.float32, device=q_nope_THN.device)
    lse_TH = torch.full((tokens, heads), float("-inf"), dtype=torch.float32, device=q_nope_THN.device)
    chosen, requests = config(q_nope_THN.dtype), seq_lens_R.shape[0]
    mla_kernel[(tokens // chosen["QUERIES"] + requests, heads, 1)](
        q_nope_THN, q_rope_THR, kv_THX, rows_TE[:, latent:], kv_THX[..., nope:], None, seq_lens_R, query_starts_S, None,
        out_THV, lse_TH, requests, tokens, 0, *q_nope_THN.stride()[:2], *q_rope_THR.stride()[:2], 0,
        *kv_THX.stride()[:2], 0, rows_TE.stride(0), scale, 0, 0, 1, heads,
        **widths(nope, q_rope_THR.shape[2], expanded - nope), **chosen, EXPANDED=True, CONTEXT=False, SPLITS=1,
        PRECISION="ieee" if q_nope_THN.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    return out_THV, lse_TH
