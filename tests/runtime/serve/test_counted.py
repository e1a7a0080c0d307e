"""Counters of /metrics: what an engine says and what its requests got, over its restarts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.serve.http.metrics import Metrics
from seamwise.runtime.serve.process.messages import Delta, Stats


def made() -> Metrics:
    engine: Any = SimpleNamespace(members=[SimpleNamespace(stats=Stats(), info=None, state="", num_restarts=0, rank=0)])
    engine.leaving = []
    return Metrics(engine, "fake", aliases=False)


def test_an_engine_that_starts_anew_counts_on() -> None:
    metrics = made()
    assert metrics.values()["vllm:external_prefix_cache_hits_total"] == 0
    for hits, places in ((3, [2, 1]), (5, [4, 1]), (2, []), (2, [1])):  # the third is another process
        metrics.progress(0, Stats(counters={"kv_hits": hits}, accepted_per_pos=places), [])
    values = metrics.values()
    assert values["vllm:external_prefix_cache_hits_total"] == 7
    assert values["vllm:spec_decode_num_accepted_tokens_per_pos_total"] == 6


def test_each_preemption_of_a_request_counts_once() -> None:
    metrics = made()
    times = metrics.arrived(3, SamplingParams(n=2), 0)
    for index, preemptions in ((0, 0), (0, 2), (1, 1), (1, 3)):
        metrics.got(times, [Delta("r", index, "a", [1], num_preemptions=preemptions)])
    assert metrics.values()["vllm:num_preemptions_total"] == 3
