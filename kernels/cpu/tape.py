"""Record the CPU kernels of a step once and replay them with one call: the CPU's CUDA graph.

While a tape records, every C++ kernel that runs through `launch` is also written down, with its pointers, and
`empty` takes memory from the tape's own pool. The pool hands a block out again once no tensor refers to it, and keeps
it after recording, so a replay writes the same addresses in the same order. What runs outside `launch` is not on the
tape; the recorder in compile/ puts it there. A tape of a whole step holds its seams' kernels too; any other stops at a
seam, calls it, and goes on.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from . import cpp, instruction_set
from .tape_memory import Pool

_MAX_ARGS = 32


class _Entry(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("number", ctypes.c_double), ("args", ctypes.c_int64 * _MAX_ARGS))


_SOURCES: dict[tuple[Path, tuple[str, ...]], None] = {}


def compile_ahead() -> threading.Thread:
    """Compile every C++ source that has no build yet, in a thread beside what else start-up does; return the thread."""

    def compile_all() -> None:
        for source, extra in list(_SOURCES):
            # A failure is reported where the kernel is first called, which loads the source again.
            with contextlib.suppress(RuntimeError):
                cpp.load(source, extra=extra)

    thread = threading.Thread(target=compile_all, name="seamwise-compile-ahead", daemon=True)
    thread.start()
    return thread


class Kernel:
    """One C++ entry point of a source file, compiled at the first call for the instruction set then in use.

    seam   whether it is recorded in full tapes only
    extra  flags for the compiler
    """

    def __init__(self, source: str, symbol: str, *, seam: bool = False, extra: tuple[str, ...] = ()) -> None:
        self.source, self.symbol, self.seam, self.extra = Path(__file__).with_name(source), symbol, seam, extra
        self._entries: dict[str, Any] = {}
        _SOURCES.setdefault((self.source, extra), None)

    @property
    def entry(self) -> Any:
        found = self._entries.get(instruction_set.current())
        if found is None:
            library = cpp.load(self.source, extra=self.extra)
            if self.source != _REPLAY.source and hasattr(library, "seamwise_use_team"):
                team = cpp.load(_REPLAY.source, extra=_REPLAY.extra).seamwise_current_team
                library.seamwise_use_team(ctypes.cast(team, ctypes.c_void_p))
            found = getattr(library, self.symbol)
            found.restype = ctypes.c_int64
            self._entries[instruction_set.current()] = found
        return found

    @property
    def address(self) -> int:
        address = ctypes.cast(self.entry, ctypes.c_void_p).value
        assert address is not None
        return address


class StandIn(Tensor):
    """Stands, while a tape records, for an argument that varies in size: only seams may read it, at each replay."""

    position: int

    @staticmethod
    def __new__(cls, given: Tensor, position: int) -> StandIn:
        self = Tensor._make_wrapper_subclass(
            cls, given.shape, dtype=given.dtype, device=given.device, dispatch_sizes_strides_policy="sizes"
        )
        self.position = position
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        at = next(a.position for a in tree_leaves((args, kwargs)) if isinstance(a, StandIn))
        raise RuntimeError(f"{func} reads argument {at}, which varies from replay to replay: only seams may read it")


class Tape:
    """A recorded sequence of calls. `replay` runs it; addresses are those of the recording.

    pool   where the recorded calls' results live
    full   whether the seams' kernels are recorded: then one tape is a whole step; else seams are called
    arguments  the call's own, where its stand-ins find what they stand for
    """

    def __init__(self, pool: Pool, *, full: bool, arguments: Sequence[Any] = ()) -> None:
        self.pool, self.full, self.arguments = pool, full, arguments
        self.num_kernels = 0
        self.in_piece = False
        self._runs: list[list[tuple[Kernel, tuple[int | float, ...]]] | Callable[[], None]] = []
        self._replays: list[Callable[[], None]] | None = None

    def append(self, kernel: Kernel, args: tuple[int | float, ...]) -> None:
        if kernel.seam and not self.full:
            raise RuntimeError(_inside(kernel.symbol))
        if not self._runs or callable(self._runs[-1]):
            self._runs.append([])
        self._runs[-1].append((kernel, args))  # type: ignore[union-attr]
        self.num_kernels += 1

    def append_call(self, call: Callable[[], None]) -> None:
        """Record a call of Python, for an op that no C++ kernel serves."""
        self._runs.append(call)

    def piece(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call what must be recorded without a seam in it."""
        self.in_piece = True
        try:
            return function(*args)
        finally:
            self.in_piece = False

    def call(self, function: Callable[..., Any], args: Sequence[Any], *, seam: bool) -> Any:
        """Call a function and record the call as a whole; its results are the tape's own, written at each replay."""
        given = [tree_map_only(Tensor, lambda a: a if isinstance(a, StandIn) else self.borrow(a), a) for a in args]
        standing = [(i, a.position) for i, a in enumerate(given) if isinstance(a, StandIn)]

        def now() -> Any:
            for i, position in standing:
                given[i] = self.arguments[position]
            return function(*given)

        placed = tree_map_only(Tensor, self.place, now())
        kept = [self.borrow(p) for p in _tensors(placed)]

        def again() -> None:
            for old, new in zip(kept, _tensors(now()), strict=True):
                old.copy_(new)

        self.append_call(again)
        return placed

    def place(self, given: Tensor) -> Tensor:
        """Return a copy of a result where the next call of the tape finds it at every replay."""
        return self.pool.place(given)

    def borrow(self, given: Tensor) -> Tensor:
        """Return a tensor over the same memory that does not keep it, where it is the pool's."""
        return self.pool.borrow(given)

    def replay(self) -> None:
        """Run every call. Raises RuntimeError naming the kernel that reports bad input."""
        if self._replays is None:
            self._replays = [run if callable(run) else _replayer(run) for run in self._runs]
        for run in self._replays:
            run()

    def profile(self) -> list[tuple[str, tuple[int | float, ...], float]]:
        """Replay call by call; return each one's kernel (or "torch"), arguments and seconds."""
        calls: list[tuple[str, tuple[int | float, ...], float]] = []
        for run in self._runs:
            if callable(run):
                began = time.perf_counter()
                run()
                calls.append(("torch", (), time.perf_counter() - began))
                continue
            seconds = (ctypes.c_double * len(run))()
            _replayer(run, seconds)()
            calls += [(kernel.symbol, args, s) for (kernel, args), s in zip(run, seconds, strict=True)]
        return calls


