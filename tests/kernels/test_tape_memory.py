"""Memory of recordings, steps and weights is never handed out while in use; what is free is used or given back."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seamwise.kernels.cpu import huge_pages, tape
from seamwise.kernels.cpu.tape_memory import Pool, StepMemory


@pytest.fixture(autouse=True)
def _inference() -> Any:
    with torch.inference_mode():
        yield


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 600), st.booleans()), max_size=40))
def test_the_pool_never_hands_out_memory_in_use(requests: list[tuple[int, bool]]) -> None:
    pool, live = Pool(), []
    for i, (size, keep) in enumerate(requests):
        tensor = pool.empty((size,), torch.float32)
        tensor.fill_(i)
        if keep:
            live.append((i, tensor[size // 2 :]))  # a view keeps its memory too
        del tensor
    assert all(bool((view == i).all()) for i, view in live)


def test_the_pool_reuses_what_is_free() -> None:
    pool = Pool()
    first = pool.empty((100,), torch.float32).data_ptr()
    assert pool.empty((100,), torch.float32).data_ptr() == first


def test_large_results_of_a_step_take_the_memory_of_those_that_are_gone() -> None:
    count = tape.LARGE_BYTES // 4
    with tape.reusing_memory(Pool()):
        first, kept = (tape.empty((count,), torch.float32).fill_(i) for i in range(2))
        address = first.data_ptr()
        del first
        again = tape.empty((2, count // 2), torch.float32).fill_(2)
        assert again.data_ptr() == address != kept.data_ptr()
        assert tape.empty((count,), torch.float32).data_ptr() not in (address, kept.data_ptr())
        with tape.reusing_memory(Pool()):
            assert tape.empty((count,), torch.float32).fill_(3).data_ptr() not in (address, kept.data_ptr())
        del again
        assert tape.empty((count,), torch.float32).data_ptr() == address
        assert not tape._recording.pool._addresses & {tape.empty((count - 1,), torch.float32).data_ptr()}  # type: ignore
    assert bool((kept == 1).all()) and tape._recording.pool is None


def test_what_a_mapping_of_huge_pages_has_left_is_given_back_when_the_next_begins() -> None:
    kept = huge_pages.empty((1000,), torch.float32).fill_(1)
    pages, used = huge_pages._chunk.pages(), huge_pages._chunk.used  # type: ignore[misc]
    assert pages is not None
    page = -(-used // mmap.PAGESIZE) * mmap.PAGESIZE
    pages[page:] = b"1" * (len(pages) - page)
    huge_pages.empty((len(pages),), torch.uint8)
    assert pages[page:].count(0) == len(pages) - page and bool((kept == 1).all())


def test_steps_of_as_many_tokens_share_memory_and_others_give_it_back() -> None:
    memory, count = StepMemory(), tape.LARGE_BYTES // 4
    with tape.reusing_memory(memory.of(8)):
        kept, gone = (tape.empty((count,), torch.float32).fill_(i) for i in range(2))
        addresses = [kept.data_ptr(), gone.data_ptr()]
    del gone
    with tape.reusing_memory(memory.of(8)):
        assert tape.empty((count,), torch.float32).fill_(2).data_ptr() == addresses[1]
    assert memory.of(8).num_bytes == 2 * tape.LARGE_BYTES and memory.of(9).num_bytes == 0
    assert memory.of(8).num_bytes == 0 and bool((kept == 0).all())
