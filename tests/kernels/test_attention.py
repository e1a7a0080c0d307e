"""The meaning of attention and its relatives against other implementations, and their laws (Triton: interpreted/)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_cases import batch, by_flex, by_transformers, cut, features, heads, keys_values, requests, sees
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import Rounding, check_narrow

from seamwise.kernels import (
    attention,
    attention_partial,
    attention_quant,
    kv_append,
    merge_states,
    quantize,
)  # fmt: skip
from seamwise.kernels.attn.attention import key_ranges

PROVIDERS = {"torch": torch.float64, "cpp": torch.float32}
close = {"rtol": 1e-12, "atol": 1e-12}
quick = settings(max_examples=40)
seeds = st.integers(0, 2**31 - 1)


@quick
@given(requests, heads, features, seeds)
def test_meaning_agrees_with_flex_attention(requests: Any, heads: Any, features: Any, seed: int) -> None:
    args = batch(requests, **heads, **features, seed=seed)
    torch.testing.assert_close(attention.meaning(*args), by_flex(args), **close)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("window", [0, 9])
def test_sinks_agree_with_gpt_oss(provider: str, window: int) -> None:
    from transformers.models.gpt_oss import modeling_gpt_oss

    args = batch([(11, 12)], window=window, sinks=True, dtype=PROVIDERS[provider])
    got = attention.run(provider, *args)[:12].double()
    torch.testing.assert_close(got, by_transformers(modeling_gpt_oss, args), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("window", [0, 9])
def test_softcap_agrees_with_gemma2(provider: str, window: int) -> None:
    from transformers.models.gemma2 import modeling_gemma2

    args = batch([(11, 12)], window=window, softcap=1.5, dtype=PROVIDERS[provider])
    got = attention.run(provider, *args)[:12].double()
    theirs = by_transformers(modeling_gemma2, args, softcap=1.5)  # its softmax is in float32
    torch.testing.assert_close(got, theirs, rtol=1e-5, atol=1e-6)


@quick
@given(requests, features, st.data())
def test_a_request_alone_in_any_cut_and_any_block_size(requests: Any, features: Any, data: st.DataObject) -> None:
    args = batch(requests, **features)
    out = attention.meaning(*args)
    torch.testing.assert_close(attention.meaning(*batch(requests, **features, block=16)), out, **close)
    for r, (_, count) in enumerate(requests):
        middle, start = data.draw(st.integers(0, count)), int(args[5][r])
        for first, last in ((0, middle), (middle, count)):
            part = attention.meaning(*cut(args, r, first, last))
            torch.testing.assert_close(part, out[start + first : start + last], **close)


@quick
@given(requests, features, st.integers(1, 6))
def test_merged_parts_are_the_whole(requests: Any, features: Any, splits: int) -> None:
    longer = [(context * 8, count) for context, count in requests]  # splits are units of 64 keys
    args = batch(longer, **features)
    outs, lse = attention_partial.meaning(*args, splits, torch.float64)
    out, whole_lse = merge_states.meaning(outs, lse, torch.float64)
    torch.testing.assert_close(out, attention.meaning(*args), **close)
    _, one_lse = attention_partial.meaning(*args, 1, torch.float64)
    torch.testing.assert_close(whole_lse, one_lse[0], **close)
    assert bool((out[-2:] == 0).all()) and bool((whole_lse[-2:] == -torch.inf).all()), "rows of no request"
    unseen = lse == -torch.inf
    assert bool((outs[unseen] == 0).all())


@given(st.integers(1, 5000), st.integers(1, 40), st.sampled_from([0, 1, 64, 100, 1000, -70]), st.integers(1, 70))
def test_key_ranges_cut_what_is_seen(length: int, count: int, window: int, splits: int) -> None:
    count = min(count, length)
    ranges = key_ranges(length, count, window, splits)
    seen = next(i for i in range(length) if sees(length - count, i, window))
    assert len(ranges) <= splits and (ranges[0][0], ranges[-1][1]) == (seen, length)
    assert all(begin < end for begin, end in ranges)
    assert all(a[1] == b[0] and b[0] % 64 == 0 for a, b in pairwise(ranges))


@pytest.mark.parametrize("cuts", [[30], [1, 2, 59], list(range(1, 60))])
def test_any_cut_of_the_keys_merges_to_the_whole(cuts: list[int]) -> None:
    args = batch([(59, 1)], group=3)
    q, _, _, _, _, _, scale, *_ = args
    whole = attention.meaning(*args)[:1]
    keys, values = (x.repeat_interleave(3, 0) for x in keys_values(args, 0))
    parts = [slice(a, b) for a, b in zip([0, *cuts], [*cuts, 60], strict=True)]
    scores = [torch.einsum("hd,hld->hl", q[0], keys[:, p]) * scale for p in parts]
    outs = [torch.einsum("hl,hld->hd", s.softmax(-1), values[:, p]) for s, p in zip(scores, parts, strict=True)]
    lse = torch.stack([s.logsumexp(-1) for s in scores])[:, None]
    merged, _ = merge_states.meaning(torch.stack(outs)[:, None], lse, torch.float64)
    torch.testing.assert_close(merged, whole, **close)


def test_merging_parts_that_saw_nothing_gives_zero() -> None:
    outs, lse = torch.full((3, 2, 1, 8), torch.nan), torch.full((3, 2, 1), -torch.inf)
    outs[1, 0], lse[1, 0] = 5.0, -200.0
    out, whole = merge_states(outs, lse, torch.float32)
    assert bool((out[0] == 5).all()) and bool((out[1] == 0).all())
    assert whole.tolist() == [[-200.0], [-torch.inf]]


@pytest.mark.parametrize("static", [False, True])
def test_quantized_rows_are_those_of_quantize(static: bool) -> None:
    args = batch([(12, 2), (3, 5)], dtype=torch.bfloat16)
    scale, group = (torch.full((1,), 0.01), 0) if static else (None, 16)
    got = attention_quant.meaning(*args, torch.float8_e4m3fn, group, scale)
    rows = attention.meaning(*args).flatten(1)
    for ours, theirs in zip(got, quantize.meaning(rows, torch.float8_e4m3fn, group, scale), strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


def test_the_law_of_quantized_results_lets_ties_fall_either_way_and_nothing_else() -> None:
    """What one float8 key gives has four bits: a last bit of the scale moves an eighth of it."""
    codes = torch.arange(8, 126, dtype=torch.uint8)  # without subnormal ones and 448, which has no neighbour above
    middle = (codes.view(torch.float8_e4m3fn).float() + (codes + 1).view(torch.float8_e4m3fn).float()) / 2
    near, above, far = (middle * f for f in (1, 1 + 2**-22, 1.01))
    to_float8 = torch.float8_e4m3fn
    check_narrow(above.to(to_float8), near.to(to_float8), middle)
    for moved, unrounded in ((above, None), (far, middle * 1.01)):
        with pytest.raises(AssertionError, match="59 of 118 elements differ"):  # those that were rounded down
            check_narrow(moved.to(to_float8), near.to(to_float8), unrounded)
    values = torch.randn(4, 64).to(to_float8).float()
    with Rounding() as rounding:
        quantize.meaning(values, to_float8, 0)
    assert torch.equal(rounding.unrounded[4, 64], values / (values.abs().amax(1, keepdim=True) / 448))


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), min_size=1, max_size=3),
    st.sampled_from([0, 1, 5, -1, -7]),
)
def test_cost_counts_what_the_mask_lets_through(requests: list[tuple[int, int]], window: int) -> None:
    args = batch(requests, kv_heads=1, group=1, window=window, dtype=torch.float32)
    seen = read = 0
    for context, count in requests:
        mask = sees(torch.arange(context, context + count)[:, None], torch.arange(context + count), window)
        seen, read = seen + int(mask.sum()), read + int(mask.any(0).sum())
    cost = attention.cost(*args)
    assert cost.flops == 4 * seen * 16
    assert cost.bytes == 2 * args[0].nbytes + 2 * read * 16 * 4


def test_a_negative_softcap_is_an_error() -> None:
    args = batch([(3, 2)], dtype=torch.float32)
    with pytest.raises(ValueError, match="wanted softcap >= 0"):
        attention(*args[:7], softcap=-0.5)


def test_float8_cache_holds_values_over_their_scale_and_saturates() -> None:
    k = torch.tensor([1.0, -2.0, 1e5, -1e5, torch.nan, 0.3, 448.0, 0.0]).view(1, 1, 8).expand(1, 2, 8)
    caches = [torch.zeros(2, 2, 4, 8, dtype=torch.float8_e4m3fn) for _ in range(2)]
    k_scale, v_scale = torch.tensor([0.5, 2.0]), torch.tensor([4.0])
    kv_append(k, k, *caches, torch.tensor([6]), k_scale, v_scale)
    for cache, head, scale in ((0, 0, 0.5), (0, 1, 2.0), (1, 0, 4.0), (1, 1, 4.0)):
        wanted = (k[0, 0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).double()
        got = caches[cache].double()[1, head, 2]
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    assert all(bool((c.double()[0] == 0).all()) for c in caches)
    with pytest.raises(ValueError, match="a head dim that is a multiple of 16"):
        kv_append.run("cpp", k, k, *caches, torch.tensor([6]), k_scale, v_scale)
    with pytest.raises(ValueError, match="serves no scales there"):
        kv_append.run("cpp", k, k, *(c.float() for c in caches), torch.tensor([6]), k_scale, v_scale)
