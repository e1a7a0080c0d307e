"""The memory of recordings is never handed out while in use, and reused when free."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seamwise.kernels.cpu import tape
from seamwise.kernels.cpu.tape_memory import Pool


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
    with tape.reusing_memory():
        first, kept = (tape.empty((count,), torch.float32).fill_(i) for i in range(2))
        address = first.data_ptr()
        del first
        again = tape.empty((2, count // 2), torch.float32).fill_(2)
        assert again.data_ptr() == address != kept.data_ptr()
        assert tape.empty((count,), torch.float32).data_ptr() not in (address, kept.data_ptr())
        with tape.reusing_memory():
            assert tape.empty((count,), torch.float32).fill_(3).data_ptr() not in (address, kept.data_ptr())
        del again
        assert tape.empty((count,), torch.float32).data_ptr() == address
        assert not tape._recording.pool._addresses & {tape.empty((count - 1,), torch.float32).data_ptr()}  # type: ignore
    assert bool((kept == 1).all()) and tape._recording.pool is None