class _Recording(threading.local):
    tape: Tape | None = None
    pool: Pool | None = None  # of large results where nothing records


_recording = _Recording()  # by thread: runners in other threads go on while one records


@contextmanager
def recording(tape: Tape) -> Iterator[None]:
    """Record on `tape` within the context. Raises RuntimeError when another recording is under way."""
    if _recording.tape is not None:
        raise RuntimeError("a tape is being recorded already; recordings do not nest")
    _recording.tape = tape
    try:
        yield
    finally:
        _recording.tape = None


def launch(kernel: Kernel, *args: int | float) -> int:
    """Call a kernel with integers, addresses and at most one float; return its status. Recorded when a tape records."""
    if _recording.tape is not None:
        _recording.tape.append(kernel, args)
    entry = kernel.entry
    if entry.argtypes is None:  # then ctypes converts plain numbers itself: 1.9 us a call, not 2.4
        entry.argtypes = [ctypes.c_int64 if isinstance(a, int) else ctypes.c_double for a in args]
    status: int = entry(*args)
    return status


def current() -> Tape | None:
    """Return the tape that records in this thread, or None."""
    return _recording.tape


def call(function: Callable[..., Any], *args: Any, seam: str = "", launches: bool = False) -> Any:
    """Call what is recorded as a whole when a tape records: code that neither `launch` nor torch's dispatcher sees, or
    whose calls depend on values. Returns what it returns: a tensor, a tuple of them, or None.

    seam      the name of a seam, which a tape that is not full calls between what it records
    launches  whether all that the function computes goes through `launch`, so that a full tape need not call it
    """
    tape = _recording.tape
    if tape is None:
        return function(*args)
    if seam and tape.in_piece and not tape.full:
        raise RuntimeError(_inside(seam))
    if launches and (tape.full or not seam):
        return function(*args)
    _recording.tape = None
    try:
        with _disable_current_modes():
            return tape.call(function, args, seam=bool(seam))
    finally:
        _recording.tape = tape


def _inside(seam: str) -> str:
    return f"{seam}: a seam was recorded inside a piece; seams run eagerly between pieces"


def _tensors(results: Any) -> Sequence[Tensor]:
    return (results,) if isinstance(results, Tensor) else results or ()


LARGE_BYTES = 64 << 10


@contextmanager
def reusing_memory(pool: Pool) -> Iterator[None]:
    """Let kernels' large results take the memory of earlier ones that are gone, within the context: given back to the
    system's allocator and taken anew at each layer, they leave holes between each other, of twice their size."""
    before, _recording.pool = _recording.pool, pool
    try:
        yield
    finally:
        _recording.pool = before


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return uninitialized CPU memory: from the recording tape's pool or, if it is large, the step's; else torch's."""
    if _recording.tape is not None:
        return _recording.tape.pool.empty(shape, dtype)
    if _recording.pool is not None and math.prod(shape) * dtype.itemsize >= LARGE_BYTES:
        return _recording.pool.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype)


def _replayer(calls: list[tuple[Kernel, tuple[int | float, ...]]], seconds: Any = None) -> Callable[[], None]:
    """Return a function that runs kernel calls in one call of C, by a team of threads; `seconds` takes their times."""
    function = _REPLAY.entry
    entries = (_Entry * len(calls))(*map(_entry, calls))
    count, error = ctypes.c_int64(len(calls)), ctypes.c_int64()

    def replay() -> None:
        failed = function(entries, count, ctypes.byref(error), seconds, ctypes.c_int64(torch.get_num_threads()))
        if failed:
            symbol = calls[failed - 1][0].symbol
            raise RuntimeError(f"{symbol}: call {failed - 1} of the tape reports error {error.value} in its input")

    return replay


_REPLAY = Kernel("tape.cpp", "seamwise_replay")


def _entry(call: tuple[Kernel, tuple[int | float, ...]]) -> _Entry:
    kernel, args = call
    integers = [a for a in args if isinstance(a, int)]
    numbers = [a for a in args if not isinstance(a, int)]
    if len(integers) > _MAX_ARGS or len(numbers) > 1:
        raise RuntimeError(f"{kernel.symbol}: a tape holds {_MAX_ARGS} integers and one float a call, got {args}")
    return _Entry(kernel.address, numbers[0] if numbers else 0.0, (ctypes.c_int64 * _MAX_ARGS)(*integers))
