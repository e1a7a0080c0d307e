"""Highest response ratio next (Brinch Hansen 1971): waiting time over work, with tokens as the clock.

Starvation bound: at clock t a later j is started before i only if (t - t_j) / w_j > (t - t_i) / w_i, so every sequence
that overtakes i had itself waited at least w_j / w_i of i's wait. With the shortest work w_min: after i has waited W,
only those that arrived before t_i + W · (1 - w_min / w_i) can be before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import Keys, Policy

if TYPE_CHECKING:
    from seamwise.runtime.scheduler.view import Rows, View


class ResponseRatio(Policy):
    """The longest wait in proportion to what is asked for."""

    name = "response_ratio"
    reads_cached = True

    def admit(self, view: View, rows: Rows) -> Keys:
        work = np.maximum(rows.prompt - rows.cached + rows.predicted, 1)
        return (-(view.clock - rows.arrived) / work,)

    def serve(self, view: View, rows: Rows) -> Keys:
        return ()  # a ratio that changes every step would have running sequences preempt each other in turn
