"""The engine as the HTTP process sees it: requests as streams, calls, health; a dead engine is started again."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from .child import Child, Ended
from .messages import Abort, Add, Call, Command, Delta, Event, Progress, Ready, Refused, Result, Stage, Stats, Wave
from .streams import CallFailed, EngineError, QueueFull, RequestRefused, Stream, Unsupported

logger = logging.getLogger("seamwise.engine")
_ERRORS = {"caller": ValueError, "machine": CallFailed, "unsupported": Unsupported}  # by Result.kind
_MOST_RESTARTS = 5  # starts that fail one after the other before it is given up
_LONGEST_PAUSE_S = 16.0


class EngineClient:
    """Supervises one engine process after another.

    state    "starting", "ready", "restarting", "failed" (given up) or "stopped"
    reason   why it is not ready, in a sentence
    info     what the engine said of itself when it was ready
    stats    its last word
    changed  is set where the state is another, or a stage of start-up
    watch    is called with every event that carries progress, for metrics
    timeouts  step_timeout_s and start_timeout_s, see AsyncLLM
    rank     of the engine, where several serve one model
    on_wave, settle  of an engine that takes steps with others: hears of waves; says why all of them end, when all have
    only_start  why it is not started again when it ends, nothing where it is
    given_up    it has ended and is not started again; a group decides so for all of its engines
    """

    def __init__(self, options: Mapping[str, Any], timeouts: tuple[float, float], rank: int = 0) -> None:
        for name, value in zip(("step_timeout_s", "start_timeout_s"), timeouts, strict=True):
            if not value > 0:
                raise ValueError(f"{name}={value!r}: wanted seconds above 0")
        self.state = "starting"
        self.reason = "the engine is starting"
        self.info: Ready | None = None
        self.stats = Stats()
        self.num_restarts = 0
        self.rank, self.only_start, self.given_up = rank, "", False
        self.on_wave: Callable[[Wave], None] | None = None
        self.settle: Callable[[EngineClient, Ended], Awaitable[Ended]] | None = None
        self.failure: Ended | None = None
        self.watch: Callable[[Stats, list[Delta]], None] = lambda stats, deltas: None
        self.options, self._timeouts = dict(options), timeouts
        self._child: Child | None = None
        self._streams: dict[str, Stream] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._ids = itertools.count()
        self.changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def stage(self) -> str:
        """The stage of start-up, or "ready"."""
        return self._child.stage if self._child else self.state

    @property
    def pid(self) -> int:
        """The engine process' id, 0 when there is none."""
        return self._child.pid if self._child else 0

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._streams)

    @property
    def num_running(self) -> int:
        """Requests that have not ended, and that nobody has asked to end."""
        return sum(not stream.aborted for stream in self._streams.values())

    def has(self, request_id: str) -> bool:
        """Return whether an unfinished request has this id."""
        return request_id in self._streams

    def start(self) -> None:
        """Start the engine process, in the running event loop."""
        if self._task is None:
            self._task = asyncio.create_task(self._supervise())

    def add(self, request: Add) -> Stream:
        """Send a request whose id is not in use to an engine that is ready; its deltas come by the stream."""
        stream = self._streams[request.request_id] = Stream(request.request_id, self.rank)
        self.send(request)
        return stream

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """End requests, without ids all of them; what they produced still comes by their streams."""
        named = None if request_ids is None else [name for name in request_ids if name in self._streams]
        for name in self._streams if named is None else named:
            self._streams[name].aborted = True
        if named != []:
            self.send(Abort(named))

    def drop(self, stream: Stream) -> None:
        """End a request whose reader is gone."""
        if self._streams.get(stream.request_id) is stream:
            self.abort([stream.request_id])
            del self._streams[stream.request_id]

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method in the engine process, which is ready.

        Raises ValueError, RuntimeError as the method does; Unsupported when there is none; EngineError when it ends.
        """
        call_id = next(self._ids)
        future = self._calls[call_id] = asyncio.get_running_loop().create_future()
        self.send(Call(call_id, method, list(args), kwargs))
        try:
            return await future
        finally:
            self._calls.pop(call_id, None)

    def give_up(self) -> None:
        """End the process; it is supervised as if it had ended by itself."""
        if self._child is not None:
            self._child.give_up()

    def send(self, command: Command) -> None:
        """Send what is to be done, where there is a process."""
        if self._child is not None:
            self._child.send(command)

    async def stop(self) -> None:
        """End the engine process and every stream; what its KV cache holds is kept where it was told so."""
        if self.state == "ready" and self.options.get("kv_offloading_folder"):
            self.abort()
            try:
                await asyncio.wait_for(self.call("shutdown"), self._timeouts[0])
            except (EngineError, TimeoutError, CallFailed) as error:
                logger.warning("the KV cache was not written to kv_offloading_folder: %s", str(error) or "timeout")
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._enter("stopped", "the server is shutting down")
        self._end_streams(self.reason)

    async def _supervise(self) -> None:
        pause_s, failed_starts = 0.0, 0
        while True:
            self._child = Child(self.options, self._handle, *self._timeouts)
            ended = await self._child.run()
            was_ready, self._child = self._child.ready, None
            failed_starts = 0 if was_ready else failed_starts + 1
            self.given_up = self.info is None or failed_starts > _MOST_RESTARTS or bool(self.only_start)
            if self.settle is not None:
                self._enter("restarting", f"the engine ended: {ended}")
                ended = await self.settle(self, ended)
            if self.only_start:
                ended = Ended(f"{ended}; it is not started again: {self.only_start}", ended.kind, ended.detail)
            if self.given_up:
                self.failure = ended
                self._enter("failed", str(ended))
                self._end_streams(str(ended))
                return
            self.num_restarts += 1
            self._enter("restarting", f"the engine is started again: {ended}")
            self._end_streams(str(ended))
            pause_s = 0.0 if was_ready else min(_LONGEST_PAUSE_S, 2 * pause_s or 0.5)
            await asyncio.sleep(pause_s)

    def _enter(self, state: str, reason: str) -> None:
        self.state, self.reason = state, reason
        self.changed.set()

    def _end_streams(self, cause: str) -> None:
        self.stats = Stats()
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(EngineError(cause))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineError(cause))

    def _handle(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.stats = event.stats
            self.watch(event.stats, event.deltas)
            for delta in event.deltas:
                if stream := self._streams.get(delta.request_id):
                    stream.put(delta)
                    if stream.finished:
                        del self._streams[delta.request_id]
        elif isinstance(event, Refused):
            if stream := self._streams.pop(event.request_id, None):
                stream.fail((QueueFull if event.full else RequestRefused)(event.message))
        elif isinstance(event, Result):
            future = self._calls.get(event.call_id)
            if future is not None and not future.done():
                if event.error is None:
                    future.set_result(event.value)
                else:
                    future.set_exception(_ERRORS[event.kind](event.error))
        elif isinstance(event, Ready):
            self.info = event
            self._enter("ready", "")
        elif isinstance(event, Wave):
            assert self.on_wave is not None
            self.on_wave(event)
        elif isinstance(event, Stage):
            self.changed.set()
