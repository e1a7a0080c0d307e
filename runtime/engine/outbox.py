"""Outputs on their way out of the engine: made when they are due, handed over by the next step().

An interrupt between any two lines loses no output and gives none twice: each says what of its request has been given
out without it and with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from .outputs import RequestOutput
from .request import Given, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """An output that nobody was handed yet; before, after: what of its request has been given out without and with."""

    output: RequestOutput
    request: Request
    before: Given
    after: Given


class Outbox:
    """What the next step() hands over."""

    def __init__(self) -> None:
        self.due: list[Due] = []

    def give(self, request: Request, now: float) -> None:
        """Make the output of a request that has one to give."""
        if not request.due():
            return
        if request.finished:
            request.metrics.finished_time = now
            request.metrics.num_preemptions = sum(c.sequence.num_preemptions for c in request.completions)
        output = request.output()
        due = Due(output=output, request=request, before=request.given, after=request.given_with(output))
        self.due.append(due)  # it is given out from here on: settle() says so again
        request.given = due.after

    def take_back(self, request: Request) -> None:
        """Forget what a request was to give: its next output has that too."""
        if not self.due:
            return
        request.given = next((due.before for due in self.due if due.request is request), request.given)
        self.due = [due for due in self.due if due.request is not request]

    def settle(self) -> None:
        """After an interrupt: what is here counts as given out."""
        for due in self.due:
            due.request.given = due.after

    def hand_over(self) -> list[RequestOutput]:
        """Return what is due, once."""
        outputs = [due.output for due in self.due]
        self.due = []  # nothing comes between this and the caller
        return outputs
