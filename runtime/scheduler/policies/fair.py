"""A virtual token counter for each tenant: the one who has received least is next.

Source: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024, https://arxiv.org/abs/2401.00588, alg. 2.
A tenant is charged w_in for each token of a prompt when it starts and w_out for each token of output. One that comes
back from idleness is lifted to the least counter of those that wait (scheduler.py does so): what was not asked for
cannot be saved up.

Bound (their theorem 4.4): while two tenants both have sequences waiting, what they are served differs by at most
2 · max(w_in · L, w_out · M), L the longest prompt and M the tokens that running sequences may have together. A tenant
waits at most for what that lets the others receive, however many sequences they send.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from . import Keys, Policy

if TYPE_CHECKING:
    from seamwise.runtime.scheduler.view import Rows, View

W_IN, W_OUT = 1.0, 2.0  # the paper's weights


class Fair(Policy):
    """The lowest counter first, counting what a tenant's earlier sequences in the queue will be charged."""

    name = "fair"

    def admit(self, view: View, rows: Rows) -> Keys:
        order = np.lexsort([rows.arrival, rows.tenant])
        tenant = rows.tenant[order]
        cost = self.cost(rows.prompt[order], np.zeros(len(rows)))
        before = cost.cumsum() - cost
        first = np.searchsorted(tenant, tenant)  # where each tenant's rows begin
        key = np.empty(len(rows))
        key[order] = view.counters[tenant] + before - before[first]
        return (key,)

    def serve(self, view: View, rows: Rows) -> Keys:
        return ()  # what runs goes on: fairness is decided at the door

    def cost(self, num_prompt: np.ndarray, num_output: np.ndarray) -> np.ndarray:
        return W_IN * num_prompt + W_OUT * num_output
