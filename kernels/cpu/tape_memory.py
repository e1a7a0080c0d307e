"""The memory of recordings: results of a tape's calls, at the same addresses at every replay."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from seamwise.kernels import versions


class Pool:
    """Memory for one or more tapes, which must not run at the same time."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._addresses: set[int] = set()

    @property
    def num_bytes(self) -> int:
        return sum(b.numel() for b in self._blocks)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return uninitialized memory of the smallest block that is free and fits, or of a new one."""
        size = max(64, math.prod(shape) * dtype.itemsize)
        with _disable_current_modes():
            fitting = [b for b in self._blocks if size <= b.numel() <= 2 * size and versions.storage_users(b) == 1]
            block = min(fitting, key=Tensor.numel) if fitting else torch.empty(-(-size // 64) * 64, dtype=torch.uint8)
            if not fitting:
                self._blocks.append(block)
                self._addresses.add(block.data_ptr())
            return block[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    def place(self, given: Tensor) -> Tensor:
        """Return a copy in this memory, with the same strides."""
        if not given.numel():
            return given
        extent = 1 + sum((n - 1) * step for n, step in zip(given.shape, given.stride(), strict=True))
        return self.empty((extent,), given.dtype).as_strided(given.shape, given.stride()).copy_(given)

    def borrow(self, given: Tensor) -> Tensor:
        """Return a tensor that does not count as a user of its memory, if it is this one: it may be given out again."""
        if not given.numel():  # of no elements, but it may be a view of some
            return torch.empty_like(given)
        storage = given.untyped_storage()
        if storage.data_ptr() not in self._addresses:
            return given
        memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
        memory.pool = self  # type: ignore[attr-defined]  # keeps it
        base = torch.frombuffer(memory, dtype=torch.uint8)[: storage.nbytes() // given.itemsize * given.itemsize]
        return base.view(given.dtype).as_strided(given.shape, given.stride(), given.storage_offset())

    def live(self) -> set[int]:
        """Return the addresses of the blocks that tensors refer to."""
        return {b.data_ptr() for b in self._blocks if versions.storage_users(b) > 1}

    def poison(self) -> None:
        """Fill all memory with the bits of NaN, so that reading what a replay did not write shows."""
        for block in self._blocks:
            block.fill_(0xFF)


class StepMemory:
    """What the large results of unrecorded steps take, kept from one step to the next of as many tokens: given back to
    the system's allocator and taken anew, it would leave holes, which small things fill, and the next step take more.
    """

    def __init__(self) -> None:
        self._pool, self._num_tokens = Pool(), 0

    def of(self, num_tokens: int) -> Pool:
        """Return the memory of a step of so many tokens; that of another number of tokens is given back."""
        if num_tokens != self._num_tokens:
            self.give_back()
            self._num_tokens = num_tokens
        return self._pool

    def give_back(self) -> None:
        """Give back what no result is in any more."""
        self._pool, self._num_tokens = Pool(), 0
