"""Engines that share out experts take steps together: they give what one gives, and end and start again together."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from moe_families import MOE
from tiny_models import save_tiny

from seamwise import LLM, SamplingParams
from seamwise.runtime.serve.async_llm import AsyncLLM
from seamwise.runtime.serve.process.streams import CallFailed, EngineError

LOAD: dict[str, Any] = {"dtype": "float32", "device": "cpu", "max_model_len": 96, "seed": 3}
PROMPTS = [[3 + i, 5, 7 * (i % 3)] for i in range(7)]
PARAMS = [SamplingParams(temperature=i % 2, max_tokens=6 + i, ignore_eos=True, detokenize=False) for i in range(7)]


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, options = MOE["qwen3_moe"]
    folder = tmp_path_factory.mktemp("moe")
    save_tiny(folder, name, **options)
    return folder


async def ask(llm: AsyncLLM, i: int, **changes: Any) -> list[int]:
    params = SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, "detokenize": False, **changes})
    async for output in llm.generate({"prompt_token_ids": PROMPTS[i % 7]}, params):
        last = output
    return last.outputs[0].token_ids


def test_engines_that_share_out_experts_give_what_one_gives_and_end_together(moe: Path, pack_dir: Path) -> None:
    load = {**LOAD, "pack_dir": str(pack_dir)}
    one = LLM(moe, **load)
    wanted = [o.outputs[0].token_ids for o in one.generate([{"prompt_token_ids": p} for p in PROMPTS], PARAMS)]
    eight = [one.generate([{"prompt_token_ids": p}], PARAMS[2])[0].outputs[0].token_ids for p in PROMPTS]

    async def work() -> None:
        llm = AsyncLLM(moe, data_parallel_size=2, enable_expert_parallel=True, step_timeout_s=90, **load)
        try:
            await llm.ready()
            members = llm.engine.members
            streams = []
            for i, (prompt, params) in enumerate(zip(PROMPTS, PARAMS, strict=True)):
                streams.append(llm.submit(str(i), prompt, params))
            got = [[t for d in await all_of(s) for t in d.token_ids] for s in streams]
            assert got == wanted and {s.rank for s in streams} == {0, 1}
            for i in range(7):  # each begins a wave, in which one engine has no work
                assert await ask(llm, i) == eight[i]
            running = asyncio.create_task(ask(llm, 0, max_tokens=60))
            while not llm.engine.num_requests:  # it is sent before what is called next
                await asyncio.sleep(0)
            with pytest.raises(CallFailed, match="1 requests are running"):
                await llm.sleep()
            await running
            await llm.sleep()
            await llm.wake_up()
            assert await ask(llm, 1) == eight[1]
            with pytest.raises(ValueError, match="share out experts"):
                await llm.scale_elastic_ep(4)

            async with asyncio.timeout(60):
                while llm.engine.group._front.running:
                    await asyncio.sleep(0.01)
            os.kill(members[1].pid, signal.SIGKILL)  # behind the wave's end: the other waits for no step, and is ended
            async with asyncio.timeout(60):
                while not all(m.num_restarts for m in members):
                    await asyncio.sleep(0.02)
            await wait_for_state(llm, "ready")
            for fault in (signal.SIGKILL, signal.SIGSTOP):
                old = [m.pid for m in members]
                asked = [asyncio.create_task(ask(llm, i, max_tokens=80)) for i in range(4)]
                while llm.engine.num_requests < 4:
                    await asyncio.sleep(0)
                os.kill(old[1], fault)
                started = time.monotonic()
                for error in await asyncio.gather(*asked, return_exceptions=True):
                    assert isinstance(error, EngineError), error
                    assert "engine 1: the engine process was " in str(error).splitlines()[0], error
                assert time.monotonic() - started < 60  # a step's limit is not waited for
                await wait_for_state(llm, "ready")
                assert not {m.pid for m in members} & {*old} and members[0].num_restarts > 0
                assert await asyncio.gather(*(ask(llm, i) for i in range(7))) == eight
        finally:
            await llm.shutdown()

    asyncio.run(work())


async def all_of(stream: Any) -> list[Any]:
    found = []
    while deltas := await stream.take():
        found += deltas
    return found


async def wait_for_state(llm: AsyncLLM, state: str) -> None:
    async with asyncio.timeout(60):
        while llm.engine.state != state:
            await asyncio.sleep(0.05)


_PARENT = """
import sys
from seamwise import LLM
llm = LLM(sys.argv[1], data_parallel_size=2, enable_expert_parallel=True, dtype="float32", device="cpu",
          max_model_len=96, pack_dir=sys.argv[2])
print(*(m.pid for m in llm.engine._llm.engine.members), llm.engine._llm.engine.group._folder, flush=True)
sys.stdin.read()
"""


def test_a_parent_that_is_killed_leaves_no_process_and_no_folder(moe: Path, pack_dir: Path) -> None:
    command = [sys.executable, "-P", "-c", _PARENT, str(moe), str(pack_dir)]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    *pids, folder = parent.stdout.readline().split()
    assert len(pids) == 2 and Path(folder).exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids) or Path(folder).exists():
        assert time.monotonic() < deadline, [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        time.sleep(0.05)
