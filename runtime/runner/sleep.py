"""A runner that sleeps holds no memory worth speaking of: weights and KV cache go back to the system.

On a CPU the pages are given back and the addresses stay, so that recordings outlive it; on a GPU tensors are made anew
and recordings with them. Names are vLLM's: https://docs.vllm.ai/en/latest/features/sleep_mode.html.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TAGS = ("weights", "kv_cache")
_MADV_DONTNEED = 4


def discard(tensors: Iterable[Tensor]) -> None:
    """Give the pages of CPU tensors back; where they are stays theirs, and holds undefined values.

    Raises RuntimeError where the system has no such call.
    """
    if not sys.platform.startswith("linux"):
        raise RuntimeError(f"sleep: giving pages back is Linux's madvise, this is {sys.platform}")
    libc = ctypes.CDLL(None, use_errno=True)
    for tensor in tensors:
        extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        if extent != tensor.numel():
            continue  # what lies between its elements is another's
        first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages only: a neighbour has the rest
        size = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
        if size > 0 and libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_DONTNEED):
            raise RuntimeError(f"sleep: madvise failed with error {ctypes.get_errno()}")


class SavedWeights:
    """Values of weights, kept where they take no memory of the device: of a GPU's in the machine's, of a CPU's in a
    file that has no name and goes with the process."""

    def __init__(self, weights: Sequence[Tensor], folder: Path | None) -> None:
        """`folder` is where the file is made, where there is one; else where the system keeps such files."""
        self._on_cpu = [w.cpu() for w in weights] if weights and weights[0].is_cuda else None
        self._file: Any = None
        if self._on_cpu is None:
            where = folder if folder is not None and folder.is_dir() else None
            self._file = tempfile.TemporaryFile(dir=where)  # noqa: SIM115  # it lives until the weights are back
            for weight in weights:
                self._file.write(_bytes_of(weight.contiguous()))
            self._file.flush()

    def restore(self, weights: Sequence[Tensor]) -> None:
        """Write the values back. Raises RuntimeError where the file has lost some."""
        if self._on_cpu is not None:
            for weight, saved in zip(weights, self._on_cpu, strict=True):
                weight.copy_(saved)
            return
        self._file.seek(0)
        for weight in weights:
            read = weight if weight.is_contiguous() else torch.empty(weight.shape, dtype=weight.dtype)
            if self._file.readinto(_bytes_of(read)) != read.nbytes:
                raise RuntimeError("wake: the file of saved weights ends early; load the model again")
            if read is not weight:
                weight.copy_(read)
        self._file.close()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data
