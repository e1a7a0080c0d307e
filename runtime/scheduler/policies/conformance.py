"""What any policy must hold to be served by: `check_policy(policy)` raises AssertionError naming what it breaks."""

from __future__ import annotations

import numpy as np

from seamwise.runtime.build.kv_groups import FULL
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.runtime.scheduler.plan import plan, shortlist
from seamwise.runtime.scheduler.view import Candidate, Progress, Rows, View, frozen

from . import Policy


def check_policy(policy: Policy, *, examples: int = 200, seed: int = 0) -> None:
    """Check a policy on drawn views.

    Keys are tuples of finite columns of the rows' length; they are functions of the arguments, which stay as they were,
    and do not depend on the order of rows; costs are not negative and grow with tokens; what it plans keeps the limits.
    """
    assert isinstance(policy, Policy) and policy.name, "a policy is a Policy with a name"
    generator = np.random.default_rng(seed)
    for _ in range(examples):
        view = draw_view(generator)
        for what in ("admit", "serve", "evict"):
            _check_keys(policy, what, view, view.waiting if what == "admit" else view.running, generator)
        _check_plan(policy, view, generator)
    tokens = np.arange(4.0)
    for cost in (policy.cost(tokens, 0 * tokens), policy.cost(0 * tokens, tokens)):
        assert (np.diff(cost) >= 0).all() and cost[0] >= 0, "cost falls as tokens grow, or is negative"


def _check_keys(policy: Policy, what: str, view: View, rows: Rows, generator: np.random.Generator) -> None:
    keys = getattr(policy, what)(view, rows)
    assert isinstance(keys, tuple), f"{what} returns {type(keys).__name__}, wanted a tuple of columns"
    again, shuffled = getattr(policy, what)(view, rows), generator.permutation(len(rows))
    moved = getattr(policy, what)(view, rows.take(shuffled))
    for key, same, other in zip(keys, again, moved, strict=True):
        assert len(key) == len(rows) and np.isfinite(key).all(), f"{what}: a key is not finite, or not one a row"
        assert np.array_equal(key, same), f"{what} is no function of its arguments"
        assert np.array_equal(np.asarray(key)[shuffled], other), f"{what} depends on the order of rows"


def _check_plan(policy: Policy, view: View, generator: np.random.Generator) -> None:
    limits = SchedulerConfig(
        max_num_batched_tokens=int(generator.integers(1, 40)), max_num_seqs=int(generator.integers(4, 9)),
        watermark=float(generator.choice([0.0, 0.1])), scheduler_reserve_full_isl=bool(generator.integers(2)),
    )  # fmt: skip
    decided = plan(view, limits, policy)
    assert decided == plan(view, limits, policy), "the plan is no function of the view"
    tokens = [count for _, count in decided.grants] + [a.count for a in decided.admissions]
    assert sum(tokens) <= limits.max_num_batched_tokens and min(tokens, default=1) > 0, "the token budget is broken"
    assert not (decided.preemptions and decided.admissions), "a step that preempts starts somebody"
    order = view.waiting.arrival[shortlist(view, policy, len(view.candidates))].tolist()
    started = [a.arrival for a in decided.admissions]
    assert started == [c.arrival for c in view.candidates][: len(started)], "somebody starts past another"
    assert len(order) == len(view.candidates)


def draw_view(generator: np.random.Generator) -> View:
    """Return a view as an engine could have it."""
    size, running, waiting = int(generator.integers(1, 5)), int(generator.integers(0, 5)), int(generator.integers(0, 9))
    arrivals = generator.permutation(running + waiting)
    run, wait = _draw_rows(generator, arrivals[:running]), _draw_rows(generator, arrivals[running:])
    scheduled = run.known - generator.integers(1, 1 + run.known)
    held = -(-scheduled // size)
    progress = Progress(
        slot=frozen(generator.permutation(9)[:running]), pending=frozen(run.known - scheduled),
        scheduled=frozen(scheduled), computed=frozen(scheduled - generator.integers(0, 2, running)),
        held=frozen(held), own=frozen(held), max_chunk=frozen(np.full(running, 1 << 30)),
    )  # fmt: skip
    candidates = tuple(
        Candidate(
            arrival=int(wait.arrival[i]), known=int(wait.known[i]), max_chunk=1 << 30, names=(), hits=0, resting=(0,)
        )
        for i in range(waiting)
    )
    return View(
        step=1, clock=int(generator.integers(1000, 2000)), counters=frozen(generator.random(3) * 100), block_size=size,
        groups=(FULL,), num_blocks=64, available=int(generator.integers(0, 20)), coming=int(generator.integers(0, 4)),
        running=run, progress=progress, shared=(), waiting=wait, candidates=candidates,
    )  # fmt: skip


def _draw_rows(generator: np.random.Generator, arrivals: np.ndarray) -> Rows:
    count = len(arrivals)
    prompt = generator.integers(1, 30, count)
    columns = (
        arrivals, generator.integers(0, 1000, count), generator.integers(0, 3, count), generator.integers(0, 3, count),
        prompt, prompt + generator.integers(0, 5, count), generator.integers(0, prompt, count),
        generator.random(count) * 50,
    )  # fmt: skip
    return Rows(**dict(zip(Rows.__slots__, map(frozen, columns), strict=True)))
