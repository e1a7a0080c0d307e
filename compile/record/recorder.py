"""Record a function once on static buffers, replay it cheaply: one protocol, CUDA graphs and the CPU's tape.

The rules are those of CUDA graphs on both devices, because a model that keeps them on a CPU keeps them on a GPU:
- a tensor argument must be where it was at the recording (an address that moved is refused), unless only seams read
  it and it is said to vary;
- any other argument is part of what was recorded, and a different one is refused;
- a seam is recorded only where the caller says that the whole step is (`full`); else the recording breaks there, the
  seam is called at each replay, and one inside a compiled piece, where nothing can break, is refused;
- results live in memory the recorder owns, and are valid until the next replay; a tensor of that memory which is kept
  otherwise is refused.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from seamwise.kernels.contract import contract_of
from seamwise.kernels.cpu.tape import StandIn, Tape, call, recording
from seamwise.kernels.cpu.tape_memory import Pool

_LETS_GO_S = 1.0  # a collective's thread lets go of its tensors a moment after it was waited for


class RecordingRefused(RuntimeError):
    """What was asked cannot be replayed faithfully."""


class Recording:
    """A recorded call. `replay(*arguments)` checks the arguments against the rules, runs, and returns the results.

    num_bytes  of the recorder's memory, all its recordings' together, when this one was made
    """

    def __init__(
        self, graph: Tape, function: Callable[..., Any], varying: Collection[int], results: Any, num_bytes: int
    ) -> None:
        self.graph, self.results, self.num_bytes = graph, results, num_bytes
        self._function, self._varying = function, frozenset(varying)  # the function holds the weights whose addresses
        self._seen = self._identities(graph.arguments)  # the graph holds

    @torch.inference_mode()
    def replay(self, *arguments: Any) -> Any:
        """Run again on the recorded arguments' new contents. Raises RecordingRefused when an argument differs."""
        now = self._identities(arguments)
        if len(now) != len(self._seen):
            raise RecordingRefused(f"replay: got {len(now)} arguments, {len(self._seen)} were recorded")
        if now != self._seen:
            i = next(i for i, seen in enumerate(self._seen) if now[i] != seen)
            raise RecordingRefused(_difference(i, now[i], self._seen[i]))
        self.graph.arguments = arguments
        self.graph.replay()
        return self.results

    def _identities(self, arguments: Sequence[Any]) -> list[Any]:
        return [
            (leaf.dtype, leaf.dim()) if i in self._varying else _identity(leaf)
            for i, argument in enumerate(arguments)
            for leaf in (tree_leaves(argument) if isinstance(argument, (list, tuple, dict)) else (argument,))
        ]


class Recorder:
    """Records calls; all recordings of one recorder share memory, so only the newest results are valid."""

    num_bytes = 0

    def live(self) -> set[int]:
        """Return the addresses of the recorder's memory that tensors refer to."""
        raise NotImplementedError

    def record(
        self, function: Callable[..., Any], *arguments: Any, full: bool = False, varying: Collection[int] = ()
    ) -> Recording:
        """Run `function(*arguments)` once and return its recording. The function may be an eager module.

        full     record the seams too, as a uniform decode step allows; else they are called between what is recorded
        varying  positions of the tensors that only seams read: they may move, and change in size
        Raises RecordingRefused for what breaks a rule, ValueError for `varying` with `full`.
        """
        if full and varying:
            raise ValueError("record: what varies is read by seams that run at each replay; a full recording has none")
        given = [StandIn(a, i) if i in varying else a for i, a in enumerate(arguments)]
        held = self.live()
        tape, results = self._run(function, arguments, given, full)
        mine = {r.untyped_storage().data_ptr() for r in tree_leaves(results) if isinstance(r, Tensor)}
        if self.live() - held - mine:
            gc.collect()  # a tensor of a frame that failed may wait for it
        until_s = time.monotonic() + _LETS_GO_S
        while (kept := self.live() - held - mine) and time.monotonic() < until_s:
            time.sleep(0.001)
        if kept:
            raise RecordingRefused(
                f"a tensor made while recording is still held ({len(kept)} of them, one at {min(kept):#x}): its memory"
                " is the recorder's, and the next recording or replay writes there; return it, or keep a clone of it"
            )
        return Recording(tape, function, varying, tree_map_only(Tensor, tape.borrow, results), self.num_bytes)

    def _run(
        self, function: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], full: bool
    ) -> tuple[Tape, Any]:
        raise NotImplementedError


