"""The shortest expected work first, with aging.

Expected work is the tokens of the prompt that are not cached and the predicted tokens of output; a prediction is given
with the request, else it is the mean of what has ended, at most max_tokens. The bound is that of aging.py, with all of
the prompt and the prediction as w_i.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import Keys, Policy
from .aging import least_work

if TYPE_CHECKING:
    from seamwise.runtime.scheduler.view import Rows, View

AGING = 0.01  # expected tokens forgiven for each token that others were given


class Predictive(Policy):
    """Work is what is left of the prompt, and the expected output."""

    name = "predictive"
    reads_cached = True

    def admit(self, view: View, rows: Rows) -> Keys:
        return least_work(rows.prompt - rows.cached + rows.predicted, rows, AGING)

    def serve(self, view: View, rows: Rows) -> Keys:
        return least_work(rows.prompt + rows.predicted, rows, AGING)
