"""Where experts and their copies should be, by their loads; and whether it pays to move them there.

Groups of experts go to nodes, heaviest first, so that group-limited routing stays on few nodes; within a node the
expert with most load a copy gets one more copy until all places are taken; copies go to ranks, heaviest first. Where
groups do not divide among nodes, all is one group on one node. Source: DeepSeek-V3's load balancer, as described in
https://github.com/deepseek-ai/EPLB.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def place_by_load(
    loads_E: np.ndarray, places: int, *, ranks: int, groups: int = 1, nodes: int = 1
) -> list[int]:  # fmt: skip
    """Return the expert at each place; rank r has the places from r · places / ranks on, and nodes have ranks alike.

    loads_E  (E,) rows that each expert got; groups: of experts, in order, which a token's choices are limited to
    Raises ValueError where places or experts do not divide, or are fewer than experts.
    """
    experts = len(loads_E)
    if places < experts or places % ranks or ranks % nodes or experts % groups:
        raise ValueError(
            f"{experts} experts in {groups} groups, {places} places, {ranks} ranks, {nodes} nodes: wanted at least a"
            " place an expert, as many on each rank, as many ranks on each node and experts in each group"
        )
    if groups % nodes:
        groups = nodes = 1  # all experts are one group on one node
    members = np.arange(experts).reshape(groups, -1)
    found: list[int] = []
    for own in _packed(loads_E.reshape(groups, -1).sum(1), nodes):
        there = members[own].flatten()
        copied = _copied(loads_E[there], places // nodes)
        share = loads_E[there] / np.bincount(copied)
        found += [int(there[copied[i]]) for rank in _packed(share[copied], ranks // nodes) for i in rank]
    return found


def _packed(loads_N: np.ndarray, packs: int) -> list[list[int]]:
    """Return as many items for each pack: the heaviest first, each to the lightest pack that has room."""
    room = len(loads_N) // packs
    if room == 1:
        return [[i] for i in range(packs)]
    held: list[list[int]] = [[] for _ in range(packs)]
    weight = [0.0] * packs
    for i in np.argsort(-loads_N, kind="stable").tolist():
        lightest = min((p for p in range(packs) if len(held[p]) < room), key=weight.__getitem__)
        held[lightest].append(i)
        weight[lightest] += float(loads_N[i])
    return held


def _copied(loads_E: np.ndarray, places: int) -> np.ndarray:
    """Return the expert of each copy: each once, then again whichever has most load for each of its copies."""
    copies = np.ones(len(loads_E), dtype=np.int64)
    more = []
    for _ in range(places - len(loads_E)):
        more.append(int((loads_E / copies).argmax()))
        copies[more[-1]] += 1
    return np.concatenate((np.arange(len(loads_E)), np.array(more, dtype=np.int64)))


def kept_in_place(new: list[int], old: list[int], ranks: int) -> list[int]:
    """Return the same experts on the same ranks, each where the rank has it already, so that only news are moved."""
    share, found = len(new) // ranks, list[int]()
    for start in range(0, len(new), share):
        coming, had = new[start : start + share], old[start : start + share]
        own: list[int | None] = [None] * share
        for i, expert in enumerate(had):
            if expert in coming:
                coming.remove(expert)
                own[i] = expert
        found += [coming.pop(0) if expert is None else expert for expert in own]
    return found


def load_of_ranks(loads_E: np.ndarray, places: list[int], ranks: int) -> np.ndarray:
    """Return the (ranks,) rows that each rank gets where every expert's go to its copies alike."""
    at = np.array(places)
    return np.asarray((loads_E / np.bincount(at, minlength=len(loads_E)))[at].reshape(ranks, -1).sum(1))


def balancedness(loads_E: np.ndarray, places: list[int], ranks: int) -> float:
    """Return the mean rank's load by the busiest one's: 1 is balanced."""
    of_ranks = load_of_ranks(loads_E, places, ranks)
    return float(of_ranks.mean() / of_ranks.max()) if of_ranks.any() else 1.0


@dataclass(frozen=True, slots=True)
class Move:
    """A place that gets another expert, and the place that it is copied from: on the same rank if there is one."""

    source: int
    place: int


def moves_between(old: list[int], new: list[int], ranks: int) -> list[Move]:
    """Return what is copied where. Several ranks that have an expert send it in turn."""
    share = len(old) // ranks
    found = []
    for place, expert in enumerate(new):
        if old[place] != expert:
            there = [p for p, had in enumerate(old) if had == expert]
            here = [p for p in there if p // share == place // share]
            found.append(Move((here or there)[place // share % len(here or there)], place))
    return found


@dataclass(frozen=True, slots=True)
class Gain:
    """What a placement is predicted to save and to cost, in bytes over the busiest rank's link.

    saved  of rows that the busiest rank exchanges less, until placements are looked at again; moved: of experts
    """

    saved: int
    moved: int

    @property
    def pays(self) -> bool:
        return self.saved > self.moved


def gain_of(
    loads_E: np.ndarray, old: list[int], new: list[int], ranks: int, *, row_bytes: int, expert_bytes: int,
    steps_seen: int, steps_ahead: int,
) -> Gain:  # fmt: skip
    """Predict the gain of a placement from loads seen in `steps_seen` steps, if those of `steps_ahead` are alike.

    row_bytes  of a row to an expert and back. What the busiest rank computes less is not counted: it only adds.
    """
    before, after = (load_of_ranks(loads_E, places, ranks).max() for places in (old, new))
    share, link = len(old) // ranks, np.zeros((2, ranks), dtype=np.int64)
    for move in moves_between(old, new, ranks):
        if move.source // share != move.place // share:
            link[0, move.source // share] += expert_bytes
            link[1, move.place // share] += expert_bytes
    saved = (before - after) / max(steps_seen, 1) * steps_ahead * row_bytes
    return Gain(saved=int(saved), moved=int(link.max()))
