"""Lower priority numbers first, as vLLM's; equal ones by arrival.

Starvation bound: that of first come, first served, where the sum is over all sequences of a lower number, whenever
they arrive, and those of the same number that arrived no later. A stream of urgent sequences starves the others; that
is what priority means. For a mixture that cannot, choose fair or predictive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import Keys, Policy

if TYPE_CHECKING:
    from seamwise.runtime.scheduler.view import Rows, View


class Priority(Policy):
    """The number given with the request decides."""

    name = "priority"

    def admit(self, view: View, rows: Rows) -> Keys:
        return (rows.priority,)
