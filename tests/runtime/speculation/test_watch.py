"""The watch against times that are given, and beside an engine whose drafter takes time of the host."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence as Series

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seamwise.runtime.engine.drafting import Drafting
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.runtime.speculation.drafter import Known
from seamwise.runtime.speculation.watch import COST, PERIOD, SAMPLES, Watch
from seamwise.testing import FakeRunner


class Clock:
    """Steps of decoding that take given times, as the watch decides."""

    def __init__(self) -> None:
        self.watch, self.now = Watch(), 100.0

    def run(self, count: int, *, without_s: float, with_s: float, tokens: int, sequences: int = 4) -> list[bool]:
        """Run steps; return which of them guessed."""
        guessed = []
        for _ in range(count):
            guessed.append(self.watch.wants(sequences))
            self.now += with_s if guessed[-1] else without_s
            self.watch.note(sequences, self.now, tokens if guessed[-1] else None)
        return guessed


def test_it_guesses_while_that_is_faster_and_samples_what_it_does_not_do() -> None:
    clock = Clock()
    # Two tokens a sequence for half more time.
    assert sum(clock.run(PERIOD, without_s=1.0, with_s=1.5, tokens=4 * 2)) == PERIOD - SAMPLES
    # One token: it is off soon, but for samples.
    assert sum(clock.run(5 * PERIOD, without_s=1.0, with_s=1.5, tokens=4)) <= 5 * SAMPLES + 6
    # It pays again, which the samples see.
    assert sum(clock.run(6 * PERIOD, without_s=1.0, with_s=1.5, tokens=4 * 2)) > 3 * PERIOD
    assert clock.run(2 * SAMPLES, without_s=1.0, with_s=1.5, tokens=40, sequences=40)[-1], "each size has its verdict"


@settings(max_examples=25)  # of 20,000 steps each
@given(with_s=st.floats(0.5, 50), accepted=st.floats(1, 3))
def test_a_drafter_that_is_of_no_use_costs_little_however_slow_it_is(with_s: float, accepted: float) -> None:
    clock = Clock()
    clock.run(3 * SAMPLES, without_s=1.0, with_s=with_s, tokens=round(400 * accepted), sequences=400)
    began, tokens = clock.now, 0.0
    for guessed in clock.run(20_000, without_s=1.0, with_s=with_s, tokens=round(400 * accepted), sequences=400):
        tokens += accepted if guessed else 1.0
    assert (clock.now - began) / tokens <= 1 / (1 - COST) + SAMPLES * with_s / 20_000


def test_one_slow_step_does_not_count() -> None:
    clock = Clock()
    clock.run(SAMPLES + 2, without_s=1.0, with_s=1.5, tokens=8)
    clock.run(1, without_s=1.0, with_s=90.0, tokens=8)  # a recording is made
    assert all(clock.run(PERIOD - 10, without_s=1.0, with_s=1.5, tokens=8))


def test_a_step_behind_another_kind_of_step_is_not_timed() -> None:
    watch = Watch()
    for ended_s, tokens in ((1.0, None), (2.0, None), (50.0, 4), (51.5, 4)):
        watch.note(4, ended_s, tokens)
    watch.interrupt()
    watch.note(4, 99.0, 4)
    watch.note(4, 100.5, 4)
    assert [*watch.of(4).without_s] == [1.0] and [*watch.of(4).with_s] == [1.5, 1.5]


class Slow:
    """A drafter that is always wrong; it takes its time between steps, which no step's own time shows."""

    def propose(self, known: Series[Known]) -> list[list[int]]:
        time.sleep(0.02)
        return [[0] for _ in known]


@pytest.mark.parametrize("asynchronous", [True, False])
def test_time_between_steps_counts_and_is_told_once(asynchronous: bool, caplog: pytest.LogCaptureFixture) -> None:
    runner = FakeRunner(num_blocks=300, block_size=4, eos_ids=(), max_model_len=1100)
    drafting = Drafting(drafter=Slow(), most=2)
    engine = Engine(runner, None, SchedulerConfig(async_scheduling=asynchronous), drafting=drafting)
    with caplog.at_level(logging.WARNING):
        for name in "ab":
            engine.add_request(name, [3, 4, 5], SamplingParams(temperature=0, max_tokens=150, detokenize=False))
            while engine.has_unfinished_requests():
                engine.step()
    engine.close()
    assert not drafting.stats.active and drafting.stats.gain < 0.7
    assert drafting.stats.num_drafts <= 2 * SAMPLES + 1, "it is asked again, or was not switched off"
    (told,) = [record.getMessage() for record in caplog.records if "speculation is off" in record.getMessage()]
    assert "at 1 sequences a step, tokens come 0." in told and "tried again every" in told
