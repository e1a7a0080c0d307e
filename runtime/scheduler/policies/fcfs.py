"""First come, first served.

Starvation bound. With every step giving the earliest sequence at least its next token, sequence i has ended after at
most Σ_{j arrived no later than i} (⌈(P_j + O_j) / C⌉ + O_j) steps, P and O the lengths of prompt and output and C the
smaller of the token budget and the chunk limit: the earliest unfinished one is never preempted, computes what it may
have lost once, and then yields a token a step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import Keys, Policy

if TYPE_CHECKING:
    from seamwise.runtime.scheduler.view import Rows, View


class Fcfs(Policy):
    """Arrival alone decides."""

    name = "fcfs"

    def admit(self, view: View, rows: Rows) -> Keys:
        return ()