class CPURecorder(Recorder):
    """Records C++ kernels on a tape, and any other op as a call of torch whose result is copied to a static place."""

    def __init__(self) -> None:
        self.pool = Pool()

    @property
    def num_bytes(self) -> int:  # type: ignore[override]
        return self.pool.num_bytes

    def live(self) -> set[int]:
        return self.pool.live()

    @torch.inference_mode()
    def _run(
        self, function: Callable[..., Any], arguments: Sequence[Any], given: Sequence[Any], full: bool
    ) -> tuple[Tape, Any]:
        tape = Tape(self.pool, full=full, arguments=arguments)
        with recording(tape), OntoTape(tape):
            return tape, function(*given)


class OntoTape(TorchDispatchMode):
    """Puts every op that computes onto the tape; views need none, for memory stays where it is. Seams are calls."""

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: hiding this from Dynamo imports it, 1.1 s and 70 MB at a warm start's second token."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (record := contract_of(func)) is not None:
            given = [*args, *kwargs.values()]
            known = [self.tape.arguments[a.position] if isinstance(a, StandIn) else a for a in given]
            provider = record.choose(known)
            if provider.composed and (self.tape.full or not record.seam):
                with self:  # its parts are recorded, not itself
                    return provider.call(*args, **kwargs)
            if record.seam or not provider.launches:
                named, count = tuple(kwargs), len(args)
                return call(
                    lambda *now: func(*now[:count], **dict(zip(named, now[count:], strict=True))), *given,
                    seam=record.name if record.seam else "", launches=provider.launches,
                )  # fmt: skip
            return func(*args, **kwargs)
        if any(issubclass(t, StandIn) for t in types):
            return StandIn.__torch_dispatch__(func, types, args, kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RecordingRefused(f"{func} reads a tensor's value back: its value now would be replayed for ever")
        return self.loose(func, args, kwargs)

    def loose(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an op that no contract names, and put it onto the tape."""
        result = func(*args, **kwargs)
        writes = func._schema.is_mutable  # its result is its argument, as a view's is
        if func is torch.ops.aten.sym_size.int or (not writes and _is_view(result, args)):  # sizes are the recording's
            return result
        tape = self.tape
        held_args, held_kwargs = tree_map_only(Tensor, tape.borrow, (args, kwargs))
        if writes:
            tape.append_call(lambda: func(*held_args, **held_kwargs))
            return result
        results = [result] if isinstance(result, Tensor) else result
        if not (isinstance(results, (list, tuple)) and all(isinstance(r, Tensor) for r in results)):
            if not any(isinstance(a, Tensor) for a in tree_leaves((args, kwargs))):
                return result  # of no tensor (aten.promote_types): it cannot change
            raise RecordingRefused(
                f"{func} gives {type(result).__name__}, not a tensor: its value now would be replayed for ever"
            )
        collective = func.namespace == "_c10d_functional"  # it returns before the other ranks have answered
        placed = results if collective else [tape.place(r) for r in results]
        kept = [tape.borrow(p) for p in placed]

        def again() -> None:
            new = func(*held_args, **held_kwargs)
            if collective:
                new = torch.ops._c10d_functional.wait_tensor(new)
            for old, now in zip(kept, [new] if isinstance(new, Tensor) else new, strict=True):
                old.copy_(now)

        if func not in _ALLOCATIONS:
            tape.append_call(again)
        return placed[0] if isinstance(result, Tensor) else type(result)(placed)


_ALLOCATIONS = {
    torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default, torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}  # fmt: skip


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
