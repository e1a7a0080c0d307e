"""What is done to an engine as a whole: pause and resume, forget the cache, other weights, adapters in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from types import TracebackType

from seamwise.runtime.kv.names import Namespace
from seamwise.runtime.kv.offload import Offload
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.scheduler.scheduler import Scheduler

from .adapters import Adapters
from .loop import Loop
from .lora_request import LoRARequest
from .outputs import RequestOutput
from .request import Request


class Change:
    """A change of the engine's state; `torn` after one that did not come to its end."""

    torn = False

    def __enter__(self) -> None:
        self.torn = True

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.torn = kind is not None


class Control(ABC):
    """The part of an engine that no single request passes through; engine.py has the part that requests do."""

    scheduler: Scheduler
    namespace: Namespace
    adapters: Adapters | None
    _loop: Loop
    _requests: dict[str, Request]
    _change: Change
    runner: ModelRunner
    offload: Offload | None
    _weights_seen: int = -1
    _paused: str | None = None
    _clears: bool = False

    @abstractmethod
    def abort_request(self, request_id: str) -> RequestOutput | None: ...

    @abstractmethod
    def drain(self) -> None: ...

    @abstractmethod
    def _recover(self) -> None: ...

    @abstractmethod
    def _root(self, request: Request) -> bytes: ...

    def pause(self, mode: str = "abort", *, clear_cache: bool = True) -> list[RequestOutput]:
        """Stop at a step's end, for weights to be changed.

        abort  end all requests; they are returned
        wait   let the requests that are here end: call step() until is_paused
        keep   freeze them where they are; resume() lets them go on
        clear_cache  nothing computed until now is used again: kept requests compute their tokens anew when resumed
        Requests added from now on wait until resume(), with the reason "paused".
        """
        if mode not in ("abort", "wait", "keep"):
            raise ValueError(f"pause: mode={mode!r}, wanted 'abort', 'wait' or 'keep'")
        self._recover()
        self._paused, self._clears = mode, clear_cache
        if mode == "wait":
            return []
        self.drain()
        found = [self.abort_request(name) for name in list(self._requests)] if mode == "abort" else []
        if clear_cache:
            self.reset_prefix_cache(reset_running_requests=True)
        return [output for output in found if output is not None]

    def resume(self) -> None:
        """Go on after pause()."""
        self._recover()
        if self._paused == "wait" and self._clears:
            self.reset_prefix_cache(reset_running_requests=True)
        with self._change:
            self._paused = None
            for request in self._requests.values():
                for c in request.completions:
                    if c.sequence.blocked == "paused":
                        self.scheduler.block(c.sequence, None)

    @property
    def is_paused(self) -> bool:
        """Whether a pause is in effect and nothing runs or is under way any more."""
        if self._paused is None or self._loop.flights:
            return False
        left = [s for s in self.scheduler.queue.sequences if s.blocked != "paused"]
        return self._paused != "wait" or not (left or self.scheduler.running)

    def reset_prefix_cache(self, reset_running_requests: bool = False) -> None:
        """Forget what the KV cache holds.

        Raises RuntimeError while requests run, whose past is in it, unless they are to compute their tokens anew.
        """
        self.drain()
        if self._requests and not reset_running_requests:
            raise RuntimeError(f"{len(self._requests)} requests are running; finish or abort them first")
        with self._change:
            self.scheduler.preempt(self.scheduler.running)
            self.scheduler.pool.forget_all()

    def weights_changed(self, version: str, *, recompute: bool = True) -> None:
        """Say that the weights are others now: no block computed with the old ones is found again.

        recompute  requests that run compute their tokens anew; else they go on with the keys and values they have
        """
        self.drain()
        with self._change:
            self.namespace = replace(self.namespace, weights=version)
            if recompute:
                self.scheduler.preempt(self.scheduler.running)
            self.scheduler.pool.forget_all()
            for request in self._requests.values():
                for c in request.completions:
                    c.sequence.rename(self._root(request))

    def _name_weights(self) -> None:
        """Let names say which weights there are, whoever changed them: tiers behind the cache have blocks of others."""
        if self.offload is None or (count := self.runner.num_weight_updates) == self._weights_seen:
            return
        self.weights_changed(self.runner.weights_digest() if self.offload.outlives else str(count), recompute=False)
        self._weights_seen = count

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Read an adapter now, so that requests need not wait. Raises ValueError for one that is refused."""
        self._with_adapters().load(lora_request)
        return True

    def remove_lora(self, lora_id: int) -> bool:
        """Forget an adapter; return whether there was one. Raises RuntimeError while requests use it."""
        self.drain()
        return self._with_adapters().remove(lora_id, self._requests.values())

    def list_loras(self) -> set[int]:
        """Return the numbers of the adapters that are in memory."""
        return set(self._with_adapters().known)

    def _with_adapters(self) -> Adapters:
        if self.adapters is None:
            raise ValueError("lora_request: the model was loaded without adapters; give it enable_lora=True")
        return self.adapters
