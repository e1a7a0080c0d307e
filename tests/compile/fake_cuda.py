"""CUDA's rules of capture without a device: streams, pools counted in use, captures that an error invalidates.

What torch's allocator asserts, as read in its sources: a pool may be captured into while a graph of it lives or when it
is new; a capture that CUDA invalidated raises from capture_end before the allocator is told, and until it is told no
memory is freed (`empty_cache` asserts).
Source: https://github.com/pytorch/pytorch/blob/v2.11.0/c10/cuda/CUDACachingAllocator.cpp, CUDAGraph.cpp
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch


class FakeCUDA:
    """Stands for torch.cuda; `said` is what graphs were told, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.said: list[str] = []
        self.use_count: dict[Any, int] = {}
        self.capturing_into: list[Any] = []
        self.invalidated = False
        self.streams: list[Any] = []
        self.current: Any = "default"
        self.streams_captured: set[Any] = set()
        cuda = torch.cuda
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: Graph(self))
        monkeypatch.setattr(cuda, "Stream", lambda device=None: Stream(self))
        monkeypatch.setattr(cuda, "current_device", lambda: 0)
        monkeypatch.setattr(cuda, "current_stream", lambda device=None: Stream(self))
        monkeypatch.setattr(cuda, "stream", self.on)
        monkeypatch.setattr(cuda, "graph_pool_handle", lambda: (0, len(self.use_count) + 1))
        monkeypatch.setattr(cuda, "memory_snapshot", lambda pool=None, include_traces=True: [])
        monkeypatch.setattr(cuda, "empty_cache", self.empty_cache)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocate, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)
        real = torch.zeros
        monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: real(*a, **k))

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def empty_cache(self) -> None:
        assert not self.capturing_into, "captures_underway.empty() INTERNAL ASSERT FAILED"

    def end_allocate(self, device: int, pool: Any) -> None:
        self.capturing_into.remove(pool)

    def release(self, device: int, pool: Any) -> None:
        assert self.use_count[pool] > 0
        self.use_count[pool] -= 1


class Stream:
    def __init__(self, cuda: FakeCUDA) -> None:
        cuda.streams.append(self)

    def wait_stream(self, other: Any) -> None:
        pass


class Graph:
    def __init__(self, cuda: FakeCUDA) -> None:
        self.cuda = cuda

    def capture_begin(self, *, pool: Any, capture_error_mode: str) -> None:
        cuda = self.cuda
        assert cuda.use_count.get(pool, 1) > 0, "use_count > 0 INTERNAL ASSERT FAILED"
        assert not cuda.capturing_into
        cuda.use_count[pool] = cuda.use_count.get(pool, 0) + 1
        cuda.capturing_into.append(pool)
        cuda.streams_captured.add(cuda.current)
        cuda.said.append("begin")
        self.pool = pool

    def capture_end(self) -> None:
        cuda = self.cuda
        if cuda.invalidated:
            cuda.invalidated = False
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        cuda.end_allocate(0, self.pool)
        cuda.said.append("end")
        weakref.finalize(self, cuda.release, 0, self.pool)

    def replay(self) -> None:
        self.cuda.said.append("replay")
