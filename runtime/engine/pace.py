"""Requests whose grammar takes long sit steps out, so that requests beside them are slowed by a tenth at most.

What may follow is computed where a step ends, while all of its rows wait: milliseconds a token for a grammar that is
made to be slow, as far as its limits let it. What such grammars took is owed: they go on when steps of others have
taken ten times as long, as many at once as their last masks leave time for. Where nobody else runs all go on at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from seamwise.runtime.sampling.grammar import GrammarMask
from seamwise.runtime.scheduler.scheduler import Scheduler

from .request import Request

REASON = "grammar takes long"  # why a request sits out
SHARE = 0.1  # of others' time that grammars may take
LONG_S = 0.0002  # a mask of JSON takes 0.01 to 0.05 ms, its first 4


@dataclass(slots=True, eq=False)
class _Bound:
    """A request with a grammar: its masks, what they took in its last step, None: nothing yet; when that was."""

    request: Request
    masks: Sequence[GrammarMask]
    took_s: float | None = None
    turn: int = 0


@dataclass(slots=True)
class Pace:
    """owed_s: what grammars took of others' time, less what others' steps have paid of it."""

    owed_s: float = 0.0
    _bound: list[_Bound] = field(default_factory=list)
    _allowed_s: float = 0.0  # what grammars may take of a step like the last
    _beside_others: bool = False
    _turn: int = 0
    _settled: int = -1  # the turn when it was last said who sits out

    def add(self, request: Request, masks: Sequence[GrammarMask]) -> None:
        """Watch a request from now until it has ended."""
        self._bound.append(_Bound(request, masks))

    def note(self, step_s: float) -> None:
        """Count what a step took that has ended, grammars' part included."""
        self._turn += 1
        masks_s = 0.0
        for bound in self._bound:
            if took_s := sum(mask.take_s() for mask in bound.masks):
                bound.took_s, bound.turn = took_s, self._turn
                masks_s += took_s
        self._allowed_s = SHARE * max(step_s - masks_s, 0.0)
        if self._beside_others:
            self.owed_s = max(self.owed_s + masks_s - self._allowed_s, 0.0)

    def settle(
        self, requests: Mapping[str, Request], scheduler: Scheduler, wait_for: Callable[[Request, str, bool], None]
    ) -> None:
        """Say of each request with a grammar whether it sits out the next step."""
        if not self._bound:
            return
        self._bound = [bound for bound in self._bound if requests.get(bound.request.request_id) is bound.request]
        long = [b for b in self._bound if (self.owed_s if b.took_s is None else b.took_s > LONG_S)]
        slow = {c.sequence.arrival for bound in long for c in bound.request.completions}
        others = any(s.arrival not in slow and s.blocked is None for s in scheduler.running)
        self._beside_others, self._settled = others and self._turn != self._settled, self._turn  # a step was computed
        going = long
        if self._beside_others:
            waited = sorted(long, key=lambda bound: bound.turn)
            sums_s = accumulate(bound.took_s or 0.0 for bound in waited)
            going = [b for i, (b, s) in enumerate(zip(waited, sums_s, strict=True)) if i == 0 or s <= self._allowed_s]
            going = [] if self.owed_s else going
        sitting = {*long} - {*going}
        for bound in self._bound:
            if (sits := bound in sitting) != (REASON in bound.request.waits):
                wait_for(bound.request, REASON, sits)
