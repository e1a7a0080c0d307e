"""`seamwise bench engine`: what the host does for a step, over a runner whose steps cost nothing.

Host time is split into plan (view, plan, commit), batch (the step's tensors), complete (counters, names, stops) and
answer (outputs), in processor time of its thread. With --model, decode steps of that model are timed beside it, and the
gap between two of them: what of the host's work is not hidden behind a step.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from seamwise.runtime.build.kv_groups import FULL
from seamwise.runtime.build.step import StepInput, StepOutput
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.sampling.params import RequestOutputKind, SamplingParams
from seamwise.runtime.scheduler.config import SchedulerConfig

from .command_line import command_line, parse, refuse_ignored, save

STEPS = 60
VOCAB = 512


class NoModel:
    """A runner that computes nothing: every token is 7."""

    def __init__(self, num_blocks: int, max_model_len: int) -> None:
        self.num_blocks, self.block_size = num_blocks, 16
        self.kv_groups = (FULL,)
        self.options = SimpleNamespace(max_model_len=max_model_len, device="cpu")
        self.config = SimpleNamespace(vocab_size=VOCAB, eos_ids=())

    def step(self, batch: StepInput) -> StepOutput:
        logits = torch.zeros(len(batch.logit_rows), VOCAB)
        logits[:, 7] = 1.0
        return StepOutput(logits=logits)


class Stopwatch:
    """Sums what calls of an object's methods take, in us of one step."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def watch(self, name: str, holder: Any, method: str) -> None:
        call: Callable[..., Any] = getattr(holder, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.thread_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.spent[name] = self.spent.get(name, 0.0) + 1e6 * (time.thread_time() - began)

        setattr(holder, method, timed)


def host_us(running: int, waiting: int, policy: str) -> dict[str, float]:
    """Return the medians, in us a step, of the host's parts while `running` requests decode and `waiting` wait."""
    from seamwise.runtime.engine import loop

    config = SchedulerConfig(
        max_num_seqs=running, max_num_batched_tokens=8192, async_scheduling=False, scheduling_policy=policy
    )
    engine = Engine(NoModel(running * 16 + 1, 256), None, config)  # type: ignore[arg-type]
    params = SamplingParams(
        temperature=0, ignore_eos=True, detokenize=False, max_tokens=200, output_kind=RequestOutputKind.DELTA
    )
    for i in range(running + waiting):
        engine.add_request(str(i), [i % VOCAB, *range(3, 18)], params)
    for _ in range(5):
        engine.step()
    watch = Stopwatch()
    watch.watch("plan", engine.scheduler, "schedule")
    watch.watch("step", engine._loop.worker, "submit")
    watch.watch("complete", engine._loop, "commit")
    watch.watch("answer", engine, "_answer")
    original, rounds = loop.build_batch, []
    watch.watch("batch", loop, "build_batch")
    try:
        for _ in range(STEPS):
            watch.spent = {}
            began = time.thread_time()
            engine.step()
            total = 1e6 * (time.thread_time() - began)
            rounds.append({**watch.spent, "host": total - watch.spent["step"]})
    finally:
        loop.build_batch = original
    engine.close()
    return {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}


def abort_ms(waiting: int) -> float:
    """Return the ms of processor time in which so many waiting requests are aborted one by one, the least of five."""
    engine = Engine(NoModel(65, 256), None, SchedulerConfig(max_num_seqs=4))  # type: ignore[arg-type]
    params, took = SamplingParams(temperature=0, detokenize=False, max_tokens=9), []
    names = [str(i) for i in range(waiting)]
    for _ in range(5):
        for name in names:
            engine.add_request(name, [3, 4, 5], params)
        began = time.thread_time()
        for name in names:
            engine.abort_request(name)
        took.append(1e3 * (time.thread_time() - began))
    engine.close()
    return min(took)


def hidden(model: str, requests: int) -> dict[str, float]:
    """Return the medians, in us a step, of a model's decode step in its thread, and between two steps' starts."""
    from seamwise import LLM

    llm = LLM(model, max_num_seqs=requests, max_model_len=256)
    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=64)
    found: dict[str, float] = {}
    for name, depth in (("synchronous", 1), ("asynchronous", 2)):
        llm.engine.drain()
        llm.engine._loop.depth = depth
        results: list[Any] = []
        wait = llm.engine._loop.wait

        def kept(wait: Any = wait, results: list[Any] = results) -> Any:
            results.append(wait())
            return results[-1]

        llm.engine._loop.wait = kept
        llm.generate([{"prompt_token_ids": [5, 6, 7, i % 100]} for i in range(requests)], params, use_tqdm=False)
        llm.engine._loop.wait = wait
        decode = results[4:-2]
        steps = [1e6 * (r.ended - r.began) for r in decode]
        gaps = [1e6 * (b.began - a.ended) for a, b in itertools.pairwise(decode)]
        found[f"{name} step"] = statistics.median(steps)
        found[f"{name} gap between steps"] = statistics.median(gaps)
    llm.engine.close()
    return found


def main(arguments: list[str]) -> int:
    """Parse arguments, measure, print, write JSON when asked."""
    parser = command_line("engine", __doc__, model=False)
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--policy", default="fcfs")
    parser.add_argument("--model", help="measure a model's step beside it, and what of the host's work it hides")
    parser.add_argument("--requests", type=int, default=32, help="with --model (default 32)")
    options = parse(parser, arguments)
    if not options.model:
        refuse_ignored(parser, options, "without --model", "requests")
    host = host_us(options.running, options.waiting, options.policy)
    parts = "  ".join(f"{name} {host[name]:.0f}" for name in ("plan", "batch", "complete", "answer"))
    print(
        f"{options.running} running, {options.waiting} waiting, {options.policy}: host {host['host']:.0f} us a step,"
        f" {host['host'] / options.running:.1f} us a request  ({parts})"
    )
    report: dict[str, Any] = {"running": options.running, "waiting": options.waiting, "host_us": host}
    report["abort_ms"] = abort_ms(options.waiting)
    print(f"{options.waiting} waiting requests are aborted one by one in {report['abort_ms']:.1f} ms")
    if options.model:
        small = host_us(options.requests, 0, options.policy)
        report["model"] = measured = hidden(options.model, options.requests)
        step = measured["asynchronous step"]
        print(
            f"{options.requests} requests: step {step:.0f} us, host {small['host']:.0f} us"
            f" ({small['host'] / step:.1%}), gap between steps {measured['asynchronous gap between steps']:.0f} us,"
            f" {measured['synchronous gap between steps']:.0f} us without async scheduling"
        )
    save(options, **report)
    return 0
