"""The memory of recordings is never handed out while in use, and reused when free."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
