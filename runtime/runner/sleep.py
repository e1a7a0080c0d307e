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

from seamwise.compile.program import Executable
from seamwise.runtime.build.runner_config import RunnerConfig

from .adapter_slots import AdapterSlots
from .kv_cache import KVCache
from .update_weights import WeightUpdates

TAGS = ("weights", "kv_cache")
_MADV_DONTNEED = 4


class Sleep:
    """Puts a runner's weights and KV cache to sleep, and wakes them; no step may be running.

    asleep  which of TAGS have no memory now
    """

    def __init__(
        self, executable: Executable, options: RunnerConfig, kv: KVCache, weights: WeightUpdates, adapters: AdapterSlots
    ) -> None:  # fmt: skip
        self.asleep: set[str] = set()
        self._executable, self._kv, self._weights, self._adapters = executable, kv, weights, adapters
        self._device, self._folder = torch.device(options.device), options.pack_dir
        self._shapes = [torch.empty_like(w, device="meta") for w in executable.weights]
        self._saved: SavedWeights | None = None

    def begin(self, level: int) -> None:
        """Give back the memory of both. See ModelRunner.sleep."""
        if level not in (1, 2):
            raise ValueError(f"sleep: level={level!r}; wanted 1 (weights come back) or 2 (weights are given anew)")
        if "weights" not in self.asleep:
            if level == 1:
                self._saved = SavedWeights(self._executable.weights, self._folder)
            else:
                self._weights.lost = {*self._executable.program.recipes}
                self._weights.waiting.clear()
        if self._device.type == "cpu":
            discard([*self._executable.weights, *self._kv.flat])
        else:
            self._executable.weights = [w.new_empty(0) for w in self._executable.weights]
            self._kv.hold([], self._kv.num_blocks)
            torch.cuda.empty_cache()
        self.asleep = {*TAGS}

    def end(self, tags: Iterable[str] | None) -> None:
        """Take memory for these again; a GPU's KV cache is left to be allocated."""
        asked = {*TAGS} if tags is None else {*tags}
        if wrong := asked - {*TAGS}:
            raise ValueError(f"wake: got tags {sorted(wrong)}, wanted of {', '.join(map(repr, TAGS))}")
        if "weights" in asked & self.asleep:
            if self._device.type != "cpu":
                self._executable.weights = [torch.empty_like(w, device=self._device) for w in self._shapes]
            if self._saved is not None:
                with torch.inference_mode():
                    self._saved.restore(self._executable.weights)
                self._saved = None
            else:
                self._weights.restore_computed()
                self._adapters.restore()
        self.asleep -= asked


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
