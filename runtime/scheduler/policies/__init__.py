"""Policies: in which order sequences start and are served, who gives blocks back first, what a tenant is charged.

A policy is an object with a name and four pure methods; `Policy` has defaults for three of them. Keys are tuples of
(n,) arrays, the most significant first; lower goes first, and equal ones go by arrival. They are functions of their
arguments alone: no clock, no randomness, no state, so that a recorded view gives the recorded plan again.

Ours (ours.py) are chosen by name. A package adds its own under the entry point group `seamwise.policies` (name = a
class without arguments or an instance), and checks it with
`seamwise.runtime.scheduler.policies.conformance.check_policy`.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from .ours import CacheAware, Fair, Fcfs, Predictive, Priority, ResponseRatio
from .policy import Keys, Policy

__all__ = ["OURS", "Keys", "Policy", "find_policy", "policy_names"]

OURS: dict[str, type[Policy]] = {
    each.name: each for each in (Fcfs, Priority, Fair, Predictive, ResponseRatio, CacheAware)
}


def policy_names() -> list[str]:
    """Return the names of all policies, ours first."""
    return [*OURS, *sorted(point.name for point in entry_points(group="seamwise.policies") if point.name not in OURS)]


def find_policy(policy: str | Policy) -> Policy:
    """Return the policy of a name. Raises ValueError for a name that no policy has, listing those there are."""
    if isinstance(policy, Policy):
        return policy
    if policy in OURS:
        return OURS[policy]()
    for point in entry_points(group="seamwise.policies"):
        if point.name == policy:
            found = point.load()
            return found() if isinstance(found, type) else found
    raise ValueError(f"scheduling_policy={policy!r}: wanted one of {', '.join(policy_names())}")
