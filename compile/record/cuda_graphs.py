"""The recorder of CUDA graphs: one between two seams, all of a runner's in one memory pool.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.cpu.pool import Pool
from seamwise.kernels.cpu.tape import Tape, recording

from .recorder import OntoTape, Recorder, RecordingRefused


class CUDAGraphRecorder(Recorder):
    """Records CUDA graphs, one between two seams, in one memory pool."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    @property
    def num_bytes(self) -> int:  # type: ignore[override]
        return sum(segment["total_size"] for segment in self._segments())

    def live(self) -> set[int]:
        found = set()
        for segment in self._segments():
            address = segment["address"]
            for block in segment["blocks"]:
                if block["state"] == "active_allocated":
                    found.add(address)
                address += block["size"]
        return found

    def _segments(self) -> list[Any]:
        return [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) == tuple(self.pool)]

    @torch.inference_mode()
    def _run(
        self, function: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], full: bool
    ) -> tuple[Tape, Any]:
        """Warm up once on a side stream, then capture there; what is captured is replayed at once."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        tape = _Graphs(self.pool, full=full, arguments=arguments)
        with torch.cuda.stream(stream):
            function(*arguments)  # lazy initialization and autotuning must not be captured
            try:
                with recording(tape), _IntoGraphs(tape):
                    results = function(*given)
            finally:
                tape.end()
        torch.cuda.current_stream().wait_stream(stream)
        return tape, results


class _Graphs(Tape):
    """A tape of CUDA graphs and of the seams' calls between them. A graph begins where there is something to capture.

    A seam's result is copied into memory that the next graph allocates: from then on the graphs' pool may reuse it.
    """

    def __init__(self, handle: Any, *, full: bool, arguments: Sequence[Any]) -> None:
        super().__init__(Pool(), full=full, arguments=arguments)
        self._handle = handle
        self._graph: torch.cuda.CUDAGraph | None = None
        self._late: list[tuple[Tensor, Tensor]] = []

    def append(self, kernel: Any, args: Any) -> None:
        raise RecordingRefused(f"{kernel.symbol}: a kernel of the CPU cannot be captured in a CUDA graph")

    def begin(self) -> None:
        """Capture what follows, until a seam."""
        if self._graph is None:
            graph = torch.cuda.CUDAGraph()
            # By thread: other runners go on meanwhile.
            graph.capture_begin(pool=self._handle, capture_error_mode="thread_local")
            self._graph = graph

    def end(self) -> None:
        """End the capture under way, if any, and run it: what follows reads its results."""
        if self._graph is None:
            return
        graph, self._graph = self._graph, None
        graph.capture_end()
        for kept, now in self._late:
            kept.copy_(now)
        self._late.clear()
        self.append_call(graph.replay)
        graph.replay()

    def piece(self, function: Callable[..., Any], *args: Any) -> Any:
        self.begin()
        return super().piece(function, *args)

    def call(self, function: Callable[..., Any], args: Sequence[Any], *, seam: bool) -> Any:
        if self.full or not seam:
            self.begin()
            return function(*args)
        self.end()
        return super().call(function, args, seam=seam)

    def place(self, given: Tensor) -> Tensor:
        self.begin()
        kept = torch.empty_like(given)
        self._late.append((self.borrow(kept), given))
        return kept

    def borrow(self, given: Tensor) -> Tensor:
        """Return a tensor over the same memory that does not keep it: as in a graph, its owner must."""
        if not given.numel():
            return torch.empty_like(given)
        storage = given.untyped_storage()
        base = torch.as_tensor(_Memory(storage.data_ptr(), storage.nbytes()), device=given.device)
        base = base[: storage.nbytes() // given.itemsize * given.itemsize]
        return base.view(given.dtype).as_strided(given.shape, given.stride(), given.storage_offset())


class _Memory:
    """Bytes of a CUDA device, as a tensor may be made of them that does not own them.

    Source: https://numba.readthedocs.io/en/stable/cuda/cuda_array_interface.html
    """

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,), "typestr": "|u1", "data": (address, False), "strides": None, "version": 2,
        }  # fmt: skip


class _IntoGraphs(OntoTape):
    """Captures every op."""

    tape: _Graphs

    def loose(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not func.is_view:  # between two seams there may be nothing else
            self.tape.begin()
        return func(*args, **kwargs)
