"""Prometheus metrics with vLLM's names, from what the engine says and what requests got.

Source: the names are listed in https://docs.vllm.ai/en/latest/usage/metrics
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.serve.process.client import EngineClient
from seamwise.runtime.serve.process.engines import Engines
from seamwise.runtime.serve.process.messages import Delta, Stats

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
_LONG_SECONDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


@dataclass(slots=True)
class RequestTimes:
    """When one request's tokens came, and what else is known of it until now, for the histograms."""

    prompt_tokens: int
    rank: int
    arrival_s: float = field(default_factory=time.perf_counter)
    first_s: float = 0.0
    last_s: float = 0.0
    tokens: int = 0
    cached: int = 0
    preemptions: int = 0


class Metrics:
    """All metrics of one server, in a registry of their own."""

    def __init__(self, engine: Engines, model: str, aliases: bool) -> None:
        self.registry = CollectorRegistry()
        self._model = model
        self._last: dict[int, Stats] = {}
        names = ("model_name", "engine")

        def counter(name: str, what: str, *more: str) -> Counter:
            home = "seamwise" if name.startswith(("kv_offload_", "cascade_")) else "vllm"
            return Counter(f"{home}:{name}", what, (*names, *more), registry=self.registry)

        def histogram(name: str, what: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"vllm:{name}", what, names, registry=self.registry, buckets=tuple(buckets))

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of requests.")
        self.cached_tokens = counter("prompt_tokens_cached", "Prompt tokens served from the cache.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.prefix_queries = counter("prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self.prefix_hits = counter("prefix_cache_hits", "Tokens found in the prefix cache.")
        self.preemptions = counter("num_preemptions", "Requests that gave their blocks back.")
        self.counted = {  # Stats.counters
            "num_drafts": counter("spec_decode_num_drafts", "Guesses of a sequence's next tokens."),
            "num_draft_tokens": counter("spec_decode_num_draft_tokens", "Tokens guessed."),
            "num_accepted_tokens": counter("spec_decode_num_accepted_tokens", "Guessed tokens that stood."),
            "kv_queries": counter("external_prefix_cache_queries", "Tokens that the KV cache did not have."),
            "kv_hits": counter("external_prefix_cache_hits", "Tokens of these that tiers behind it gave."),
            "kv_stored": counter("kv_offload_stored_blocks", "Blocks copied out of the KV cache."),
            "kv_loaded": counter("kv_offload_loaded_blocks", "Blocks brought back into it."),
            "kv_lost": counter("kv_offload_lost_blocks", "Blocks that a tier had, and that were gone or damaged."),
            "kv_failed": counter("kv_offload_failed_blocks", "Blocks that a tier could not take or give."),
            "cascade_tiles": counter(
                "cascade_attention_tiles", "Tiles of 64 keys, of all layers, that several requests attended to at once."
            ),
        }
        self.accepted_at = counter(
            "spec_decode_num_accepted_tokens_per_pos", "Guessed tokens that stood, by their place.", "position"
        )
        self.success = counter("request_success", "Requests that ended, by the reason.", "finished_reason")
        self.rejections = counter("admission_rejections", "Requests refused at the door, by the reason.", "reason")
        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self.itl = histogram("inter_token_latency_seconds", "Between two tokens of an output.", _SECONDS)
        self.tpot = histogram("request_time_per_output_token_seconds", "A request's mean of it.", _SECONDS)
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the end.", _LONG_SECONDS)
        self.queue = histogram("request_queue_time_seconds", "From arrival to the first step.", _LONG_SECONDS)
        self.prefill = histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", _LONG_SECONDS
        )
        self.decode = histogram("request_decode_time_seconds", "From the first token to the end.", _LONG_SECONDS)
        self.inference = histogram("request_inference_time_seconds", "From the first step to the end.", _LONG_SECONDS)
        self.iteration = histogram("iteration_tokens_total", "Tokens that a step's requests got.", _COUNTS)
        self.of_prompt = histogram("request_prompt_tokens", "Prompt tokens of a request.", _COUNTS)
        self.of_output = histogram("request_generation_tokens", "Tokens generated for a request.", _COUNTS)
        self.of_n = histogram("request_params_n", "n of a request.", (1, 2, 5, 10, 20))
        self.of_max = histogram("request_params_max_tokens", "max_tokens of a request.", _COUNTS)
        for rank in range(len(engine.members)):  # they are there from the start
            for made in (*vars(self).values(), *self.counted.values()):
                if isinstance(made, (Counter, Histogram)) and made._labelnames == names:
                    made.labels(*self._of(rank))
        self.registry.register(_Now(engine, self._of, aliases))
        engine.watch = self.progress

    def _of(self, rank: int) -> tuple[str, str]:
        return self._model, str(rank)

    def progress(self, rank: int, stats: Stats, deltas: list[Delta]) -> None:
        """Take an engine's word after a step."""
        last, of = self._last.get(rank, Stats()), self._of(rank)
        self._last[rank] = stats
        for name, now in stats.counters.items():
            self.counted[name].labels(*of).inc(_more(now, last.counters.get(name, 0)))
        for place, (now, before) in enumerate(zip_longest(stats.accepted_per_pos, last.accepted_per_pos, fillvalue=0)):
            self.accepted_at.labels(*of, str(place)).inc(_more(now, before))
        if deltas:
            self.iteration.labels(*of).observe(sum(len(delta.token_ids) for delta in deltas))

    def reject(self, reason: str) -> None:
        self.rejections.labels(*self._of(0), reason).inc()

    def arrived(self, prompt_tokens: int, params: SamplingParams, rank: int) -> RequestTimes:
        """Note a request that was queued at an engine."""
        of = self._of(rank)
        self.prompt_tokens.labels(*of).inc(prompt_tokens)
        self.prefix_queries.labels(*of).inc(prompt_tokens)
        self.of_prompt.labels(*of).observe(prompt_tokens)
        self.of_n.labels(*of).observe(params.n)
        if params.max_tokens is not None:
            self.of_max.labels(*of).observe(params.max_tokens)
        return RequestTimes(prompt_tokens, rank)

    def got(self, times: RequestTimes, deltas: Iterable[Delta]) -> None:
        """Note what a request got."""
        now, of = time.perf_counter(), self._of(times.rank)
        for delta in deltas:
            count = len(delta.token_ids)
            if not times.tokens and count:
                times.first_s = now
                self.ttft.labels(*of).observe(now - times.arrival_s)
                times.cached = delta.num_cached_tokens
                self.cached_tokens.labels(*of).inc(times.cached)
                self.prefix_hits.labels(*of).inc(times.cached)
            elif count:
                self.itl.labels(*of).observe((now - times.last_s) / count)
            times.last_s = now
            preempted = max(delta.num_preemptions, times.preemptions)  # an output's older delta may come behind
            self.preemptions.labels(*of).inc(preempted - times.preemptions)
            times.preemptions = preempted
            times.tokens += count
            self.generation_tokens.labels(*of).inc(count)
            if delta.finish_reason is not None:
                self.success.labels(*of, delta.finish_reason).inc()
            if delta.request_finished:
                self.e2e.labels(*of).observe(now - times.arrival_s)
                self.of_output.labels(*of).observe(times.tokens)
                if delta.times_s:
                    queued_s, prefill_s, decode_s = delta.times_s
                    self.queue.labels(*of).observe(queued_s)
                    self.prefill.labels(*of).observe(prefill_s)
                    self.decode.labels(*of).observe(decode_s)
                    self.inference.labels(*of).observe(prefill_s + decode_s)
                if times.tokens > 1:
                    self.tpot.labels(*of).observe((now - times.first_s) / (times.tokens - 1))

    def values(self) -> dict[str, float]:
        """Return each counter's value by its name in the exposition."""
        found: dict[str, float] = {}
        for family in self.registry.collect():
            for sample in family.samples:
                if sample.name.endswith("_total") and family.type == "counter":
                    found[sample.name] = found.get(sample.name, 0.0) + sample.value
        return found

    def total_of(self, histogram: str) -> tuple[int, float]:
        """Return how many values a histogram of this object has, and their sum."""
        found = {"count": 0.0, "sum": 0.0}
        for sample in (s for m in getattr(self, histogram).collect() for s in m.samples):
            if (what := sample.name.rpartition("_")[2]) in found:
                found[what] += sample.value
        return int(found["count"]), found["sum"]

    def text(self) -> bytes:
        """Return the exposition."""
        return generate_latest(self.registry)


