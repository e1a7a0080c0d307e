"""`seamwise bench policies`: how long requests wait under each scheduling policy, on one trace, without a model.

Scheduler, pool and engine are the real ones; a step computes nothing and takes, on a clock of its own, 6 ms + 30 us for
each token of it + 40 ns for each token of the past that it reads: an 8 B model in bfloat16 at 3 TB/s and 500 TFLOP/s.
Requests arrive by Poisson's law, lengths are lognormal, prompts begin with one of some system prompts and one of some
sets of examples, both by Zipf's law; a prediction of the output's length is off by a lognormal factor.
Waiting is from arrival to the first step that computes the request. SGLang's rules: bench/policies_sglang.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.sampling.params import RequestOutputKind, SamplingParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.runtime.scheduler.policies import OURS, Policy, find_policy
from seamwise.runtime.scheduler.view import Plan, View

from .command_line import command_line, parse, picture, save
from .engine import VOCAB, NoModel
from .policies_sglang import RULES
from .policies_sglang import Path as Node

STEP_S, TOKEN_S, PAST_S = 6e-3, 30e-6, 40e-9
FIGURES = (
    "mean wait", "p99 wait", "longest wait", "wait, urgent", "wait, small tenant", "mean latency", "p99 latency",
    "share cached",
)  # fmt: skip
SHARES = np.linspace(0, 1, 201)  # of requests, at which waits are kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request: when it comes, of which tenant, and where its prompt ends in the tree of prefixes."""

    at_s: float
    prompt: list[int]
    max_tokens: int
    predicted: float
    priority: int
    tenant: str
    path: Node


def draw_trace(count: int, rate: float, seed: int = 0) -> list[Asked]:
    """Return a trace: `rate` requests a second, 8 system prompts of 256 tokens, each with 8 sets of 256 more.

    A third is urgent, a tenth of another tenant. Raises ValueError where none would be.
    """
    if count < 10:
        raise ValueError(f"--requests {count}: wanted at least 10, so that each kind of request is among them")
    draw = np.random.default_rng(seed)

    def zipf() -> int:
        share = np.arange(1, 9.0) ** -1
        return int(draw.choice(8, p=share / share.sum()))

    heads = draw.integers(3, VOCAB, (8, 256)).tolist()
    sets = draw.integers(3, VOCAB, (8, 8, 256)).tolist()
    found, at_s = [], 0.0
    for i in range(count):
        at_s += draw.exponential(1 / rate)
        a, b = zipf(), zipf()
        own = draw.integers(3, VOCAB, int(np.clip(draw.lognormal(5.0, 1.0), 8, 2048))).tolist()
        output = int(np.clip(draw.lognormal(4.3, 0.9), 2, 1024))
        found.append(
            Asked(
                at_s=at_s, prompt=heads[a] + sets[a][b] + own, max_tokens=output,
                predicted=output * float(draw.lognormal(0, 0.5)), priority=i % 3,
                tenant="small" if i % 10 == 4 else "large", path=((f"{a}", 256), (f"{a}.{b}", 512)),
            )
        )  # fmt: skip
    return found


