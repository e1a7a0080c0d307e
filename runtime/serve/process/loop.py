"""The engine process's loop: commands in, steps, events out. It says that it lives after each step, or when idle."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from seamwise.runtime.sampling.params import SamplingParams

from .deltas import Deltas
from .messages import Abort, Add, Call, Command, Event, Progress, Refused, Result, Stats

if TYPE_CHECKING:
    from seamwise.runtime.engine.engine import Engine

IDLE_BEAT_S = 0.2  # an idle engine says so at least this often
METHODS = (  # what the other process may call: of the loop, else of the LLM
    "pause_generation", "resume_generation", "is_paused", "reset_prefix_cache", "sleep", "wake_up", "is_sleeping",
    "collective_rpc", "start_weight_update", "update_weights", "finish_weight_update", "abort_weight_update",
    "weight_version", "weights_digest", "start_profile", "stop_profile", "add_lora", "remove_lora", "list_loras",
    "embed",
)  # fmt: skip


class EngineLoop:
    """Runs one LLM's engine for another process.

    receive  waits up to the given seconds for a command and returns it, None when there is none
    send     sends an event
    """

    def __init__(self, llm: Any, receive: Callable[[float], Command | None], send: Callable[[Event], None]) -> None:
        self.llm = llm
        self.engine: Engine = llm.engine
        self._receive, self._send = receive, send
        self._deltas = Deltas()
        self._stats = Stats()
        self._takes_priority = "priority" in inspect.signature(self.engine.add_request).parameters
        self._paused: str | None = None
        self._clear = False
        self._held: list[Add] = []  # arrived while paused
        self._waiting_call: Call | None = None  # a pause that waits for running requests

    def run(self) -> None:
        """Serve until the process ends. An exception of a step is the caller's: what it wrote is not trusted."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Take every command that is there, then compute one step or say that there is nothing to do."""
        wait_s = 0.0 if self._runnable() else IDLE_BEAT_S
        while (command := self._receive(wait_s)) is not None:
            self._take(command)
            wait_s = 0.0
        deltas = []
        if self._runnable():
            for output in self.engine.step():
                deltas += self._deltas.of(output)
            self._stats.num_steps += 1
        self._update_stats()
        self._send(Progress(self._stats, deltas))
        if self._waiting_call and not self._draining:
            if self._clear:
                self.engine.reset_prefix_cache()
            self._send(Result(self._waiting_call.call_id))
            self._waiting_call = None

    def _runnable(self) -> bool:
        return self._paused != "keep" and self.engine.has_unfinished_requests()

    def _take(self, command: Command) -> None:
        if isinstance(command, Add):
            if self._paused:
                self._held.append(command)
            else:
                self._add(command)
        elif isinstance(command, Abort):
            self._abort(command.request_ids)
        else:
            self._call(command)

    def _add(self, add: Add) -> None:
        try:
            params = SamplingParams(**add.params)
            more: dict[str, Any] = {}
            if self._takes_priority:
                more["priority"] = add.priority
            elif add.priority:
                raise ValueError(f"priority={add.priority}: this engine serves first come, first served; leave it out")
            self.engine.add_request(add.request_id, add.prompt_token_ids, params, prompt=add.prompt, **more)
        except ValueError as error:
            self._send(Refused(add.request_id, str(error)))
            return
        self._deltas.follow(add.request_id, outputs=params.n, interval=add.stream_interval)

    def _abort(self, request_ids: list[str] | None) -> None:
        everything = [*self._deltas.unfinished, *(add.request_id for add in self._held)]
        for request_id in everything if request_ids is None else request_ids:
            self._held = [add for add in self._held if add.request_id != request_id]
            output = self.engine.abort_request(request_id)
            if output is not None:
                self._send(Progress(self._stats, self._deltas.of(output)))
            self._deltas.forget(request_id)

    def _call(self, call: Call) -> None:
        try:
            if call.method not in METHODS:
                raise AttributeError
            target = getattr(self, call.method, None) or getattr(self.llm, call.method)
        except AttributeError:
            self._send(Result(call.call_id, error=f"this engine has no {call.method}", kind="unsupported"))
            return
        try:
            value = target(*call.args, **call.kwargs)
        except (ValueError, TypeError, NotImplementedError) as error:
            self._send(Result(call.call_id, error=str(error), kind="caller"))
        except Exception as error:  # the caller's own code too: collective_rpc runs what it is given
            self._send(Result(call.call_id, error=f"{type(error).__name__}: {error}"))
        else:
            if call.method == "pause_generation" and self._draining:
                self._waiting_call = call  # answered when the last running request is done
            else:
                self._send(Result(call.call_id, value=value))

    def pause_generation(self, mode: str = "abort", clear_cache: bool | None = None) -> None:
        """Stop taking requests up, until resume_generation: those that arrive wait.

        mode  "abort": end what runs; "wait": let it finish; "keep": stop between two steps and go on later
        clear_cache  forget the prefix cache then; default: yes, but with "keep", whose requests read it
        """
        if mode not in ("abort", "wait", "keep"):
            raise ValueError(f"mode={mode!r}: wanted 'abort', 'wait' or 'keep'")
        if clear_cache and mode == "keep":
            raise ValueError("clear_cache=True: with mode='keep' requests still read the cache; use 'abort' or 'wait'")
        if mode == "abort":
            self._abort(None)
        self._paused = mode
        self._clear = clear_cache is not False and mode != "keep"
        if self._clear and not self._draining:
            self.engine.reset_prefix_cache()

    @property
    def _draining(self) -> bool:
        return self._paused == "wait" and self.engine.has_unfinished_requests()

    def resume_generation(self) -> None:
        """Go on after a pause, and take up what arrived meanwhile."""
        self._paused = None
        held, self._held = self._held, []
        for add in held:
            self._add(add)

    def is_paused(self) -> bool:
        return self._paused is not None

    def _update_stats(self) -> None:
        scheduler, stats = self.engine.scheduler, self._stats
        pool = scheduler.pool
        stats.num_running = len(scheduler.running)
        stats.num_waiting = len(scheduler.waiting) + len(self._held)
        stats.kv_cache_usage = 1 - pool.num_available / max(1, pool.num_blocks - 1)
        stats.paused = self._paused is not None
