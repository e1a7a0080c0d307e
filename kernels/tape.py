"""Record the CPU kernels of a step once and replay them with one call: the CPU's CUDA graph.

While a tape records, every C++ kernel that runs through `launch` is also written down, with its pointers, and
`empty` takes memory from the tape's own pool. The pool hands a block out again once no tensor refers to it, and keeps
it after recording, so a replay writes the same addresses in the same order. What runs outside `launch` is not on the
tape; the recorder in compile/ refuses it.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import cpp, versions

_MAX_ARGS = 32


class _Entry(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("number", ctypes.c_double), ("args", ctypes.c_int64 * _MAX_ARGS))


class Kernel:
    """One C++ entry point of a source file, compiled at the first call."""

    def __init__(self, source: str, symbol: str) -> None:
        self.source, self.symbol = Path(__file__).with_name(source), symbol

    @functools.cached_property
    def entry(self) -> Any:
        entry = getattr(cpp.load(self.source), self.symbol)
        entry.restype = ctypes.c_int64
        return entry

    @functools.cached_property
    def address(self) -> int:
        address = ctypes.cast(self.entry, ctypes.c_void_p).value
        assert address is not None
        return address


class Pool:
    """Memory for one or more tapes, which must not run at the same time."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []

    @property
    def num_bytes(self) -> int:
        return sum(b.numel() for b in self._blocks)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return uninitialized memory of the smallest block that is free and fits, or of a new one."""
        size = max(64, math.prod(shape) * dtype.itemsize)
        fitting = [b for b in self._blocks if size <= b.numel() <= 2 * size and versions.storage_users(b) == 1]
        block = min(fitting, key=Tensor.numel) if fitting else torch.empty(-(-size // 64) * 64, dtype=torch.uint8)
        if not fitting:
            self._blocks.append(block)
        return block[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class Tape:
    """A recorded sequence of kernel calls. `replay` runs it; addresses are those of the recording."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.kept: list[Tensor] = []  # what the calls read and write, so that it stays where it is
        self._calls: list[tuple[Kernel, tuple[int | float, ...]]] = []
        self._entries: Any = None

    def __len__(self) -> int:
        return len(self._calls)

    def append(self, kernel: Kernel, args: tuple[int | float, ...]) -> None:
        self._calls.append((kernel, args))

    def replay(self) -> None:
        """Run every call. Raises RuntimeError naming the kernel that reports bad input."""
        if self._entries is None:
            self._entries = (_Entry * len(self._calls))(*map(_entry, self._calls))
        error = ctypes.c_int64()
        failed = _replay()(self._entries, ctypes.c_int64(len(self._calls)), ctypes.byref(error))
        if failed:
            kernel, _ = self._calls[failed - 1]
            raise RuntimeError(f"{kernel.symbol}: call {failed - 1} of the tape reports error {error.value} in its input")


_recording: Tape | None = None


@contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """Record on `tape` within the context. Raises RuntimeError when another recording is under way."""
    global _recording
    if _recording is not None:
        raise RuntimeError("a tape is being recorded already; recordings do not nest")
    _recording = tape
    try:
        yield
    finally:
        _recording = None


def launch(kernel: Kernel, *args: int | float) -> int:
    """Call a kernel with integers, addresses and at most one float; return its status. Recorded when a tape records."""
    status = kernel.entry(*[ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_double(a) for a in args])
    if _recording is not None:
        _recording.append(kernel, args)
    return int(status)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return uninitialized CPU memory: from the recording tape's pool, else torch's."""
    return torch.empty(shape, dtype=dtype) if _recording is None else _recording.pool.empty(shape, dtype)


def is_recording() -> bool:
    return _recording is not None


@functools.cache
def _replay() -> Any:
    entry = cpp.load(Path(__file__).with_name("tape.cpp")).seamwise_replay
    entry.restype = ctypes.c_int64
    return entry


def _entry(call: tuple[Kernel, tuple[int | float, ...]]) -> _Entry:
    kernel, args = call
    integers = [a for a in args if isinstance(a, int)]
    numbers = [a for a in args if not isinstance(a, int)]
    if len(integers) > _MAX_ARGS or len(numbers) > 1:
        raise RuntimeError(f"{kernel.symbol}: a tape holds {_MAX_ARGS} integers and one float a call, got {args}")
    return _Entry(kernel.address, numbers[0] if numbers else 0.0, (ctypes.c_int64 * _MAX_ARGS)(*integers))