def serve(trace: Sequence[Asked], policy: Policy, num_blocks: int, config: SchedulerConfig) -> dict[str, np.ndarray]:
    """Serve a trace; return each request's seconds of waiting ("wait") and until its end ("latency"), and the tokens of
    its prompt that came from the cache ("cached").
    """
    now = spent = 0.0
    started, ended, cached = (np.full(len(trace), np.nan) for _ in range(3))

    def planned(view: View, plan: Plan) -> None:
        nonlocal spent
        for one in plan.admissions:
            if np.isnan(started[one.arrival - 1]):
                started[one.arrival - 1], cached[one.arrival - 1] = now, one.hits * view.block_size
        at = dict(zip(view.progress.slot.tolist(), view.progress.scheduled.tolist(), strict=True))
        tokens = sum(n for _, n in plan.grants) + sum(one.count for one in plan.admissions)
        past = sum(at[slot] for slot, _ in plan.grants) + sum(one.hits * view.block_size for one in plan.admissions)
        spent = (STEP_S + TOKEN_S * tokens + PAST_S * past) if tokens else 0.0

    runner: Any = NoModel(num_blocks, 4096)
    engine = Engine(runner, None, config, policy=policy, recorder=planned)
    added = 0
    while added < len(trace) or engine.has_unfinished_requests():
        if not engine.has_unfinished_requests():
            now = max(now, trace[added].at_s)
        while added < len(trace) and trace[added].at_s <= now:
            one = trace[added]
            params = SamplingParams(
                temperature=0, ignore_eos=True, detokenize=False, max_tokens=one.max_tokens,
                output_kind=RequestOutputKind.FINAL_ONLY, extra_args={"predicted_tokens": one.predicted},
            )  # fmt: skip
            engine.add_request(str(added), one.prompt, params, priority=one.priority, tenant=one.tenant)
            added += 1
        outputs = engine.step()
        now += spent
        for output in outputs:
            ended[int(output.request_id)] = now
    engine.close()
    arrived = np.array([one.at_s for one in trace])
    return {"wait": started - arrived, "latency": ended - arrived, "cached": cached}


def measure(trace: Sequence[Asked], policy: Policy, num_blocks: int, config: SchedulerConfig) -> dict[str, Any]:
    """Return a policy's figures, seconds but for the share of prompts' tokens that came from the cache."""
    served = serve(trace, policy, num_blocks, config)
    wait, latency = served["wait"], served["latency"]
    urgent = np.array([one.priority == 0 for one in trace])
    small = np.array([one.tenant == "small" for one in trace])
    figures = (
        wait.mean(), np.quantile(wait, 0.99), wait.max(), wait[urgent].mean(), wait[small].mean(), latency.mean(),
        np.quantile(latency, 0.99), served["cached"].sum() / sum(len(one.prompt) for one in trace),
    )  # fmt: skip
    waits = np.quantile(wait, SHARES).round(4).tolist()
    return {**dict(zip(FIGURES, map(float, figures), strict=True)), "waits": waits}


def plot(results: dict[str, dict[str, Any]], path: Path) -> None:
    """Write which share waits longer than so many seconds. Raises RuntimeError without matplotlib."""
    with picture(path, 8, 5) as axes:
        for i, (name, found) in enumerate(results.items()):
            axes.plot(np.maximum(found["waits"], 1e-3), 1 - SHARES, f"C{i}{'-' if name in OURS else ':'}", label=name)
        axes.set(xscale="log", yscale="log", xlabel="seconds of waiting", ylabel="share of requests that waits longer")
        axes.legend(fontsize="small", title="dotted: SGLang's rules")


def main(arguments: list[str]) -> int:
    """Parse arguments, serve the trace by every policy, print a line each, write JSON and a plot when asked."""
    parser = command_line("policies", __doc__, model=False, cpu=False, plot="which share of requests waits how long")
    parser.add_argument("--requests", type=int, default=1500)
    parser.add_argument("--rate", type=float, default=42.0, help="requests a second")
    parser.add_argument("--blocks", type=int, default=3000, help="KV blocks of 16 tokens")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    options = parse(parser, arguments)
    trace = draw_trace(options.requests, options.rate, options.seed)
    paths = {i + 1: one.path for i, one in enumerate(trace)}
    config = SchedulerConfig(
        max_num_seqs=options.max_num_seqs, max_num_batched_tokens=options.max_num_batched_tokens,
        async_scheduling=False,
    )  # fmt: skip
    results: dict[str, dict[str, Any]] = {}
    print(f"{'seconds':14} {' '.join(f'{name:>18}' for name in FIGURES)}")
    for policy in [*map(find_policy, OURS), *(rule(paths) for rule in RULES)]:
        results[policy.name] = found = measure(trace, policy, options.blocks, config)
        print(f"{policy.name:14} {' '.join(f'{found[name]:18.2f}' for name in FIGURES)}", flush=True)
    load = {name: value for name, value in vars(options).items() if name not in ("json", "plot")}
    save(options, load=load, step_s=[STEP_S, TOKEN_S, PAST_S], results=results)
    if options.plot:
        plot(results, options.plot)
    return 0
