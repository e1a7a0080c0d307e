"""Policies: in which order sequences start and are served, who gives blocks back first, what a tenant is charged.

A policy is an object with a name and four pure methods; `Policy` has defaults for three of them. Keys are tuples of
(n,) arrays, the most significant first; lower goes first, and equal ones go by arrival. They are functions of their
arguments alone: no clock, no randomness, no state, so that a recorded view gives the recorded plan again.

Ours are chosen by name. A package adds its own under the entry point group `seamwise.policies` (name = a class without
arguments or an instance), and checks it with `seamwise.runtime.scheduler.policies.conformance.check_policy`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from seamwise.runtime.scheduler.view import Rows, View

Keys = tuple[np.ndarray, ...]

OURS = {
    "fcfs": "fcfs:Fcfs",
    "priority": "priority:Priority",
    "fair": "fair:Fair",
    "predictive": "predictive:Predictive",
    "response_ratio": "response_ratio:ResponseRatio",
    "cache_aware": "cache_aware:CacheAware",
}


class Policy:
    """The base of all policies: only `admit` must be defined.

    reads_cached  whether rows.cached is to be kept up to date for waiting sequences, some of them each step
    """

    name = ""
    reads_cached = False

    def admit(self, view: View, rows: Rows) -> Keys:
        """Return the keys of waiting sequences: the lowest starts first, and none starts past another."""
        raise NotImplementedError(f"{type(self).__name__} has no admit(view, rows)")

    def serve(self, view: View, rows: Rows) -> Keys:
        """Return the keys of running sequences: the lowest is given tokens and blocks first."""
        return self.admit(view, rows)

    def evict(self, view: View, rows: Rows) -> Keys:
        """Return the keys of running sequences: the highest gives its blocks back first.

        The order must end in that of `serve`: whoever is served first must never be the only one to go.
        """
        return self.serve(view, rows)

    def cost(self, num_prompt: np.ndarray, num_output: np.ndarray) -> np.ndarray:
        """Return what tenants are charged for tokens of prompts, when they start, and of outputs."""
        return num_prompt + num_output


def policy_names() -> list[str]:
    """Return the names of all policies, ours first."""
    return [*OURS, *sorted(point.name for point in entry_points(group="seamwise.policies") if point.name not in OURS)]


def find_policy(policy: str | Policy) -> Policy:
    """Return the policy of a name. Raises ValueError for a name that no policy has, listing those there are."""
    if isinstance(policy, Policy):
        return policy
    if policy in OURS:
        module, _, name = OURS[policy].partition(":")
        made: Policy = getattr(import_module(f"{__name__}.{module}"), name)()
        return made
    for point in entry_points(group="seamwise.policies"):
        if point.name == policy:
            found = point.load()
            return found() if isinstance(found, type) else found
    raise ValueError(f"scheduling_policy={policy!r}: wanted one of {', '.join(policy_names())}")
