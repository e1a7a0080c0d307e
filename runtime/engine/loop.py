"""Steps under way: plan and launch the next, wait for the earliest, commit what it gave.

With depth 2 step N+1 is planned, and waits its turn, while N runs; with 1 each step is waited for at once. A sequence
that N ends has then a row in N+1 for nothing: its token is dropped, its slot and blocks wait for N+1.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import wait

import numpy as np

from seamwise.runtime.sampling.rows import SamplingSlots
from seamwise.runtime.sampling.stop import Reason, ended_by_token
from seamwise.runtime.scheduler.commit import complete, undo
from seamwise.runtime.scheduler.scheduler import Scheduler
from seamwise.runtime.scheduler.sequence import Sequence

from .answer import Event
from .batch import build_batch
from .request import Completion, Request
from .worker import Flight, Result, Worker


class Loop:
    """The state between plan and text.

    adapters (S,) int32: which of the runner's adapters the sequence in each slot has; None: it has none for any
    owners   of sequences in the engine, by their arrival
    events   what committed steps gave, not yet made into text
    """

    def __init__(self, scheduler: Scheduler, worker: Worker, *, depth: int, adapters: bool = False) -> None:
        self.scheduler = scheduler
        self.worker = worker
        self.depth = depth
        self.owners: dict[int, tuple[Request, Completion]] = {}
        self.events: deque[Event] = deque()
        self.flights: list[Flight] = []
        self.sampling = SamplingSlots(num_slots=scheduler.slots.num_slots)
        self.adapters = np.zeros(scheduler.slots.num_slots, dtype=np.int32) if adapters else None
        self._entered = np.full(scheduler.slots.num_slots, -1, dtype=np.int64)
        self._committed: list[Event] = []

    def launch(self) -> bool:
        """Plan a step and let it run; False when nothing can be computed now."""
        step = self.scheduler.schedule()
        if step is None:
            return False
        slots = self.scheduler.slots
        for i in (self._entered[step.slots] != step.epochs).nonzero()[0].tolist():
            request, completion = self.owners[step.sequences[i].arrival]
            if request.metrics.first_scheduled_time is None:
                request.metrics.first_scheduled_time = time.perf_counter()
            self.sampling.enter(int(step.slots[i]), completion.options)
            if self.adapters is not None:
                self.adapters[step.slots[i]] = 0 if request.adapter is None else request.adapter.slot
        self._entered[step.slots] = step.epochs
        batch = build_batch(step, slots, self.sampling, self.adapters)
        self.flights.append(Flight(step=step, future=self.worker.submit(batch, slots.tokens)))
        return True

    def wait(self) -> Result | Exception:
        """Return what the earliest step gave, or what it raised. An interrupt while waiting changes nothing."""
        future = self.flights[0].future
        wait([future])
        error = future.exception()
        if error is not None and not isinstance(error, Exception):
            raise error
        return error if error is not None else future.result()

    def commit(self, result: Result) -> None:
        """Account for the earliest step and put what it gave into `events`."""
        step = self.flights[0].step
        self._committed = self._judge(result)  # the step has happened from here on: absorb() can be done again
        ended = [e.completion.sequence for e in self._committed if e.reason is not None]
        self.absorb()
        complete(self.scheduler, step, ended)
        self.flights.pop(0)

    def undo(self) -> None:
        """After a step that raised: all that is under way starts over from the known tokens."""
        self.worker.drain()
        undo(self.scheduler)
        self.flights.clear()

    def absorb(self) -> None:
        """Give committed tokens to their sequences. Doing so twice changes nothing more."""
        for event in self._committed:
            s = event.completion.sequence
            if event.token is not None and len(s.output) == event.index:
                s.output.append(event.token)
            s.done = s.done or event.reason is not None
        self.events.extend(self._committed)  # an event that comes twice is taken once
        self._committed = []

    def rebuild(self, owners: Iterable[tuple[Request, Completion]]) -> None:
        """After a change that was interrupted: whatever was half done, these go on from their known tokens."""
        self.worker.drain()
        self.absorb()
        self.flights.clear()
        self.owners = {c.sequence.arrival: (request, c) for request, c in owners}
        unfinished = [c.sequence for _, c in self.owners.values() if not c.sequence.done and c.reason is None]
        self.scheduler.rebuild(unfinished)

    def _judge(self, result: Result) -> list[Event]:
        """Return what a step gave whom, and whom it ends; nothing is changed."""
        step, sampled, events = self.flights[0].step, result.sampled, []
        for i, start, found in result.prompts:
            if not step.sequences[i].done:
                request, c = self.owners[step.sequences[i].arrival]
                events.append(Event(request=request, completion=c, prompt_start=start, prompt_logprobs=found))
        tokens = sampled.tokens.tolist()
        for row, i in enumerate(step.yields.nonzero()[0].tolist()):
            s: Sequence = step.sequences[i]
            if s.done:
                continue
            request, c = self.owners[s.arrival]
            if row in sampled.failed:
                events.append(Event(request=request, completion=c, reason=failure(request, sampled.failed[row])))
                continue
            reason = ended_by_token(s.output, tokens[row], request.params, c.options.stop_ids, s.max_tokens)
            event = Event(
                request=request, completion=c, index=len(s.output), token=tokens[row],
                logprobs=sampled.logprobs.get(row), reason=reason,
            )  # fmt: skip
            events.append(event)
        return events


def failure(request: Request, error: Exception) -> Reason:
    """Return how a request ends of which something raised."""
    return "error", f"request {request.request_id}: {type(error).__name__}: {error}"
