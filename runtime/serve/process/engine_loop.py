"""The engine process's loop: commands in, steps, events out. It says that it lives after each step, or when idle."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from seamwise.runtime.distributed.waves import RankWave
from seamwise.runtime.engine.lora_request import LoRARequest
from seamwise.runtime.sampling.params import RepetitionDetectionParams, RequestOutputKind, SamplingParams
from seamwise.runtime.sampling.pooling_params import NO_SAMPLING
from seamwise.runtime.scheduler.config import QueueFullError

from .deltas import Deltas
from .messages import Abort, Add, Call, Command, Event, Progress, Refused, Result, Stage, Stats, Wave

if TYPE_CHECKING:
    from seamwise.runtime.engine.engine import Engine

IDLE_BEAT_S = 0.2  # an idle engine says so at least this often
METHODS = (  # what the other process may call: of the loop, the engine or the LLM
    "pause_generation", "resume_generation", "is_paused", "reset_prefix_cache", "sleep", "wake_up", "is_sleeping",
    "collective_rpc", "start_weight_update", "update_weights_from_path", "finish_weight_update",
    "weights_digest", "start_profile", "stop_profile", "add_lora", "remove_lora", "list_loras",
    "shutdown",
)  # fmt: skip
BETWEEN_WAVES = (  # these change what steps compute with: no rank may do so while others wait for its step
    "sleep", "wake_up", "collective_rpc", "start_weight_update", "update_weights_from_path", "finish_weight_update",
    "weights_digest", "reset_prefix_cache",
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
        self._closed: str | None = None  # why nothing can be generated now
        self._waiting_call: Call | None = None  # a pause that waits for running requests
        self._wave = RankWave() if llm.takes_steps_together else None
        self._put_off: Call | None = None  # until the wave has ended: it may not be between two steps of one

    def run(self) -> None:
        """Serve until the process ends. An exception of a step is the caller's: what it wrote is not trusted."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Take every command that is there, then compute one step or say that there is nothing to do."""
        in_wave = self._wave is not None and self._wave.running
        wait_s = 0.0 if self._may_step() or in_wave else IDLE_BEAT_S
        while self._put_off is None and (command := self._receive(wait_s)) is not None:
            self._take(command)
            wait_s = 0.0
        deltas = []
        if self._may_step():
            for output in self.engine.step():
                deltas += self._deltas.of(output)
            self._stats.num_steps += 1
            if self._wave is not None:
                self._say("ended", *self._wave.stepped(empty=self.llm.engine.runner.all_idle))
        elif self._wave is not None and self._runnable():
            if self.engine.scheduler.stalled:  # all wait for a grammar, say: look again a hundred times a second
                time.sleep(0.01)
            self._say("wants", *self._wave.wants())
        self._update_stats()
        self._send(Progress(self._stats, deltas))
        if self._waiting_call and self.engine.is_paused:
            self._send(Result(self._waiting_call.call_id))
            self._waiting_call = None

    def _say(self, what: str, known: RankWave, wave: int | None) -> None:
        """Go on in another state of the wave, and tell the front end."""
        self._wave, self.engine.together = known, known.running
        if wave is not None:
            self._send(Wave(what, wave))
        if self._put_off is not None and not known.running:
            call, self._put_off = self._put_off, None
            self._call(call)

    def _may_step(self) -> bool:
        """Return whether to take a step now: in a wave always, outside one never where ranks take them together."""
        return self._runnable() if self._wave is None else self._wave.running

    def _runnable(self) -> bool:
        return self.engine.has_unfinished_requests() and not self.engine.is_paused

    def _take(self, command: Command) -> None:
        if isinstance(command, Add):
            self._add(command)
        elif isinstance(command, Abort):
            self._abort(command.request_ids)
        elif isinstance(command, Wave):
            assert self._wave is not None
            self._say("start", self._wave.start(command.wave), None)
        elif self._wave is not None and self._wave.running and command.method in BETWEEN_WAVES:
            self._put_off = command
        else:
            self._call(command)

    def _add(self, add: Add) -> None:
        if self._closed is not None:
            self._send(Refused(add.request_id, self._closed, full=True))
            return
        try:
            params = _params(add) if add.pooling is None else NO_SAMPLING
            self.engine.add_request(
                add.request_id, add.prompt_token_ids, params, prompt=add.prompt, priority=add.priority,
                lora_request=add.lora, pooling=add.pooling,
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            self._send(Refused(add.request_id, str(error)))
        except QueueFullError as error:
            self._send(Refused(add.request_id, str(error), full=True))
        else:
            self._deltas.follow(add.request_id)

    def _abort(self, request_ids: list[str] | None) -> None:
        for request_id in self._deltas.unfinished if request_ids is None else request_ids:
            if (output := self.engine.abort_request(request_id)) is not None:
                self._send(Progress(self._stats, self._deltas.of(output)))

    def _call(self, call: Call) -> None:
        owners = (self, self.engine, self.llm) if call.method in METHODS else ()
        target = next((getattr(one, call.method) for one in owners if hasattr(one, call.method)), None)
        if target is None:
            self._send(Result(call.call_id, error=f"this engine has no {call.method}", kind="unsupported"))
            return
        self._send(Stage(call.method))  # it may take longer than a step may: a trace is written, weights are read
        try:
            value = target(*call.args, **call.kwargs)
        except (ValueError, TypeError, NotImplementedError) as error:
            self._send(Result(call.call_id, error=str(error), kind="caller"))
        except Exception as error:  # the caller's own code too: collective_rpc runs what it is given
            self._send(Result(call.call_id, error=f"{type(error).__name__}: {error}"))
        else:
            self._note(call)
            if call.method == "pause_generation" and not self.engine.is_paused:
                self._waiting_call = call  # answered when the last running request is done
            else:
                self._send(Result(call.call_id, value=value))

    def _note(self, call: Call) -> None:
        """Note what a call that succeeded means for requests: a model that sleeps or has half its weights has none."""
        if call.method == "sleep":
            self._stats.sleeping = int(call.args[0]) if call.args else 1
            self._closed = "the model sleeps; POST /wake_up first"
        elif call.method == "wake_up" and not self.llm.is_sleeping():
            self._stats.sleeping, self._closed = 0, None
        elif call.method == "start_weight_update":
            self._closed = "the weights are being updated; POST /finish_weight_update ends that"
        elif call.method == "finish_weight_update":
            self._closed = None

    def pause_generation(self, mode: str = "abort", clear_cache: bool = True) -> None:
        """Stop taking requests up, until resume_generation; see Engine.pause."""
        for output in self.engine.pause(mode, clear_cache=clear_cache):
            self._send(Progress(self._stats, self._deltas.of(output)))

    def resume_generation(self) -> None:
        """Go on after a pause, and take up what arrived meanwhile."""
        self.engine.resume()

    def is_paused(self) -> bool:
        return self.engine.is_paused

    def add_lora(self, **lora_request: Any) -> bool:
        return self.engine.add_lora(LoRARequest(**lora_request))

    def update_weights_from_path(self, path: str) -> None:
        """Write a checkpoint's tensors into the model, by their names."""
        from pathlib import Path

        from seamwise.runtime.weights.file_formats import find_tensors

        found, problems, _ = find_tensors(Path(path), "auto")
        if problems:
            raise ValueError(f"{path}: {'; '.join(problems)}")
        self.llm.update_weights((name, stored.load()) for name, stored in found.items())

    def _update_stats(self) -> None:
        scheduler, stats = self.engine.scheduler, self._stats
        pool = scheduler.pool
        stats.num_running = len(scheduler.running)
        stats.num_waiting = len(scheduler.waiting)
        stats.kv_cache_usage = 1 - pool.num_available / max(1, pool.num_blocks - 1)
        stats.paused = self.engine.is_paused
        drafts = self.engine.drafting.stats
        stats.accepted_per_pos = drafts.num_accepted_tokens_per_pos
        stats.speculating = drafts.active and bool(stats.accepted_per_pos)
        stats.speculation_gain = drafts.gain
        stats.counters = {
            "num_drafts": drafts.num_drafts, "num_draft_tokens": drafts.num_draft_tokens,
            "num_accepted_tokens": drafts.num_accepted_tokens,
        }  # fmt: skip
        if self.engine.offload is not None:
            stats.counters |= {f"kv_{name}": count for name, count in asdict(self.engine.offload.stats).items()}
        if (recorded := getattr(self.engine.runner, "recording_stats", None)) is not None:  # else ranks have theirs
            stats.counters["cascade_tiles"] = recorded.cascade_tiles


def _params(add: Add) -> SamplingParams:
    """Return the parameters of a request, with the kind of outputs that are sent on."""
    given = dict(add.params)
    if repetition := given.get("repetition_detection"):
        given["repetition_detection"] = RepetitionDetectionParams(**repetition)
    kind = RequestOutputKind.DELTA if add.stream_interval else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**{**given, "output_kind": kind, "stream_interval": add.stream_interval or None})
