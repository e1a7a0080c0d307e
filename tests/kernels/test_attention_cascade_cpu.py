"""Requests whose block tables begin alike attend to these blocks together: the same bits, and most tiles spared."""

from itertools import pairwise, product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import using
from test_attention_cpu import Step, assert_within_budget, keep_thread_count, make_step  # noqa: F401

from seamwise.kernels.cpu import instruction_set
from seamwise.kernels.cpu.attention_cpu import cascade

TILE, MOST_ROWS, LEAST_SPARED = 64, 24, 24 * 64  # attention_cpu_plan.h, attention_cpu_cascade.h

request = st.one_of(
    st.tuples(st.integers(0, 1100), st.integers(1, 3)),  # decode, with drafts
    st.tuples(st.integers(64, 500), st.integers(7, 40)),  # chunk
    st.just((0, 0)),  # padded
)


def share(step: Step, shared: list[tuple[int, int]], block_size: int) -> None:
    """Let request i + 1 begin with as many whole blocks as `shared[i]` says of an earlier one's, at most all it has."""
    table, lengths = step.block_table_RB, step.seq_lens_R.tolist()
    for r, (of, tokens) in enumerate(shared[: len(table) - 1], 1):
        blocks = min(tokens, lengths[of % r], lengths[r]) // block_size
        table[r, :blocks] = table[of % r, :blocks]


def most_spared(step: Step, block_size: int) -> int:
    """Return the tiles that the best grouping spares, of all groupings."""
    starts, lengths, table = step.query_starts_S.tolist(), step.seq_lens_R.tolist(), step.block_table_RB.tolist()
    queries = [last - first for first, last in pairwise(starts)]
    kv_heads, dim = step.k_cache.shape[1], step.k_cache.shape[3]
    may = [r for r, n in enumerate(queries) if 0 < n * step.q_THD.shape[1] <= MOST_ROWS * kv_heads]

    def spared(group: list[int]) -> int:
        rows = [table[r] for r in group]
        same = next((j for j, ids in enumerate(zip(*rows, strict=True)) if len({*ids}) > 1), len(rows[0]))
        tiles = min(same * block_size // TILE, *((lengths[r] - queries[r]) // TILE for r in group))
        found = (len(group) - 1) * tiles
        return found if found * kv_heads * dim >= LEAST_SPARED else 0

    def best(left: list[int]) -> int:
        if not left:
            return 0
        one, *others = left
        with_one = product([False, True], repeat=len(others))
        return max(
            spared([one, *(r for r, taken in zip(others, which, strict=True) if taken)])
            + best([r for r, taken in zip(others, which, strict=True) if not taken])
            for which in with_one
        )

    return best(may) if not step.window else 0


def run(step: Step, threads: int) -> tuple[torch.Tensor, int]:
    """Return the step's result with cascade attention, and the tiles spared."""
    counter = torch.zeros(1, dtype=torch.int64)
    with cascade(counter):
        return step.run(threads), int(counter)


@settings(max_examples=40, deadline=None)
@given(
    requests=st.lists(request, min_size=2, max_size=6).filter(lambda r: any(n for _, n in r)),
    shared=st.lists(st.tuples(st.integers(0, 4), st.sampled_from([0, 100, 300, 700, 2000])), min_size=5, max_size=5),
    kv_heads=st.sampled_from([1, 3, 8]),
    group=st.sampled_from([1, 3, 3, 12]),
    dim=st.sampled_from([16, 64, 80]),
    block_size=st.sampled_from([8, 16, 128]),
    options=st.fixed_dictionaries({
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "seed": st.integers(0, 2**31),
        "window": st.sampled_from([0, 0, 0, 90, -128]),
        "softcap": st.sampled_from([0.0, 1.5]),
        "sinks": st.sampled_from([None, torch.float32]),
        "float8": st.sampled_from(["", "head"]),
        "padding": st.integers(0, 3),
    }),
)  # fmt: skip
def test_bits_are_the_same_and_most_tiles_are_spared(
    requests: list[tuple[int, int]], shared: list[tuple[int, int]], kv_heads: int, group: int, dim: int,
    block_size: int, options: dict[str, Any],
) -> None:  # fmt: skip
    step = make_step(requests, kv_heads=kv_heads, group=group, dim=dim, block_size=block_size, **options)
    if not step.window:
        share(step, shared, block_size)
    alone = step.run(threads=2)
    for threads in (1, 2):
        out, spared = run(step, threads)
        assert torch.equal(out, alone)
        assert spared == most_spared(step, block_size)


@pytest.mark.parametrize("name", instruction_set.FLAGS)
def test_every_vector_width(name: str) -> None:
    if name not in instruction_set.runnable():
        pytest.skip(f"this machine does not run {name}")
    with using(name):
        for dtype, float8 in product([torch.float32, torch.bfloat16], ["", "head"]):
            requests = [(700, 1)] * 9 + [(650, 5), (900, 20), (640, 8)]
            step = make_step(requests, dtype=dtype, float8=float8, sinks=torch.float32, softcap=2.0)
            share(step, [(0, 640)] * 11, 16)
            alone = step.run()
            assert_within_budget(step, alone)
            for threads in (1, 2):
                out, spared = run(step, threads)
                assert torch.equal(out, alone) and spared == 10 * 10


@pytest.mark.parametrize(
    ("requests", "shared", "window", "spared"),
    [
        ([(1000, 1)] * 8, [64, *[640, 960] * 3], 0, 3 * 10 + 3 * 15),  # two groups, not one of a tile
        ([(1000, 1)] * 2, [512], 0, 8),
        ([(1000, 1)] * 2, [496], 0, 0),  # worth less than another turn of the threads
        ([(1500, 1)] * 2, [640], 0, 10),  # few, so that what each has alone is spread over threads
        ([(637, 3)] * 2, [640], 0, 9),  # not all of them see the last tile
        ([(1000, 1), (1000, 9), (1000, 1)], [960, 960], 0, 15),  # rows enough that packing is a small part
        ([(1000, 1)] * 3, [960, 960], 90, 0),
        ([(1000, 1)] * 3, [960, 960], -128, 0),
    ],
)
def test_who_shares_what(requests: list[tuple[int, int]], shared: list[int], window: int, spared: int) -> None:
    step = make_step(requests)
    share(step, [(r % 2, tokens) for r, tokens in enumerate(shared, 1)], 16)  # every other one is alike
    step.window = window
    alone = step.run()
    for threads in (1, 2):
        out, found = run(step, threads)
        assert torch.equal(out, alone) and found == spared
