"""Steps under way: plan and launch the next, wait for the earliest, commit what it gave.

With depth 2 step N+1 is planned, and waits its turn, while N runs; with 1 each step is waited for at once. A sequence
that N ends has then a row in N+1 for nothing: its token is dropped, its slot and blocks wait for N+1.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import wait

import numpy as np

from seamwise.runtime.sampling.rows import SamplingSlots
from seamwise.runtime.sampling.sampler import Sampled
from seamwise.runtime.sampling.stop import Reason, ended_by_token
from seamwise.runtime.scheduler.commit import Step, complete, undo
from seamwise.runtime.scheduler.scheduler import Scheduler
from seamwise.runtime.scheduler.sequence import Sequence

from .answer import Event
from .batch import build_batch
from .drafting import Drafting
from .request import Completion, Request
from .worker import Flight, Result, Worker


class Loop:
    """The state between plan and text.

    drafting guesses that steps verify; while there may be any, each step is waited for
    adapters (S,) int32: which of the runner's adapters the sequence in each slot has; None: it has none for any
    owners   of sequences in the engine, by their arrival
    events   what committed steps gave, not yet made into text
    """

    def __init__(
        self, scheduler: Scheduler, worker: Worker, *, depth: int, drafting: Drafting, adapters: bool = False
    ) -> None:
        self.scheduler = scheduler
        self.worker = worker
        self.depth = depth
        self.owners: dict[int, tuple[Request, Completion]] = {}
        self.events: deque[Event] = deque()
        self.flights: list[Flight] = []
        self.drafting = drafting
        self.sampling = SamplingSlots(num_slots=scheduler.slots.num_slots)
        self.adapters = np.zeros(scheduler.slots.num_slots, dtype=np.int32) if adapters else None
        self._entered = np.full(scheduler.slots.num_slots, -1, dtype=np.int64)
        self._committed: list[Event] = []

    @property
    def may_launch(self) -> bool:
        """Whether a further step may be planned beside those under way."""
        if not self.flights:
            return True
        if len(self.flights) >= self.depth or any(flight.step.proposed for flight in self.flights):
            return False  # how many of its guesses stand is not known before a step has ended
        if len(self.owners) == 1 and self._gives_first_token(self.flights[-1].step):
            return False
        return not self.drafting.wanted(self.scheduler, self.owners)

    @staticmethod
    def _gives_first_token(step: Step) -> bool:
        """Return whether a step gives a sequence's first token. Of one that is alone no further step begins before it
        is handed over: on a CPU that would take the cores from those who pass it on, who need a few milliseconds."""
        return bool(step.yields[0]) and not step.sequences[0].output

    def launch(self) -> bool:
        """Plan a step and let it run; False when nothing can be computed now."""
        if not self.flights:
            self.drafting.propose(self.scheduler, self.owners)
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
        batch = build_batch(step, slots, self.sampling, self.adapters, self.worker.pooling)
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
        self._committed, given = self._judge(result)  # the step has happened from here on: absorb() can be done again
        ended = [e.completion.sequence for e in self._committed if e.reason is not None]
        self.absorb()
        complete(self.scheduler, step, ended, given)
        self.drafting.note(step, result.ended, given)
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
        for _, c in self.owners.values():  # ended by its text, and perhaps not yet taken out of what is rebuilt
            c.sequence.done = c.sequence.done or c.reason is not None
        unfinished = [c.sequence for _, c in self.owners.values() if not c.sequence.done]
        self.scheduler.rebuild(unfinished)

    def _judge(self, result: Result) -> tuple[list[Event], np.ndarray]:
        """Return what a step gave whom, and whom it ends, and (R,) how many tokens each got; nothing is changed."""
        step, events = self.flights[0].step, []
        given = np.zeros(len(step.sequences), dtype=np.int64)
        for i, start, found in result.prompts:
            if not step.sequences[i].done:
                request, c = self.owners[step.sequences[i].arrival]
                events.append(Event(request=request, completion=c, prompt_start=start, prompt_logprobs=found))
        row = 0
        for i in step.yields.nonzero()[0].tolist():
            if not step.sequences[i].done and result.pooled is not None:
                request, c = self.owners[step.sequences[i].arrival]
                events.append(Event(request=request, completion=c, reason=("stop", None), pooled=result.pooled[row]))
            elif not step.sequences[i].done:
                of_sequence = list(self._tokens_of(step, i, row, result.sampled))
                events += of_sequence
                given[i] = sum(event.token is not None for event in of_sequence)
            row += 1 + int(step.drafts[i])
        return events, given

    def _tokens_of(self, step: Step, i: int, row: int, sampled: Sampled) -> Iterator[Event]:
        """Yield what a sequence got: the token of its first row, and of each further one whose guess has stood."""
        s: Sequence = step.sequences[i]
        request, c = self.owners[s.arrival]
        output, guesses = list(s.output) if step.drafts[i] else s.output, step.proposed.get(i, [])
        for guess in [*guesses, None]:
            if row in sampled.failed:
                yield Event(request=request, completion=c, reason=failure(request, sampled.failed[row]))
                return
            token = int(sampled.tokens[row])
            reason = ended_by_token(output, token, request.params, c.options.stop_ids, s.max_tokens)
            yield Event(
                request=request, completion=c, index=len(output), token=token, logprobs=sampled.logprobs.get(row),
                reason=reason,
            )  # fmt: skip
            if reason is not None or token != guess:
                return
            output.append(token)
            row += 1


def failure(request: Request, error: Exception) -> Reason:
    """Return how a request ends of which something raised."""
    return "error", f"request {request.request_id}: {type(error).__name__}: {error}"
