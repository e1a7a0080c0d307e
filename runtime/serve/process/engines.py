"""Several engines behind one front end, each a process with its own scheduler and KV cache: data-parallel ranks.

A request goes to the engine with the shortest queue and stays there; what changes an engine reaches all of them. One
that dies is an error to its own requests, the others go on, and it is started again. One engine is the case of one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .child import Ended
from .client import EngineClient
from .expert_group import Group
from .messages import Add, Delta, Ready, Stats
from .streams import CallFailed, EngineError, Stream

_WAITING_COUNTS = 4  # as many as running ones: vLLM's rule
_QUIET = (  # what an engine refuses while it has requests: then none may do it
    "reset_prefix_cache", "sleep", "start_weight_update", "update_weights_from_path",
)  # fmt: skip
_WEIGHTS = ("start_weight_update", "update_weights_from_path")  # or any method of a worker but the next
_READS = ("is_paused", "is_sleeping", "list_loras", "weights_digest", "weight_state")


class Engines:
    """The engines of one model, by EngineClient's interface.

    members  take requests, in the order of their ranks
    leaving  take no new ones any more
    watch    is called with an engine's rank and every event of it that carries progress, for metrics
    """

    def __init__(self, options: Mapping[str, Any], count: int, timeouts: tuple[float, float]) -> None:
        if type(count) is not int or count < 1:
            raise ValueError(f"data_parallel_size={count!r}: wanted a whole number of at least 1")
        if count > 1 and options.get("kv_offloading_folder"):
            raise ValueError(
                f"kv_offloading_folder with data_parallel_size={count}: a folder belongs to one engine; leave one out"
            )
        self._options, self._seed, self._arrivals = dict(options), int(options.get("seed", 0)), 0
        self._timeouts = timeouts
        self.watch: Callable[[int, Stats, list[Delta]], None] = lambda rank, stats, deltas: None
        self._changed = asyncio.Event()  # of any of them
        together = count > 1 and bool(options.get("enable_expert_parallel"))
        self.group = Group(self._options, 0.8 * timeouts[0]) if together else None
        self.members = [self._made(rank, count) for rank in range(count)]
        self.leaving: list[EngineClient] = []
        self._scaling = False
        self._changed_weights = False  # by a call that one of the engines has done
        self.started_s = time.monotonic()

    def _made(self, rank: int, count: int) -> EngineClient:
        ranks = {"data_parallel_size": count, "data_parallel_rank": rank} if count > 1 else {}
        made = EngineClient(self._options | ranks, self._timeouts, rank)
        made.changed = self._changed
        made.watch = lambda stats, deltas: self.watch(rank, stats, deltas)
        if self.group is not None:
            self.group.add(made)
        return made

    @property
    def state(self) -> str:
        """ "ready" when an engine takes requests and all once did, or all do of a group; else another one's state."""
        return self._state_of(self.members)

    def _state_of(self, members: Sequence[EngineClient]) -> str:
        others = [m for m in members if m.state != "ready"]
        if not others or (self.group is None and len(others) < len(members) and all(m.info for m in members)):
            return "ready"
        return others[0].state

    @property
    def reason(self) -> str:
        """Why the state is not "ready", in a sentence; nothing where it is."""
        others = [m for m in self.members if m.state != "ready"]
        return "" if self.state == "ready" else self._named(others[0], others[0].reason)

    @property
    def stage(self) -> str:
        """The stage of start-up that is the last to end, or "ready"."""
        return next((m.stage for m in self.members if m.state != "ready"), "ready")

    @property
    def info(self) -> Ready | None:
        """What the engines said of themselves: they are alike."""
        return self.members[0].info

    @property
    def failure(self) -> Ended | None:
        """Why the last engine was given up, when all are, or one that never took a request."""
        return _failure_of(self.members)

    @property
    def stats(self) -> Stats:
        """The engines' last words, added up."""
        each = [m.stats for m in self.members]
        if len(each) == 1:
            return each[0]
        total = Stats(**{
            name: sum(getattr(s, name) for s in each)
            for name in ("num_running", "num_waiting", "num_steps")
        })  # fmt: skip
        total.kv_cache_usage = sum(s.kv_cache_usage for s in each) / len(each)
        total.paused, total.sleeping = all(s.paused for s in each), max(s.sleeping for s in each)
        return total

    @property
    def num_restarts(self) -> int:
        """Times that an engine was started again."""
        return sum(m.num_restarts for m in self.members)

    @property
    def num_requests(self) -> int:
        """Requests that have not ended."""
        return sum(m.num_requests for m in (*self.members, *self.leaving))

    @property
    def world_size(self) -> int:
        """Ranks that hold the model, over all engines."""
        return sum(m.info.world_size if m.info else 1 for m in self.members)

    def start(self) -> None:
        """Start the processes, in the running event loop."""
        for member in self.members:
            member.start()

    async def wait_ready(self) -> Ready:
        """Wait until the state is "ready". Raises `failure` where there is one, EngineError when they were stopped."""
        self.start()
        await self._until_ready(lambda: self.members)
        assert self.info is not None
        return self.info

    async def _until_ready(self, members: Callable[[], Sequence[EngineClient]]) -> None:
        while (state := self._state_of(members())) != "ready":
            if (failure := _failure_of(members())) is not None:
                raise failure
            if state == "stopped":
                raise EngineError("the engine was shut down")
            self._changed.clear()
            await self._changed.wait()

    def check(self) -> None:
        """Raise EngineError when no engine takes requests now."""
        if self.state != "ready":
            raise EngineError(self.reason)

    def add(self, request: Add) -> Stream:
        """Send a request to the engine with the shortest queue. Raises EngineError, or ValueError for an id in use."""
        self.check()
        if any(m.has(request.request_id) for m in (*self.members, *self.leaving)):
            raise ValueError(f"request id {request.request_id!r} is in use by an unfinished request")
        if len(self.members) > 1 and request.params.get("seed") in (None, -1):  # as one engine would draw it
            request.params["seed"] = (self._seed << 32) + self._arrivals
        self._arrivals += int(request.params.get("n", 1))
        if self.group is not None:
            self.group.request()
        return self._least_busy().add(request)

    def _least_busy(self) -> EngineClient:
        ready = [m for m in self.members if m.state == "ready"]
        return min(ready, key=lambda m: m.num_requests + (_WAITING_COUNTS - 1) * m.stats.num_waiting)

    def abort(self, request_ids: Iterable[str] | None = None) -> None:
        """End requests, without ids all of them; what they produced still comes by their streams."""
        named = None if request_ids is None else list(request_ids)
        for member in (*self.members, *self.leaving):
            member.abort(named)

    def drop(self, stream: Stream) -> None:
        """End a request whose reader is gone."""
        for member in (*self.members, *self.leaving):
            member.drop(stream)

    async def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method in every engine process; return the first one's result, all of collective_rpc's by rank.

        Raises as EngineClient.call, EngineError where one is not ready; where one cannot do it now, none does it.
        """
        for member in self.members:
            if member.state != "ready":
                raise EngineError(self._named(member, member.reason))
        running = sum(m.num_running for m in self.members)
        if method in _QUIET and running:
            raise CallFailed(f"{running} requests are running; finish or abort them first")
        if self._scaling and method not in _READS:
            raise CallFailed(f"{method}: engines join or leave now; call it when scaling has ended")
        changes = method in _WEIGHTS or (method == "collective_rpc" and args[0] not in _READS)
        if changes:
            self._only_start("weights may have been changed, which it would not have")
        calls = (m.call(method, *args, **kwargs) for m in self.members)
        results = await asyncio.gather(*calls, return_exceptions=True)
        failed = [(m, r) for m, r in zip(self.members, results, strict=True) if isinstance(r, BaseException)]
        self._changed_weights |= changes and len(failed) < len(results)
        if changes and not self._changed_weights:  # every engine refused: they have what they started with
            self._only_start("")
        if failed:
            member, error = failed[0]
            raise error if len(failed) == len(results) else type(error)(self._named(member, str(error)))
        if method in ("is_paused", "is_sleeping"):
            return (all if method == "is_paused" else any)(results)
        given: list[Any] = list(results)
        return [one for ranks in given for one in ranks] if method == "collective_rpc" else given[0]

    def _only_start(self, why: str) -> None:
        for member in self.members:
            member.only_start = why

    async def scale(self, count: int, drain_timeout_s: float = 300.0) -> None:
        """Serve with so many engines. New ones take requests once they are ready, those that leave end theirs first.

        Raises ValueError for no number of engines, CallFailed where it cannot be now, Ended where a new one does not
        start, TimeoutError where one that leaves does not end its requests in time: nothing has changed then.
        """
        if type(count) is not int or count < 1:
            raise ValueError(f"data_parallel_size={count!r}: wanted a whole number of at least 1")
        if self.group is not None:
            raise ValueError("scale_elastic_ep: the engines share out experts, whose number of ranks is fixed")
        if self._scaling:
            raise CallFailed("engines join or leave already; wait until that has ended")
        self._scaling = True
        try:
            await self._scale(count, drain_timeout_s)
        finally:
            self._scaling = False

    async def _scale(self, count: int, drain_timeout_s: float) -> None:
        if any(m.only_start for m in self.members) and count > len(self.members):
            raise CallFailed("weights may have been changed, which new engines would not have")
        if (told := self.stats).paused or told.sleeping:
            raise CallFailed("the engines are paused or asleep; let them go on first")
        joining = [self._made(rank, count) for rank in range(len(self.members), count)]
        try:
            for member in joining:
                member.start()
            await self._until_ready(lambda: joining)
        except BaseException:
            await asyncio.gather(*(m.stop() for m in joining))
            raise
        self.members, self.leaving = [*self.members[:count], *joining], self.members[count:]
        try:
            async with asyncio.timeout(drain_timeout_s):
                while any(m.num_requests for m in self.leaving):
                    await asyncio.sleep(0.02)
        except BaseException:
            self.members, self.leaving = [*self.members, *self.leaving], []
            raise
        leaving, self.leaving = self.leaving, []
        await asyncio.gather(*(m.stop() for m in leaving))

    async def stop(self) -> None:
        """End the engine processes and every stream."""
        await asyncio.gather(*(m.stop() for m in (*self.members, *self.leaving)))
        if self.group is not None:
            self.group.close()

    def _named(self, member: EngineClient, text: str) -> str:
        return text if len(self.members) == 1 or self.group is not None else f"engine {member.rank}: {text}"


def _failure_of(members: Sequence[EngineClient]) -> Ended | None:
    failed = [m for m in members if m.failure is not None]
    never = [m for m in failed if m.info is None]
    if never or len(failed) == len(members):
        return (never or failed)[0].failure
    return None
