"""Traces of requests with lognormal lengths, served over the fake runner step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.testing import FakeRunner


@dataclass(frozen=True)
class Asked:
    """A request and the step before which it arrives."""

    prompt: tuple[int, ...]
    max_tokens: int
    at: int = 0
    priority: int = 0
    tenant: str = ""


@dataclass(frozen=True)
class Served:
    """When it arrived by the scheduler's clock, in which step and at which clock it started, and when it ended."""

    number: int
    asked: Asked
    clock: int
    started: int
    started_clock: int
    ended: int


def lognormal_trace(count: int, *, seed: int, rate: float = 0.7) -> list[Asked]:
    """Return requests of lognormal lengths (prompt 1 to 40, output 1 to 20), so many a step on average."""
    generator = np.random.default_rng(seed)
    at = np.floor(np.cumsum(generator.exponential(1 / rate, count))).astype(int)
    prompts = np.clip(generator.lognormal(2.2, 0.8, count), 1, 40).astype(int)
    outputs = np.clip(generator.lognormal(1.6, 0.7, count), 1, 20).astype(int)
    return [
        Asked(tuple(generator.integers(3, 7, p).tolist()), int(o), int(t))
        for p, o, t in zip(prompts, outputs, at, strict=True)
    ]


def serve(trace: list[Asked], config: SchedulerConfig, *, num_blocks: int, recorder: Any = None) -> list[Served]:
    """Serve a trace with synchronous steps; return each request's times, in the order of arrival."""
    config = SchedulerConfig(**{**{n: getattr(config, n) for n in config.__slots__}, "async_scheduling": False})
    engine = Engine(FakeRunner(num_blocks=num_blocks, block_size=4), None, config, recorder=recorder)
    clocks: dict[int, int] = {}
    started: dict[int, tuple[int, int]] = {}
    ended: dict[int, int] = {}
    step = 0
    while engine.has_unfinished_requests() or len(clocks) < len(trace):
        for number, asked in enumerate(trace):
            if asked.at == step and number not in clocks:
                clocks[number] = engine.scheduler.clock
                params = SamplingParams(
                    temperature=0, ignore_eos=True, detokenize=False, max_tokens=asked.max_tokens,
                    extra_args={"predicted_tokens": asked.max_tokens},
                )  # fmt: skip
                engine.add_request(
                    str(number), list(asked.prompt), params, priority=asked.priority, tenant=asked.tenant
                )
        before = engine.scheduler.clock
        waiting = {s.id for s in engine.scheduler.queue.sequences if s.num_cached is None}
        outputs = engine.step()
        for name in waiting - {s.id for s in engine.scheduler.queue.sequences}:
            started[int(name.partition("/")[0])] = step, before
        for output in outputs:
            if output.finished:
                ended[int(output.request_id)] = step + 1
        step += 1
        assert step < 5000, "somebody starves"
    return [Served(i, a, clocks[i], *started[i], ended[i]) for i, a in enumerate(trace)]
