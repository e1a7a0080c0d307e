"""The Triton kernels of multi-head latent attention: ragged batches, splits, strided queries."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import check
from torch import Tensor

from seamwise.kernels import mla_decode, mla_prefill
from seamwise.kernels.attn.mla_decode_triton import num_splits
from seamwise.kernels.attn.mla_prefill import absorbs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@settings(max_examples=12 if DEVICE == "cpu" else 60)
@given(
    requests=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), min_size=1, max_size=4),
    heads=st.sampled_from([1, 5, 20]), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31 - 1),
)  # fmt: skip
def test_ragged_batches(requests: list[tuple[int, int]], heads: int, dtype: torch.dtype, seed: int) -> None:
    q, *batch = ragged(requests, heads, 48, dtype, seed)
    (out,) = check(mla_decode, "triton", (q, *batch, 0.2, 32, None))
    assert not bool(out[-2:].any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("requests", [[(0, 30), (7, 0), (13, 20)], [(5, 1), (40, 33)], [(9, 2), (0, 1)]])
def test_ragged_prefill(requests: list[tuple[int, int]], dtype: torch.dtype) -> None:
    """The first two expand the step's own tokens, the last is absorbed."""
    q, cache, *batch = ragged(requests, 2, 48, dtype, 0)
    kv_b = torch.randn(2, 16, 40, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    assert absorbs(q[..., :8], q[..., 8:16], kv_b, len(requests)) == (requests[0] == (9, 2))
    (out,) = check(mla_prefill, "triton", (q[..., :8], q[..., 8:16], cache, kv_b, *batch, 0.2, None))
    assert not bool(out[-2:].any()) and bool(out[:-2].any())


def ragged(
    requests: list[tuple[int, int]], heads: int, width: int, dtype: torch.dtype, seed: int
) -> tuple[Tensor, ...]:
    """Requests of (context, queries); slots that no token owns are NaN; two rows belong to no request."""
    generator = torch.Generator().manual_seed(seed)
    lengths, block = [a + b for a, b in requests], 4
    owned = [-(-n // block) for n in lengths]
    table = torch.zeros(len(requests), max(1, *owned), dtype=torch.int32)
    cache = torch.full((sum(owned) + 1, block, width), torch.nan)
    order = torch.randperm(sum(owned), generator=generator).to(torch.int32) + 1
    for r, blocks in enumerate(order.split(owned)):
        table[r, : owned[r]] = blocks
        for position in range(lengths[r]):
            cache[int(blocks[position // block]), position % block] = torch.randn(width, generator=generator)
    starts = torch.tensor([0, *torch.tensor([b for _, b in requests]).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(int(starts[-1]) + 2, heads, width + 8, generator=generator)[..., :width]
    args = (q.to(dtype), cache.to(dtype), table, torch.tensor(lengths, dtype=torch.int32), starts)
    return tuple(a.to(DEVICE) for a in args)


@pytest.mark.parametrize("queries", [1, 3])
def test_few_requests_split_their_keys(queries: int) -> None:
    """Lengths of 1100 over tables of 1104 columns: four splits, of which the short request leaves three empty."""
    sizes = {"R": 1, "queries": queries, "context": 1100, "H": 3, "C": 32, "rope": 16, "P": 16}
    q, cache, table, lengths, starts, *rest = mla_decode.make_inputs(sizes, dtype=torch.float32, device=DEVICE)
    assert num_splits(1, table.shape[1] * 16) == 4
    check(mla_decode, "triton", (q, cache, table, lengths, starts, *rest))
    for length in (queries, 40):
        check(mla_decode, "triton", (q, cache, table, torch.full_like(lengths, length), starts, *rest))


def test_the_number_of_splits_is_a_power_of_two_within_bounds() -> None:
    assert [num_splits(p, k) for p, k in ((1, 100), (1, 1 << 20), (3, 1 << 20), (100, 1 << 20), (300, 1 << 20))] == [
        1, 32, 32, 2, 1,
    ]  # fmt: skip
