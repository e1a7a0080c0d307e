"""Record a function once on static buffers, replay it cheaply: one protocol, CUDA graphs and the CPU's tape.

The rules are those of CUDA graphs on both devices, because a model that keeps them on a CPU keeps them on a GPU:
- a tensor argument must be where it was at the recording (an address that moved is refused);
- any other argument is part of what was recorded, and a different one is refused;
- a seam may be recorded only where the caller says that the whole step is (`full`);
- results live in memory the recorder owns, and are valid until the next replay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from seamwise.kernels.contract import contract_of
from seamwise.kernels.tape import Pool, Tape, call, recording


class RecordingRefused(RuntimeError):
    """What was asked cannot be replayed faithfully."""


class Recording:
    """A recorded call. `replay(*arguments)` checks the arguments against the rules, runs, and returns the results."""

    def __init__(self, graph: Tape | torch.cuda.CUDAGraph, arguments: Sequence[Any], results: Any) -> None:
        self.graph, self.results = graph, results
        self._seen = [_identity(a) for a in arguments]

    @torch.inference_mode()
    def replay(self, *arguments: Any) -> Any:
        """Run again on the recorded arguments' new contents. Raises RecordingRefused when an argument differs."""
        if len(arguments) != len(self._seen):
            raise RecordingRefused(f"replay: got {len(arguments)} arguments, {len(self._seen)} were recorded")
        for i, (argument, seen) in enumerate(zip(arguments, self._seen, strict=True)):
            if (now := _identity(argument)) != seen:
                raise RecordingRefused(_difference(i, now, seen))
        self.graph.replay()
        return self.results


class Recorder(Protocol):
    """Records calls; all recordings of one recorder share memory, so only the newest results are valid."""

    def record(self, function: Callable[..., Any], *arguments: Any, full: bool = False) -> Recording: ...


class CPURecorder:
    """Records C++ kernels on a tape, and any other op as a call of torch whose result is copied to a static place."""

    def __init__(self) -> None:
        self.pool = Pool()

    def record(self, function: Callable[..., Any], *arguments: Any, full: bool = False) -> Recording:
        """Run `function(*arguments)` once and return its recording. Raises RecordingRefused for what breaks a rule."""
        tape = Tape(self.pool, full=full)
        with recording(tape), _OntoTape(tape):
            results = function(*arguments)
        return Recording(tape, arguments, tree_map(_alias, results))


class CUDAGraphRecorder:
    """Records CUDA graphs in one memory pool; capture the largest first, so that smaller ones fit in its memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[..., Any], *arguments: Any, full: bool = False) -> Recording:
        """Warm up once on a side stream, then capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function(*arguments)  # lazy initialization and autotuning must not be captured
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with _NoSeams(full), torch.cuda.graph(graph, pool=self.pool):
            results = function(*arguments)
        return Recording(graph, arguments, results)


def recorder_for(device: torch.device) -> CPURecorder | CUDAGraphRecorder:
    """Return the recorder of a device."""
    return CUDAGraphRecorder() if device.type == "cuda" else CPURecorder()


class _OntoTape(TorchDispatchMode):
    """Puts every ATen op that computes onto the tape; views need none, for memory stays where it is."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (record := contract_of(func)) is not None and record.choose((*args, *kwargs.values())).name != "cpp":
            return call(lambda *given: func(*given, **kwargs), *args, seam=record.name if record.seam else "")
        result = func(*args, **kwargs)
        if record is not None or func is torch.ops.aten.sym_size.int:  # sizes are the recording's own
            return result
        if func._schema.is_mutable:  # its result is its argument, as a view's is
            self.tape.append_call(lambda: func(*args, **kwargs))
            return result
        if _is_view(result, args):
            return result
        results = [result] if isinstance(result, Tensor) else result
        if not (isinstance(results, (list, tuple)) and all(isinstance(r, Tensor) for r in results)):
            if not any(isinstance(a, Tensor) for a in tree_leaves((args, kwargs))):
                return result  # of no tensor (aten.promote_types): it cannot change
            raise RecordingRefused(
                f"{func} gives {type(result).__name__}, not a tensor: its value now would be replayed for ever"
            )
        if func in _ALLOCATIONS:
            return result

        def again() -> None:
            new = func(*args, **kwargs)
            if func.namespace == "_c10d_functional":  # it returns before the other ranks have answered
                new = torch.ops._c10d_functional.wait_tensor(new)
            for kept, now in zip(results, [new] if isinstance(new, Tensor) else new, strict=True):
                kept.copy_(now)

        self.tape.append_call(again)
        return result


_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}  # fmt: skip


class _NoSeams(TorchDispatchMode):
    """Refuses a seam's op while a piece is being captured."""

    def __init__(self, full: bool) -> None:
        super().__init__()
        self.full = full

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        record = contract_of(func)
        if record is not None and record.seam and not self.full:
            raise RecordingRefused(f"{record.name}: a seam was captured inside a piece; seams run between pieces")
        return func(*args, **(kwargs or {}))


def _alias(result: Any) -> Any:
    """Return a tensor over the same memory that does not count as a user of it: the pool may give it out again."""
    if not isinstance(result, Tensor) or not result.numel():
        return result
    size = result.untyped_storage().nbytes()
    base = torch.frombuffer((ctypes.c_char * size).from_address(result.untyped_storage().data_ptr()), dtype=torch.uint8)
    return base.view(result.dtype).as_strided(result.shape, result.stride(), result.storage_offset())


def _is_view(result: Any, args: Any) -> bool:
    """Return whether all results lie in an argument's memory. (An op's schema says only that they may.)"""
    results = [result] if isinstance(result, Tensor) else result
    if not isinstance(results, (list, tuple)) or not all(isinstance(r, Tensor) for r in results):
        return False
    held = {a.untyped_storage()._cdata for a in tree_leaves(args) if isinstance(a, Tensor)}
    return all(r.untyped_storage()._cdata in held for r in results)


def _identity(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr(), tuple(argument.shape), argument.stride(), argument.dtype
    return argument


def _difference(position: int, now: Any, seen: Any) -> str:
    if isinstance(now, tuple) and isinstance(seen, tuple) and now[1:] == seen[1:]:
        return (
            f"argument {position}, {now[3]} {now[1]}, has moved from address {seen[0]:#x} to {now[0]:#x} since the"
            " recording; write into the recorded buffer, or record again"
        )
    return f"argument {position} is {now}, recorded was {seen}: make it part of the key, or record again"
