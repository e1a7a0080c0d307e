"""Who gives blocks back when they are short: as many as must, and none for blocks that others of them free."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
from hypothesis import given

from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.kv.pool import BlockPool
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.runtime.scheduler.plan import plan
from seamwise.runtime.scheduler.policies import find_policy
from seamwise.runtime.scheduler.policies.conformance import draw_view
from seamwise.runtime.scheduler.view import Plan, View, frozen
from seamwise.runtime.scheduler.viewing import _what_they_would_free
from seamwise.testing import FakeRunner

SIZE = 4


class Holding:
    """A sequence as far as what it holds."""

    def __init__(self, blocks: list[int]) -> None:
        self.held_blocks = blocks


@st.composite
def shared_views(draw: st.DrawFn) -> tuple[View, list[list[int]], BlockPool]:
    """Return a view of three or four sequences whose first blocks are the same, what each holds, and the pool."""
    count = draw(st.integers(3, 4))
    pool = BlockPool(num_blocks=40, block_size=SIZE)
    common = pool.take(draw(st.integers(0, 4)))
    for block in common:
        pool.publish(block, bytes([block]))
    held: list[list[int]] = []
    for row in range(count):
        shares = draw(st.sampled_from([0, len(common), len(common)])) if 0 < row < count - 1 else 0
        shares = len(common) if row == 0 else shares  # the last one shares none
        for block in common[:shares] if row else ():
            pool.hold(block)
        held.append([*common[:shares], *pool.take(draw(st.integers(not shares, 1)))])
    if draw(st.booleans()):  # somebody else, who is no sequence, holds some of them
        leased = common[: draw(st.integers(0, len(common)))]
        pool.lease("copy", leased)
    pool.take(pool.num_available - draw(st.integers(0, 1)))  # what is left is somebody else's
    own, shared = _what_they_would_free(pool, [Holding(blocks) for blocks in held])  # type: ignore[misc]
    view = next(v for v in map(draw_view, map(np.random.default_rng, range(99))) if len(v.running) >= count)
    arrival = frozen(np.array(draw(st.permutations(range(count)))))
    scheduled = np.array([len(blocks) * SIZE for blocks in held])  # each needs a block for its next token
    columns = {
        "slot": np.arange(count), "pending": np.ones(count, int), "scheduled": scheduled, "computed": scheduled,
        "held": scheduled // SIZE, "own": own, "max_chunk": np.full(count, 99),
    }  # fmt: skip
    progress = replace(view.progress, **{name: frozen(column) for name, column in columns.items()})
    view = replace(
        view, block_size=SIZE, running=replace(view.running.take(np.arange(count)), arrival=arrival),
        progress=progress, shared=shared, available=pool.num_available, coming=0, candidates=(),
    )  # fmt: skip
    return view, held, pool


@given(shared_views())
def test_as_many_give_blocks_back_as_must(drawn: tuple[View, list[list[int]], BlockPool]) -> None:
    view, held, pool = drawn
    decided = plan(view, SchedulerConfig(max_num_batched_tokens=99), find_policy("fcfs"))
    for slot in decided.preemptions:
        others = len(decided.grants) + len(decided.preemptions[decided.preemptions.index(slot) :])
        assert pool.num_available < others, "one gives its blocks back that nobody needs"
        pool.release(held[slot])
    assert pool.num_available >= len(decided.grants)


def test_twins_that_give_back_what_they_share_leave_room_for_the_rest() -> None:
    """Blocks that both samples of a request hold are free when both have given theirs back: the third goes on."""
    runner = FakeRunner(num_blocks=14, block_size=1, max_tokens=14)
    plans: list[Plan] = []
    config = SchedulerConfig(
        max_num_batched_tokens=14, max_num_seqs=5, scheduling_policy="predictive", long_prefill_token_threshold=3,
        async_scheduling=False, scheduler_reserve_full_isl=False,
    )  # fmt: skip
    engine = Engine(runner, None, config, recorder=lambda view, decided: plans.append(decided))
    start = [3, 4, 3, 5, 6, 3, 3]
    for name, prompt, n, most in (
        ("a", [*start, 4, 5, 5, 4, 3], 1, 1), ("b", [*start, 4, 5, 5, 3], 1, 1), ("c", [*start, 5, 3, 3], 2, 4),
    ):  # fmt: skip
        params = SamplingParams(temperature=0, seed=0, n=n, max_tokens=most, detokenize=False)
        engine.add_request(name, prompt, params)
    engine.step()
    engine.add_request("d", [3, 3], SamplingParams(temperature=0, seed=0, max_tokens=8, detokenize=False))
    while engine.has_unfinished_requests():
        engine.step()
    engine.close()
    assert any(len(each.preemptions) == 2 for each in plans), "no twins gave blocks back"
    assert all(each.grants for each in plans if each.preemptions), "a step was spent on giving blocks back alone"
