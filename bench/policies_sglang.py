"""SGLang's orders of waiting requests, written anew from their description, to stand beside ours in `bench policies`.

They order the queue alone; who runs goes on, and who came last gives its blocks back first. Chunks, seats and blocks
are granted as ours grants them, and what the cache holds of a waiting request is looked up again every few steps.
Source: https://docs.sglang.ai/advanced_features/server_arguments.html, --schedule-policy; Zheng et al., SGLang, NeurIPS
2024, https://arxiv.org/abs/2312.07104, section 3.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from seamwise.runtime.scheduler.policies import Keys, Policy
from seamwise.runtime.scheduler.view import Rows, View

Path = tuple[tuple[str, int], ...]  # nodes of a prefix tree from the root: a name, and the tokens up to its end
_LONGEST_SORTED = 128  # a longer queue is served in order of arrival, for matching takes too long
_FEW = 32  # tokens: who has no more cached, and shares more with one before it in the queue, waits for that one


class Rule(Policy):
    """paths  where in the prefix tree each request ends, by arrival; what is known of its prompt beside its length"""

    def __init__(self, paths: Mapping[int, Path]) -> None:
        self.paths = paths

    def serve(self, view: View, rows: Rows) -> Keys:
        return ()


class LongestPrefix(Rule):
    """lpm: the longest cached prefix first. Starvation bound: none, while requests with longer ones arrive."""

    name = "lpm"
    reads_cached = True

    def admit(self, view: View, rows: Rows) -> Keys:
        if len(rows) > _LONGEST_SORTED:
            return ()
        late, seen = np.zeros(len(rows), dtype=bool), set()
        for row in np.argsort(rows.arrival).tolist():
            path = self.paths[int(rows.arrival[row])]
            if path and path[0][1] > _FEW >= rows.cached[row]:
                late[row] = path[0] in seen
                seen.add(path[0])
        return (late, -rows.cached)


class DepthFirst(Rule):
    """dfs-weight: the tree of cached prefixes depth first, at each node the child below which most wait.

    Starvation bound: none, while more wait below other nodes.
    """

    name = "dfs-weight"
    reads_cached = True

    def admit(self, view: View, rows: Rows) -> Keys:
        ends: list[Path] = []
        for arrival, cached in zip(rows.arrival.tolist(), rows.cached.tolist(), strict=True):
            ends.append(tuple(node for node in self.paths[arrival] if node[1] <= cached))
        weights = Counter(end[:depth] for end in ends for depth in range(len(end) + 1))
        order: dict[Path, int] = {}

        def visit(node: Path) -> None:
            below = [n for n in weights if len(n) == len(node) + 1 and n[:-1] == node]
            for child in sorted(below, key=lambda n: (-weights[n], n)):
                visit(child)
            order[node] = len(order)

        visit(())
        return (np.array([order[end] for end in ends], dtype=np.int64),)


class LongestOutput(Rule):
    """lof: the longest expected output first. Starvation bound: none, while longer ones arrive."""

    name = "lof"

    def admit(self, view: View, rows: Rows) -> Keys:
        return (-rows.predicted,)


class Random(Rule):
    """random: any order, another at each step. With n waiting and k starting, one waits longer than s steps with
    probability (1 - k/n)^s: no bound, but nobody starves.
    """

    name = "random"

    def admit(self, view: View, rows: Rows) -> Keys:
        drawn = np.random.default_rng(view.step).integers(1, 1 << 31, 2)
        return ((rows.arrival * drawn[0] + drawn[1]) % 2_147_483_629,)


RULES = (LongestPrefix, DepthFirst, LongestOutput, Random)
