"""The shortest expected work first, with aging.

Expected work is the tokens of the prompt that are not cached and the predicted tokens of output; a prediction is given
with the request, else it is the mean of what has ended, at most max_tokens. Age is measured in tokens that the engine
has scheduled since the request came, so the bound does not depend on the machine.

Starvation bound: i is overtaken by a later j only if w_j + AGING · t_j < w_i + AGING · t_i, that is only by those that
arrive before t_i + w_i / AGING, t being the clock at arrival.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import Keys, Policy

if TYPE_CHECKING:
    from seamwise.runtime.scheduler.view import Rows, View

AGING = 0.01  # expected tokens forgiven for each token that others were given


class Predictive(Policy):
    """Work less age. The clock itself is in every key alike, so it is left out."""

    name = "predictive"
    reads_cached = True

    def admit(self, view: View, rows: Rows) -> Keys:
        return (rows.prompt - rows.cached + rows.predicted + AGING * rows.arrived,)

    def serve(self, view: View, rows: Rows) -> Keys:
        return (rows.prompt + rows.predicted + AGING * rows.arrived,)
