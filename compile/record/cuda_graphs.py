"""The recorder of CUDA graphs: one between two seams, all of a runner's in one memory pool.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.cpu.tape import Tape, recording
from seamwise.kernels.cpu.tape_memory import Pool

from .recorder import OntoTape, Recorder, RecordingRefused


class CUDAGraphRecorder(Recorder):
    """Records CUDA graphs, one between two seams, in one memory pool.

    All are captured on one stream, because the allocator reuses a block only on the stream it was made on: so all
    recordings together take what the largest does. An anchor, a graph that is never replayed, keeps the pool in use:
    a pool whose graphs have all died cannot be captured into again.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        """`device` is a CUDA device, by default the current one."""
        index = torch.cuda.current_device() if device is None or device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.device)
        self.pools: list[Any] = []
        self._anchors: list[Any] = []
        self._open_pool()

    def _open_pool(self) -> None:
        """Capture from now on into a new pool. The recordings made so far keep theirs."""
        self.pools.append(torch.cuda.graph_pool_handle())
        anchor = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            anchor.capture_begin(pool=self.pools[-1], capture_error_mode="thread_local")
            torch.zeros(1, device=self.device)
            anchor.capture_end()
        self._anchors.append(anchor)

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
        return [s for pool in self.pools for s in torch.cuda.memory_snapshot(pool, include_traces=False)]

    @torch.inference_mode()
    def _run(
        self, function: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], full: bool
    ) -> tuple[Tape, Any]:
        """Warm up once on the recorder's stream, then capture there; what is captured is replayed at once.

        Raises what the function raised. A capture that CUDA has given up leaves its pool behind: the next one is new.
        """
        caller = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(caller)
        tape = _Graphs(self.pools[-1], self.device, full=full, arguments=arguments)
        with torch.cuda.stream(self._stream):
            function(*arguments)  # lazy initialization and autotuning must not be captured
            try:
                if full:  # what comes first may be a kernel that no op of torch announces
                    tape.begin()
                with recording(tape), _IntoGraphs(tape):
                    results = function(*given)
                tape.end()
            except BaseException:
                if tape.abandon():
                    self._open_pool()
                raise
        caller.wait_stream(self._stream)
        return tape, results


class _Graphs(Tape):
    """A tape of CUDA graphs and of the seams' calls between them. A graph begins where there is something to capture.

    A seam's result is copied into memory that the next graph allocates: from then on the graphs' pool may reuse it.
    """

    def __init__(self, handle: Any, device: torch.device, *, full: bool, arguments: Sequence[Any]) -> None:
        super().__init__(Pool(), full=full, arguments=arguments)
        self._handle, self._device = handle, device
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
        graph = self._graph
        graph.capture_end()
        self._graph = None
        for kept, now in self._late:
            kept.copy_(now)
        self._late.clear()
        self.append_call(graph.replay)
        graph.replay()

    def abandon(self) -> bool:
        """Give up the capture under way, if any, after an error; return whether its pool is lost with it.

        Where CUDA has invalidated the capture, ending it raises before the allocator is told: it must be told here, or
        it believes for ever that a capture is under way, and frees no memory any more.
        """
        if self._graph is None:
            return False
        graph, self._graph = self._graph, None
        self._late.clear()
        try:
            graph.capture_end()
        except RuntimeError:
            torch._C._cuda_endAllocateToPool(self._device.index, self._handle)
            torch._C._cuda_releasePool(self._device.index, self._handle)
            return True
        return False

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
