"""The policies that are chosen by name, each with its starvation bound.

Age is measured in tokens that the engine has scheduled since a request came, so that no bound depends on the machine.
"""

from __future__ import annotations

import numpy as np

from seamwise.runtime.scheduler.view import Rows, View

from .policy import Keys, Policy

W_IN, W_OUT = 1.0, 2.0  # what a tenant is charged for a token of a prompt and of output: the paper's weights
PREDICTIVE_AGING = 0.01  # expected tokens forgiven for each token that others were given
CACHE_AGING = 0.02  # uncached tokens forgiven for each token that others were given


class Fcfs(Policy):
    """First come, first served.

    Starvation bound. With every step giving the earliest sequence at least its next token, sequence i has ended after
    at most Σ_{j arrived no later than i} (⌈(P_j + O_j) / C⌉ + O_j) steps, P and O the lengths of prompt and output and
    C the smaller of the token budget and the chunk limit: the earliest unfinished one is never preempted, computes what
    it may have lost once, and then yields a token a step.

    Arrival alone decides.
    """

    name = "fcfs"

    def admit(self, view: View, rows: Rows) -> Keys:
        return ()


class Priority(Policy):
    """Lower priority numbers first, as vLLM's; equal ones by arrival.

    Starvation bound: that of first come, first served, where the sum is over all sequences of a lower number, whenever
    they arrive, and those of the same number that arrived no later. A stream of urgent sequences starves the others;
    that is what priority means. For a mixture that cannot, choose fair or predictive.

    The number given with the request decides.
    """

    name = "priority"

    def admit(self, view: View, rows: Rows) -> Keys:
        return (rows.priority,)


class Fair(Policy):
    """A virtual token counter for each tenant: the one who has received least is next.

    Source: Sheng et al., Fairness in Serving Large Language Models, OSDI 2024, https://arxiv.org/abs/2401.00588, alg.
    2. A tenant is charged w_in for each token of a prompt when it starts and w_out for each token of output. One that
    comes back from idleness is lifted to the least counter of those that wait (scheduler.py does so): what was not
    asked for cannot be saved up.

    Bound (their theorem 4.4): while two tenants both have sequences waiting, what they are served differs by at most 2
    · max(w_in · L, w_out · M), L the longest prompt and M the tokens that running sequences may have together. A tenant
    waits at most for what that lets the others receive, however many sequences they send.

    The lowest counter first, counting what a tenant's earlier sequences in the queue will be charged.
    """

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


class Predictive(Policy):
    """The shortest expected work first, with aging.

    Expected work is the tokens of the prompt that are not cached and the predicted tokens of output; a prediction is
    given with the request, else it is the mean of what has ended, at most max_tokens. The bound is that of _least_work,
    with all of the prompt and the prediction as w_i.

    Work is what is left of the prompt, and the expected output.
    """

    name = "predictive"
    reads_cached = True

    def admit(self, view: View, rows: Rows) -> Keys:
        return _least_work(rows.prompt - rows.cached + rows.predicted, rows, PREDICTIVE_AGING)

    def serve(self, view: View, rows: Rows) -> Keys:
        return _least_work(rows.prompt + rows.predicted, rows, PREDICTIVE_AGING)


class ResponseRatio(Policy):
    """Highest response ratio next (Brinch Hansen 1971): waiting time over work, with tokens as the clock.

    Starvation bound: at clock t a later j is started before i only if (t - t_j) / w_j > (t - t_i) / w_i, so every
    sequence that overtakes i had itself waited at least w_j / w_i of i's wait. With the shortest work w_min: after i
    has waited W, only those that arrived before t_i + W · (1 - w_min / w_i) can be before it.

    The longest wait in proportion to what is asked for.
    """

    name = "response_ratio"
    reads_cached = True

    def admit(self, view: View, rows: Rows) -> Keys:
        work = np.maximum(rows.prompt - rows.cached + rows.predicted, 1)
        return (-(view.clock - rows.arrived) / work,)

    def serve(self, view: View, rows: Rows) -> Keys:
        return ()  # a ratio that changes every step would have running sequences preempt each other in turn


class CacheAware(Policy):
    """Fewest uncached prompt tokens first, with aging: requests that share a prefix run while it is in the cache.

    SGLang's longest-prefix-match order has no aging, and its shared prefixes can keep a stranger waiting for ever. Here
    the bound is that of _least_work with the whole prompt as w_i: what is cached of it may be evicted while it waits.

    Work is what the cache does not hold of the prompt.
    """

    name = "cache_aware"
    reads_cached = True

    def admit(self, view: View, rows: Rows) -> Keys:
        return _least_work(rows.prompt - rows.cached, rows, CACHE_AGING)

    def serve(self, view: View, rows: Rows) -> Keys:
        return ()


def _least_work(work: np.ndarray, rows: Rows, aging: float) -> Keys:
    """Return keys: (n,) work less age; `aging` is what each token that others were given takes off.

    The clock itself is in every key alike, so it is left out.

    Starvation bound: i is overtaken by a later j only if w_j + aging · t_j < w_i + aging · t_i, that is only by those
    that arrive before t_i + w_i / aging, w being the work and t the clock at arrival.
    """
    return (work + aging * rows.arrived,)