def _more(now: int, before: int) -> int:
    """Return by how much a counter grew; another process' starts anew."""
    return now - before if now >= before else now


class _Now:
    """Gauges that are read when they are asked for."""

    def __init__(self, engine: Engines, of: Callable[[int], tuple[str, str]], aliases: bool) -> None:
        self._engine, self._of, self._aliases = engine, of, aliases

    def collect(self) -> Iterator[Metric]:
        """Yield each gauge, with what every engine has of it."""
        found: dict[str, GaugeMetricFamily] = {}
        for member in (*self._engine.members, *self._engine.leaving):
            for name, what, rows in self._of_engine(member):
                keys = ("model_name", "engine", *(rows[0][0] if rows else ()))
                family = found.setdefault(name, GaugeMetricFamily(name, what, labels=keys))
                for more, value in rows:
                    family.add_metric([*self._of(member.rank), *more.values()], value)
        yield from found.values()

    def _of_engine(self, member: EngineClient) -> Iterator[tuple[str, str, list[tuple[dict[str, str], float]]]]:
        stats, info, asleep = member.stats, member.info, member.stats.sleeping
        values = {
            "num_requests_running": ("Requests in the batch.", stats.num_running),
            "num_requests_waiting": ("Requests that wait for a place in it.", stats.num_waiting),
            "kv_cache_usage_perc": ("Share of KV cache blocks in use, 0 to 1.", stats.kv_cache_usage),
            "spec_decode_active": (
                "Whether tokens are guessed: 0 where that is measured to be slower.",
                stats.speculating,
            ),
            "spec_decode_gain": ("Tokens a second with guesses, of those without.", stats.speculation_gain),
        }
        if self._aliases:
            values["gpu_cache_usage_perc"] = ("As kv_cache_usage_perc.", stats.kv_cache_usage)
        for name, (what, value) in values.items():
            yield f"vllm:{name}", what, [({}, value)]
        states = {"awake": not asleep, "weights_offloaded": asleep == 1, "discard_all": asleep == 2}
        rows = [({"sleep_state": name}, float(on)) for name, on in states.items()]
        yield "vllm:engine_sleep_state", "Which of the states the engine is in.", rows
        yield "seamwise:engine_up", "Whether the engine takes requests.", [({}, member.state == "ready")]
        yield "seamwise:engine_restarts", "Times it was started again.", [({}, member.num_restarts)]
        if info is None:
            return
        cache = {"block_size": str(info.block_size), "num_gpu_blocks": str(info.num_blocks), "cache_dtype": info.dtype}
        yield "vllm:cache_config_info", "The KV cache.", [(cache, 1)]
        stages = [({"stage": name}, seconds) for name, seconds in info.startup_s.items()]
        yield "seamwise:startup_seconds", "Seconds of start-up by stage.", stages
        passes: dict[str, int] = {}
        for one in info.explain.get("passes", ()):
            passes[one["name"]] = passes.get(one["name"], 0) + one["matched"]
        rows = [({"pass": name}, float(count)) for name, count in passes.items()]
        yield "seamwise:pass_matches", "How often each compiler pass fired.", rows
