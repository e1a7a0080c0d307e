"""Three engines that share out experts take ten thousand steps, while some are killed, stopped for good or delayed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from moe_families import MOE
from tiny_models import save_tiny

from seamwise import LLM, SamplingParams
from seamwise.runtime.serve.async_llm import AsyncLLM
from seamwise.runtime.serve.process.streams import EngineError

SEED, STEPS, RANKS = 20261127, 10_000, 3
LOAD = {"dtype": "float32", "device": "cpu", "max_model_len": 96}
LIMIT_S = 20.0  # of a step; an error comes within it and what it takes to see it


@pytest.mark.exhaustive
def test_every_request_ends_with_its_tokens_or_with_the_cause(tmp_path: Path, pack_dir: Path) -> None:
    draw = random.Random(SEED)
    name, options = MOE["qwen3_moe"]
    save_tiny(tmp_path, name, **{**options, "num_experts": 6})
    load = {**LOAD, "pack_dir": str(pack_dir)}
    one = LLM(tmp_path, **load)
    prompts = [[draw.randrange(3, 97) for _ in range(draw.randint(1, 30))] for _ in range(40)]
    params = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, detokenize=False)
    outputs = one.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    wanted = [o.outputs[0].token_ids for o in outputs]
    told: Counter[str] = Counter()
    steps, longest_s = 0, 0.0

    async def ask(llm: AsyncLLM) -> None:
        nonlocal longest_s
        i, length = draw.randrange(len(prompts)), draw.randint(1, 60)
        began = time.monotonic()
        try:
            async for output in llm.generate({"prompt_token_ids": prompts[i]}, SamplingParams(
                temperature=0, max_tokens=length, ignore_eos=True, detokenize=False
            )):  # fmt: skip
                last = output
            assert last.outputs[0].token_ids == wanted[i][:length]
            told["answered"] += 1
        except EngineError as error:
            first = str(error).splitlines()[0]
            assert "engine " in first or "started again" in first, first
            told["failed"] += 1
        longest_s = max(longest_s, time.monotonic() - began)

    async def client(llm: AsyncLLM) -> None:
        while steps < STEPS:
            await ask(llm)
            if draw.random() < 0.05:  # so that waves end
                await asyncio.sleep(draw.random() * 0.3)

    async def disturb(llm: AsyncLLM) -> None:
        while steps < STEPS:
            await asyncio.sleep(draw.uniform(1, 8))
            if llm.engine.state != "ready":
                continue
            pid, kind = draw.choice(llm.engine.members).pid, draw.choice(["kill", "stop", "delay", "delay", "delay"])
            told[kind] += 1
            os.kill(pid, signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            if kind == "delay":
                await asyncio.sleep(draw.uniform(0.01, 0.3))
                os.kill(pid, signal.SIGCONT)

    async def work() -> None:
        nonlocal steps
        llm = AsyncLLM(tmp_path, data_parallel_size=RANKS, enable_expert_parallel=True, step_timeout_s=LIMIT_S, **load)
        seen: dict[int, int] = {}

        def count(rank: int, stats: object, deltas: object) -> None:
            nonlocal steps
            now = llm.engine.members[rank].stats.num_steps
            steps += max(0, now - seen.get(rank, 0)) if rank == 0 else 0
            seen[rank] = now

        llm.engine.watch = count
        await llm.ready()
        try:
            await asyncio.gather(disturb(llm), *(client(llm) for _ in range(6)))
            async with asyncio.timeout(60):
                while llm.engine.state != "ready":
                    await asyncio.sleep(0.1)
            steps = 0
            await ask(llm)
            assert llm.engine.num_requests == 0
        finally:
            told["restarts"] = llm.engine.num_restarts
            await llm.shutdown()

    began = time.monotonic()
    asyncio.run(work())
    print(f"seed {SEED}: {dict(told)}, longest request {longest_s:.1f} s, {time.monotonic() - began:.0f} s in all")
    assert told["answered"] > 300 and told["kill"] and told["stop"] and told["delay"]
    assert longest_s < LIMIT_S + 15
