"""Every policy conforms, replays byte for byte, and keeps the bound that its file states."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trace_of_requests import Asked, Served, lognormal_trace, serve

from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.scheduler import policies
from seamwise.runtime.scheduler.config import QueueFullError, SchedulerConfig
from seamwise.runtime.scheduler.policies import OURS, Keys, Policy, find_policy
from seamwise.runtime.scheduler.policies.conformance import check_policy
from seamwise.runtime.scheduler.policies.ours import CACHE_AGING, PREDICTIVE_AGING, W_IN, W_OUT
from seamwise.runtime.scheduler.replay import Recording, replay
from seamwise.testing import FakeRunner

BUDGET, SEATS = 24, 4


@pytest.mark.parametrize("name", OURS)
def test_every_policy_conforms(name: str) -> None:
    check_policy(find_policy(name))
    assert find_policy(name).name == name


class Backwards(Policy):
    """Last come, first served."""

    name = "backwards"

    def admit(self, view: Any, rows: Any) -> Keys:
        return (-rows.arrival,)


def test_a_policy_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("backwards", f"{__name__}:Backwards", "seamwise.policies")
    monkeypatch.setattr(policies, "entry_points", lambda group: [point] if group == "seamwise.policies" else [])
    monkeypatch.setattr(EntryPoint, "load", lambda self: Backwards)
    assert isinstance(find_policy("backwards"), Backwards)
    check_policy(find_policy("backwards"))
    with pytest.raises(ValueError, match=r"'forwards': wanted one of fcfs, .*backwards"):
        find_policy("forwards")


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda self, view, rows: rows.arrival, "wanted a tuple"),
        (lambda self, view, rows: (np.arange(len(rows)),), "order of rows"),
        (lambda self, view, rows: (np.full(len(rows), np.nan),), "not finite"),
        (lambda self, view, rows: (np.random.default_rng().random(len(rows)),), "no function of its arguments"),
    ],
)
def test_a_policy_that_does_not_conform_is_named(broken: Any, words: str) -> None:
    policy = type("Broken", (Policy,), {"name": "broken", "admit": broken})()
    with pytest.raises(AssertionError, match=words):
        check_policy(policy)


@pytest.mark.parametrize("name", OURS)
def test_a_recording_replays_to_the_same_bytes(name: str, tmp_path: Path) -> None:
    config = SchedulerConfig(max_num_batched_tokens=BUDGET, max_num_seqs=SEATS, scheduling_policy=name)
    with closing(Recording(tmp_path / "trace", config)) as recorder:
        served = serve(lognormal_trace(12, seed=1), config, num_blocks=24, recorder=recorder)
    assert replay(tmp_path / "trace") >= served[-1].ended
    lines = (tmp_path / "trace").read_text().splitlines()
    changed = next(i for i, line in enumerate(lines) if '"grants":[[' in line)
    lines[changed] = lines[changed].replace('"grants":[[', '"grants":[[7,1],[')
    (tmp_path / "other").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=f"step {changed} was planned as"):
        replay(tmp_path / "other")


def work(asked: Asked) -> int:
    """Steps that a request takes when it is served first in each: chunks of what it may have lost, then tokens."""
    return -(-(len(asked.prompt) + asked.max_tokens) // BUDGET) + asked.max_tokens


def run(name: str, trace: list[Asked], **options: Any) -> list[Served]:
    config = SchedulerConfig(max_num_batched_tokens=BUDGET, max_num_seqs=SEATS, scheduling_policy=name, **options)
    return serve(trace, config, num_blocks=24)


@pytest.mark.parametrize("seed", range(3))
def test_fcfs_ends_within_the_work_before_it(seed: int) -> None:
    served = run("fcfs", lognormal_trace(20, seed=seed))
    for i, one in enumerate(served):
        before = sum(work(s.asked) for s in served[: i + 1])
        assert one.ended - one.asked.at <= before + 2 * (i + 1), "2: a step may be short of blocks that are under way"


@pytest.mark.parametrize("seed", range(3))
def test_priority_waits_for_the_more_urgent_alone(seed: int) -> None:
    generator = np.random.default_rng(seed)
    trace = [replace(asked, priority=int(generator.integers(3))) for asked in lognormal_trace(20, seed=seed)]
    served = run("priority", trace)
    for one in served:
        key = one.asked.priority, one.number
        before = [s for s in served if (s.asked.priority, s.number) <= key]
        assert one.ended - one.asked.at <= sum(work(s.asked) for s in before) + 2 * len(before)


@pytest.mark.parametrize("seed", range(3))
def test_predictive_and_cache_aware_are_overtaken_for_a_bounded_time(seed: int) -> None:
    for name, aging, predicted in (("predictive", PREDICTIVE_AGING, True), ("cache_aware", CACHE_AGING, False)):
        served = run(name, lognormal_trace(25, seed=seed))
        for one in served:
            size = len(one.asked.prompt) + (one.asked.max_tokens if predicted else 0)
            last = one.clock + size / aging
            over = [s for s in served if s.number > one.number and s.started < one.started]
            assert all(s.clock < last for s in over)


@pytest.mark.parametrize("seed", range(3))
def test_nobody_overtakes_without_having_waited_in_proportion(seed: int) -> None:
    served = run("response_ratio", lognormal_trace(25, seed=seed))
    longest = {s.number: max(len(s.asked.prompt) + s.asked.max_tokens, 1) for s in served}
    shortest = min(longest.values())
    for one in served:
        waited = one.started_clock - one.clock
        for s in served:
            if s.number > one.number and s.started < one.started:
                # At most the prompt may be cached, so work is known up to that.
                low = shortest - max(len(x.asked.prompt) for x in served)
                assert s.clock <= one.clock + waited * (1 - max(low, 1) / longest[one.number])


def test_fair_keeps_two_busy_tenants_within_the_bound() -> None:
    greedy = [Asked(prompt=(3,) * 9, max_tokens=8, at=0, tenant="greedy") for _ in range(30)]
    modest = [Asked(prompt=(4,) * 5, max_tokens=4, at=0, tenant="modest") for _ in range(30)]
    trace = greedy + modest
    config = SchedulerConfig(max_num_batched_tokens=BUDGET, max_num_seqs=SEATS, scheduling_policy="fair")
    gaps: list[float] = []

    def watch(view: Any, plan: Any) -> None:
        waiting = set(view.waiting.tenant.tolist())
        if waiting == {0, 1}:
            gaps.append(abs(view.counters[0] - view.counters[1]))

    serve(trace, config, num_blocks=40, recorder=watch)
    bound = 2 * max(W_IN * 9, W_OUT * SEATS * 17)
    assert len(gaps) > 10 and max(gaps) <= bound
    served = {name: run(name, trace) for name in ("fair", "fcfs")}
    first = {n: np.mean([s.started for s in found if s.asked.tenant == "modest"]) for n, found in served.items()}
    assert first["fair"] < 0.8 * first["fcfs"], "whoever sends most is served first"


def test_a_tenant_that_comes_back_has_saved_nothing_up() -> None:
    trace = [Asked(prompt=(3,) * 9, max_tokens=8, at=0, tenant="busy") for _ in range(12)]
    trace += [Asked(prompt=(4,) * 9, max_tokens=8, at=12, tenant="late") for _ in range(12)]
    served = run("fair", trace)
    order = [s.asked.tenant for s in sorted(served, key=lambda s: s.started) if s.started > 14]
    assert {*order[:6]} == {"busy", "late"}, "the newcomer is not served alone until it has caught up"


def make_engine(**options: Any) -> Engine:
    return Engine(FakeRunner(num_blocks=64, block_size=4), None, SchedulerConfig(**options))


PARAMS = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=4)


def test_a_full_queue_refuses_in_words() -> None:
    engine = make_engine(max_num_queued_reqs=2, max_num_queued_tokens=9)
    engine.add_request("a", [3] * 4, PARAMS)
    with pytest.raises(QueueFullError, match="4 prompt tokens wait and it has 6, max_num_queued_tokens=9"):
        engine.add_request("b", [3] * 6, PARAMS)
    engine.add_request("b", [3] * 4, PARAMS)
    with pytest.raises(QueueFullError, match="2 sequences wait and it has 1, max_num_queued_reqs=2"):
        engine.add_request("c", [3], PARAMS)
    engine.step()
    engine.add_request("c", [3], PARAMS)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("max_num_batched_tokens", 0, "at least 1"), ("max_num_seqs", 0, "at least 1"), ("watermark", 1.0, "below 1"),
        ("long_prefill_token_threshold", -1, "no limit"), ("max_num_queued_reqs", 0, "at least 1"),
    ],
)  # fmt: skip
def test_limits_of_nothing_are_refused(name: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"{name}={value}.*{words}"):
        SchedulerConfig(**{name: value})


def test_what_waits_has_a_named_reason() -> None:
    engine = make_engine(max_num_seqs=1)
    for name, blocked in (("a", None), ("b", None), ("c", "grammar"), ("d", "adapter")):
        engine.add_request(name, [3] * 4, PARAMS, blocked=blocked)
    engine.step()
    assert engine.scheduler.reasons() == {"grammar": 1, "adapter": 1, "next step": 1}
    engine.unblock("c")
    engine.unblock("d", "remote_kv")
    assert engine.scheduler.reasons() == {"remote_kv": 1, "next step": 2}
