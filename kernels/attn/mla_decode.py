"""Multi-head latent attention in its absorbed form: all heads read one latent row a token, as key and as value.

Queries are multiplied into the latent space beforehand (W_UKᵀ q), results out of it afterwards (W_UV o): the cache is
never expanded. Source: DeepSeek-V2, https://arxiv.org/abs/2405.04434, section 2.1 and appendix C.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Cost, contract
from seamwise.kernels.draw import Draw

from .attention import BATCH
from .mla_append import FLOAT8


def ragged_rows(
    cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor, query_starts_S: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each request's query rows, its cached rows (L, E), and which keys each query must not see, (n, L)."""
    starts, block_size = query_starts_S.tolist(), cache.shape[1]
    for r, length in enumerate(seq_lens_R.tolist()):
        first, last = starts[r], starts[r + 1]
        if first < last:
            blocks = block_table_RB[r, : -(-length // block_size)].long()
            key = torch.arange(length, device=cache.device)
            yield slice(first, last), cache[blocks].flatten(0, 1)[:length], key > key[first - last :, None]


def _limits(q_THE: Tensor, latent: int) -> str | None:
    width = q_THE.shape[2]
    return None if 0 < latent < width else f"latent is {latent}, wanted 1 to {width - 1}, less than q's columns"


@contract(
    args={**BATCH, "cache": "N P E", "cache_scale": "1 float32"}, limits=_limits, seam=True, reads_values=True,
    fake=lambda q_THE, latent: q_THE.new_empty((*q_THE.shape[:2], latent)),
)  # fmt: skip
def mla_decode(
    q_THE: Tensor, cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor, query_starts_S: Tensor, scale: float,
    latent: int, cache_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return softmax(q rowsᵀ · scale, causal) rows[:, :latent]: (T, H, latent) in q's dtype, float32 or wider inside.

    q (T, H, E) is [W_UKᵀ q_nope, q_rope]; the cache (N, P, E) has one row a token for all heads, times cache_scale,
    (1,) float32, where given. Block table, lengths and query starts are as in `attention`. Rows no request owns are
    zero.
    """
    wide = torch.promote_types(q_THE.dtype, torch.float32)
    out_THC = q_THE.new_zeros((*q_THE.shape[:2], latent))
    for own, rows_LE, hidden_nL in ragged_rows(cache, block_table_RB, seq_lens_R, query_starts_S):
        keys_LE = rows_LE.to(wide) if cache_scale is None else rows_LE.to(wide) * cache_scale
        scores = torch.einsum("nhe,le->hnl", q_THE[own].to(wide), keys_LE) * scale
        weights = scores.masked_fill(hidden_nL, float("-inf")).softmax(-1)
        out_THC[own] = torch.einsum("hnl,lc->nhc", weights, keys_LE[:, :latent]).to(q_THE.dtype)
    return out_THC


@mla_decode.costs
def cost(q_THE: Tensor, cache: Tensor, seq_lens_R: Tensor, query_starts_S: Tensor, latent: int) -> Cost:
    heads, width = q_THE.shape[1:]
    keys, seen = counts(seq_lens_R, query_starts_S)
    moved = q_THE.nbytes + q_THE.nbytes * latent // width + keys * width * cache.element_size()
    return Cost(bytes=moved, flops=2 * seen * heads * (width + latent))


def counts(seq_lens_R: Tensor, query_starts_S: Tensor) -> tuple[int, int]:
    """Return the keys that all requests read, and the pairs of a query and a key it sees."""
    queries = (query_starts_S[1:] - query_starts_S[:-1]).tolist()
    lengths = [s if n else 0 for s, n in zip(seq_lens_R.tolist(), queries, strict=True)]
    return sum(lengths), sum(n * s - n * (n - 1) // 2 for n, s in zip(queries, lengths, strict=True))


@mla_decode.inputs(
    examples=(
        {"R": 1, "queries": 1, "context": 5, "H": 2, "C": 32, "rope": 16, "P": 4},
        {"R": 2, "queries": 1, "context": 70, "H": 3, "C": 64, "rope": 16, "P": 8, "float8": True},
        {"R": 2, "queries": 3, "context": 33, "H": 16, "C": 512, "rope": 64, "P": 16},
        {"R": 3, "queries": 7, "context": 9, "H": 6, "C": 48, "rope": 24, "P": 8},
    ),
    shapes={
        "deepseek-v3 decode": {"R": 64, "queries": 1, "context": 4096, "H": 128, "C": 512, "rope": 64, "P": 64},
        "deepseek-v3 decode tp8": {"R": 64, "queries": 1, "context": 4096, "H": 16, "C": 512, "rope": 64, "P": 64},
    },
    sizes={
        "R": (1, 3), "queries": (1, 5), "context": (0, 40), "H": [1, 6, 20], "C": [32, 48, 512], "rope": [8, 64],
        "P": [4, 16], "float8": [False, True],
    },
)  # fmt: skip
def make(
    draw: Draw, R: int, queries: int, context: int, H: int, C: int, rope: int, P: int, float8: bool = False
) -> tuple[Any, ...]:
    table_RB, *batch = draw.batch(R, queries, context, P)
    cache, cache_scale = draw_cache(draw, int(table_RB.max()) + 1, P, C + rope, float8)
    return draw(R * queries, H, C + rope), cache, table_RB, *batch, (C + rope) ** -0.5, C, cache_scale


def draw_cache(draw: Draw, blocks: int, P: int, width: int, float8: bool) -> tuple[Tensor, Tensor | None]:
    """Draw a cache of latents, and its scale where it is float8."""
    cache, scale = draw(blocks, P, width), torch.full((1,), 2**-6, device=draw.device)
    return ((cache / scale).to(FLOAT8), scale) if float8 else (cache, None)
