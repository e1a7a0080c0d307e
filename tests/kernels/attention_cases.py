"""Ragged batches of attention, and attention by implementations not ours."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import flex_attention

# Called without torch.compile it goes through Dynamo all the same, and on torch 2.11 gives wrong values from the second
# shape on; so, its own definition op by op.
flex._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True

requests = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), min_size=1, max_size=4)
features = st.fixed_dictionaries(
    {
        "window": st.sampled_from([0, 0, 1, 9, 70, -1, -6, -40]),
        "softcap": st.sampled_from([0.0, 2.0]),
        "sinks": st.booleans(),
        "alibi": st.booleans(),
        "scaled": st.sampled_from(["", "tensor", "head"]),
    }
)
heads = st.fixed_dictionaries(
    {"kv_heads": st.integers(1, 2), "group": st.sampled_from([1, 3, 4]), "width": st.sampled_from([16, 24, 64])}
)


def sees(query: Any, key: Any, window: int) -> Any:
    """Return whether the query at a position sees a key: of the last `window`, or of its chunk of -window."""
    if window < 0:
        return (key <= query) & (key // -window == query // -window)
    return (key <= query) & (key > query - window) if window else key <= query


def batch(
    requests: list[tuple[int, int]], *, kv_heads: int = 2, group: int = 2, width: int = 16, block: int = 4,
    window: int = 0, softcap: float = 0.0, sinks: bool = False, alibi: bool = False, scaled: str = "",
    dtype: torch.dtype = torch.float64, kv_dtype: torch.dtype | None = None, device: str = "cpu", seed: int = 0,
) -> tuple[Any, ...]:  # fmt: skip
    """Return attention's arguments for requests of (context, queries) over shuffled blocks.

    Slots that no token owns or that lie before every window are NaN, and blocks of only such slots are not in the
    table; two rows of padding follow. Token i of request r has the same values whatever the blocks.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = [context + count for context, count in requests]
    owned = [-(-n // block) for n in lengths]
    order = torch.randperm(sum(owned), generator=generator).to(torch.int32) + 1
    generator.manual_seed(seed)
    table = torch.zeros(len(requests), max(1, *owned), dtype=torch.int32)
    caches = torch.full((2, sum(owned) + 1, kv_heads, block, width), torch.nan)
    for r, blocks in enumerate(order.split(owned)):
        first = next(i for i in range(requests[r][0] + 1) if sees(requests[r][0], i, window))
        table[r, first // block : owned[r]] = blocks[first // block :]
        values = torch.randn(lengths[r], 2, kv_heads, width, generator=generator)
        for position in range(first, lengths[r]):
            caches[:, int(blocks[position // block]), :, position % block] = values[position]
    starts = torch.tensor([0, *(count for _, count in requests)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    q = torch.randn(int(starts[-1]) + 2, kv_heads * group, width, generator=generator)
    sinks_H, slopes_H = torch.randn(2, kv_heads * group, generator=generator)
    scales = torch.rand(2, kv_heads if scaled == "head" else 1, generator=generator) + 0.5
    args = (
        q.to(dtype), *caches.to(kv_dtype or dtype), table, torch.tensor(lengths, dtype=torch.int32), starts,
        width**-0.5, window, softcap, sinks_H.to(dtype) if sinks else None, slopes_H / 10 if alibi else None,
        *(scales if scaled else (None, None)),
    )  # fmt: skip
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in args)


def cut(args: tuple[Any, ...], r: int, first: int, last: int) -> tuple[Any, ...]:
    """Return the arguments that compute only queries first : last of request r."""
    q, k_cache, v_cache, table, lengths, starts, *rest = args
    start, count = int(starts[r]), int(starts[r + 1] - starts[r])
    alone = torch.tensor([0, last - first], dtype=torch.int32, device=q.device)
    return (
        q[start + first : start + last], k_cache, v_cache, table[r : r + 1], lengths[r : r + 1] - (count - last), alone,
        *rest,
    )  # fmt: skip


def keys_values(args: tuple[Any, ...], r: int) -> list[Tensor]:
    """Return request r's keys and values (K, L, D) in float64, zero where they are NaN."""
    _, k_cache, v_cache, table, lengths, *_, k_scale, v_scale = args
    return [
        c.double()[table[r].long()].transpose(0, 1).flatten(1, 2)[:, : int(lengths[r])].nan_to_num()
        * (1 if scale is None else scale.double()[:, None, None])
        for c, scale in ((k_cache, k_scale), (v_cache, v_scale))
    ]


def by_flex(args: tuple[Any, ...]) -> Tensor:
    """Return attention in float64 by torch's flex_attention; sinks by the log-sum-exp that it returns."""
    q, _, _, _, lengths, starts, scale, window, softcap, sinks_H, slopes_H, _, _ = args
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for r in range(len(lengths)):
        rows, context = slice(int(starts[r]), int(starts[r + 1])), int(lengths[r] - starts[r + 1] + starts[r])
        if rows.start == rows.stop:
            continue

        def modify(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor, context: int = context) -> Tensor:
            score = softcap * torch.tanh(score / softcap) if softcap else score
            away = j - i - context
            score = score if slopes_H is None else score + slopes_H.double()[h] * away
            seen = sees(i + context, j, window)
            return torch.where(seen, score, -torch.inf)

        keys, values = keys_values(args, r)
        queries = q[rows].double().transpose(0, 1)[None]
        got, lse = flex_attention(
            queries, keys[None], values[None], score_mod=modify, scale=scale, enable_gqa=True, return_lse=True
        )
        share = 1.0 if sinks_H is None else torch.sigmoid(lse - sinks_H.double()[:, None])[..., None]
        out[rows] = (got * share)[0].transpose(0, 1)
    return out


def by_transformers(module: Any, args: tuple[Any, ...], **options: Any) -> Tensor:
    """Return the first request's attention by the eager_attention_forward of a transformers' model's module."""
    q, _, _, _, lengths, starts, scale, window, _, sinks_H, *_ = args
    count, length = int(starts[1]), int(lengths[0])
    seen = sees(torch.arange(length - count, length)[:, None], torch.arange(length), window)
    mask = torch.zeros(1, 1, count, length, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    keys, values = keys_values(args, 0)
    groups = SimpleNamespace(num_key_value_groups=q.shape[1] // len(keys), training=False, sinks=sinks_H)
    queries = q[:count].double().transpose(0, 1)[None]
    out, _ = module.eager_attention_forward(groups, queries, keys[None], values[None], mask, scaling=scale, **options)
    return out[0]  # type: ignore[no-any-return]
