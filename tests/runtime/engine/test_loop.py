"""Which steps are under way when outputs are handed over."""

from __future__ import annotations

from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.testing import FakeRunner


def under_way(prompts: int, steps: int) -> list[int]:
    """Return how many steps are under way behind each of the first steps of requests that begin together."""
    engine = Engine(FakeRunner(num_blocks=200, block_size=4), None, SchedulerConfig(max_num_batched_tokens=4))
    for i in range(prompts):
        engine.add_request(str(i), [3, 4, 5, 6][i:], SamplingParams(max_tokens=9, ignore_eos=True, detokenize=False))
    found = []
    for _ in range(steps):
        assert len(engine.step()) == 1
        found.append(len(engine._loop.flights))
    engine.close()
    return found


def test_a_lone_first_token_is_handed_over_before_the_next_step_begins() -> None:
    assert under_way(prompts=1, steps=3) == [0, 1, 1]


def test_beside_others_no_step_waits_for_a_first_token() -> None:
    assert under_way(prompts=2, steps=1) == [1]
