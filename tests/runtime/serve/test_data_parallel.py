"""Several engines behind one front end give what one gives, and a fault, or a change of their number, costs its own."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import Running, fake_llm, get, post, run_app

from seamwise import LLM, SamplingParams
from seamwise.runtime.engine.executor import starts_engines
from seamwise.runtime.serve.async_llm import AsyncLLM
from seamwise.runtime.serve.process.messages import Add, Stats
from seamwise.runtime.serve.process.streams import CallFailed, EngineError

LONG = SamplingParams(max_tokens=40)


@pytest.fixture(scope="module")
def two() -> Iterator[Running]:
    """A server over two fake engines."""
    with run_app({"fake": fake_llm(data_parallel_size=2)}, enable_control=True) as running:
        yield running


async def text_of(llm: AsyncLLM, prompt: str, params: SamplingParams = LONG, name: str | None = None) -> str:
    async for output in llm.generate(prompt, params, name):
        last = output
    assert last.finished
    return last.outputs[0].text


def with_engines(count: int, work: Any, **options: Any) -> Any:
    async def go() -> Any:
        llm = fake_llm(data_parallel_size=count, **options)
        try:
            await llm.ready()
            return await work(llm)
        finally:
            await llm.shutdown()

    return asyncio.run(go())


def over(running: Running, work: Callable[[AsyncLLM], Coroutine[Any, Any, Any]]) -> Any:
    """Run `work` beside the server, whose engines it leaves as they were."""
    return asyncio.run_coroutine_threadsafe(work(running.state.llm), running.loop).result(120)


async def sent(llm: AsyncLLM, count: int) -> None:
    """Wait until so many requests are on their way: what is called next comes behind them."""
    while llm.engine.num_requests < count:
        await asyncio.sleep(0)


def test_requests_go_to_the_shortest_queue_and_stay_there(two: Running) -> None:
    async def work(llm: AsyncLLM) -> None:
        engines = llm.engine.members
        streams = [llm.submit(str(i), [0, 1], LONG) for i in range(6)]
        assert Counter(s.rank for s in streams) == {0: 3, 1: 3}
        with pytest.raises(ValueError, match="request id '3' is in use"):
            llm.submit("3", [0], LONG)
        engines[0].stats = Stats(num_waiting=1)  # counts as four: three more may run at the other first
        more = [llm.submit(f"more{i}", [0, 1], LONG).rank for i in range(4)]
        assert more == [1, 1, 1, 0]
        llm.engine.abort()
        await llm.wait_for_requests_to_drain(60)

    over(two, work)


def test_the_engines_seeds_are_those_of_one() -> None:
    async def work(llm: AsyncLLM) -> list[Any]:
        added = []
        for member in llm.engine.members:
            add = member.add
            member.add = lambda request, add=add: (added.append(request), add(request))[1]  # type: ignore[method-assign]
        for name, n in (("a", 1), ("b", 3), ("c", 1)):
            llm.engine.add(Add(name, [0], {"n": n, "max_tokens": 2}))
        llm.engine.add(Add("d", [0], {"seed": 7, "max_tokens": 2}))
        return [request.params["seed"] for request in added]

    assert with_engines(2, work, seed=3) == [(3 << 32) + 0, (3 << 32) + 1, (3 << 32) + 4, 7]


def test_what_changes_an_engine_reaches_all_and_none_where_one_cannot(two: Running) -> None:
    async def work(llm: AsyncLLM) -> None:
        assert (
            await llm.collective_rpc("weight_state", args=(1,)) == [["weight_state", [1], {}]] * 2
            and llm.world_size == 2
        )
        slow = asyncio.create_task(text_of(llm, "Z", SamplingParams(max_tokens=5)))
        await sent(llm, 1)
        with pytest.raises(CallFailed, match="1 requests are running"):
            await llm.sleep()
        assert not await llm.is_sleeping()
        await slow
        await llm.sleep()
        for member in llm.engine.members:
            assert await member.call("is_sleeping")
        with pytest.raises(EngineError, match="the model sleeps"):
            await text_of(llm, "ab")
        with pytest.raises(CallFailed, match="paused or asleep"):
            await llm.scale_elastic_ep(3)
        await llm.wake_up()
        await llm.pause_generation(mode="keep")
        waits = [asyncio.create_task(text_of(llm, "ab", SamplingParams(max_tokens=4))) for _ in range(4)]
        await asyncio.sleep(0.3)
        assert await llm.is_paused() and not any(task.done() for task in waits)
        await llm.resume_generation()
        assert await asyncio.gather(*waits) == ["abab"] * 4
        running = [asyncio.create_task(text_of(llm, "Z", LONG)) for _ in range(2)]
        await sent(llm, 2)
        assert await llm.reset_prefix_cache(reset_running_requests=True)
        await asyncio.gather(*running)
        assert llm.engine.num_requests == 0

    over(two, work)


@pytest.mark.parametrize(("letter", "message"), [("K", "killed by SIGKILL"), ("H", "a step did not end within 1.5 s")])
def test_an_engine_that_ends_is_an_error_to_its_own_requests_alone(letter: str, message: str) -> None:
    async def work(llm: AsyncLLM) -> None:
        slow = [
            llm.submit(str(i), [51], SamplingParams(max_tokens=15)) for i in range(4)
        ]  # Z, a fifth of a second each
        started = time.monotonic()
        fatal = llm.submit("fatal", [36 if letter == "K" else 33], LONG)
        ends = await asyncio.gather(*(_end_of(s) for s in (*slow, fatal)))
        took_s = time.monotonic() - started
        for stream, (error, tokens) in zip((*slow, fatal), ends, strict=True):
            assert (message in error) == (stream.rank == fatal.rank), (stream.rank, error)
            assert error or tokens == 15
        assert took_s < 30 and llm.engine.state == "ready" and llm.engine.num_restarts == 1
        while llm.engine.members[fatal.rank].state != "ready":  # it is started again and takes requests
            assert (await asyncio.gather(text_of(llm, "ab", SamplingParams(max_tokens=4)))) == ["abab"]
            await asyncio.sleep(0.1)
        ranks = {llm.submit(f"after{i}", [0], SamplingParams(max_tokens=2)).rank for i in range(4)}
        assert ranks == {0, 1}
        await llm.wait_for_requests_to_drain(60)

    with_engines(2, work)


async def _end_of(stream: Any) -> tuple[str, int]:
    tokens = 0
    try:
        while deltas := await stream.take():
            tokens += sum(len(d.token_ids) for d in deltas)
    except EngineError as error:
        return str(error).splitlines()[0], tokens
    return "", tokens


def test_an_engine_whose_weights_were_changed_is_not_started_with_the_old_ones() -> None:
    async def work(llm: AsyncLLM) -> None:
        await llm.collective_rpc("load_weights")
        with pytest.raises(CallFailed, match="weights may have been changed"):
            await llm.scale_elastic_ep(3)
        os.kill(llm.engine.members[1].pid, signal.SIGKILL)
        while llm.engine.members[1].state != "failed":
            await asyncio.sleep(0.02)
        assert llm.engine.state == "ready" and llm.engine.failure is None
        assert await text_of(llm, "ab", SamplingParams(max_tokens=4)) == "abab"
        with pytest.raises(EngineError, match=r"engine 1: .*SIGKILL.*not started again: weights may have been changed"):
            await llm.sleep()
        os.kill(llm.engine.members[0].pid, signal.SIGKILL)
        while llm.engine.failure is None:
            await asyncio.sleep(0.02)
        with pytest.raises(EngineError, match="not started again"):
            await text_of(llm, "ab")

    with_engines(2, work)


def test_one_engine_whose_weights_were_changed_is_not_started_with_the_old_ones() -> None:
    async def work(llm: AsyncLLM) -> None:
        with pytest.raises(ValueError, match="has no checkpoint"):  # the weights are what they were
            await llm.engine.call("update_weights_from_path", "here")
        os.kill(llm.engine.members[0].pid, signal.SIGKILL)
        while llm.engine.num_restarts == 0 or llm.engine.state != "ready":
            await asyncio.sleep(0.02)
        await llm.collective_rpc("load_weights")
        os.kill(llm.engine.members[0].pid, signal.SIGKILL)
        while llm.engine.failure is None:
            await asyncio.sleep(0.02)
        assert llm.engine.state == "failed" and llm.engine.num_restarts == 1
        with pytest.raises(EngineError, match="not started again: weights may have been changed"):
            await text_of(llm, "ab")

    with_engines(1, work)


def test_engines_join_and_leave_while_requests_run_and_none_fails() -> None:
    async def work(llm: AsyncLLM) -> None:
        texts: list[str] = []
        sizes = {len(llm.engine.members)}

        async def ask(number: int) -> None:
            for _ in range(8):
                texts.append(await text_of(llm, "aZ", SamplingParams(max_tokens=6)))

        asking = [asyncio.create_task(ask(i)) for i in range(12)]
        await asyncio.sleep(0.3)
        growing = asyncio.create_task(llm.scale_elastic_ep(4))
        await asyncio.sleep(0)
        with pytest.raises(CallFailed, match="join or leave already"):
            await llm.scale_elastic_ep(3)
        with pytest.raises(CallFailed, match="join or leave now"):
            await llm.pause_generation()
        await growing
        sizes.add(len(llm.engine.members))
        ranks = {llm.submit(f"r{i}", [51], SamplingParams(max_tokens=8)).rank for i in range(16)}
        assert ranks == {0, 1, 2, 3}
        left = [m.pid for m in llm.engine.members[2:]]
        await llm.scale_elastic_ep(2)
        sizes.add(len(llm.engine.members))
        assert sizes == {2, 4} and not any(Path(f"/proc/{pid}").exists() for pid in left)
        await asyncio.gather(*asking)
        assert texts == ["aZaZaZ"] * 96 and not llm.engine.num_restarts
        with pytest.raises(ValueError, match="data_parallel_size=0: wanted a whole number"):
            await llm.scale_elastic_ep(0)
        llm.submit("long", [51], LONG)
        llm.submit("long2", [51], LONG)
        with pytest.raises(TimeoutError):
            await llm.scale_elastic_ep(1, 0.1)
        assert len(llm.engine.members) == 2 and not llm.engine.leaving

    with_engines(2, work, max_num_seqs=64)


def test_an_engine_that_cannot_join_changes_nothing() -> None:
    async def work(llm: AsyncLLM) -> None:
        llm.engine._options["fail"] = "machine"
        with pytest.raises(EngineError, match="the disk is on fire"):
            await llm.scale_elastic_ep(2)
        assert len(llm.engine.members) == 1 and await text_of(llm, "ab", SamplingParams(max_tokens=2)) == "ab"

    with_engines(1, work)


def test_the_server_tells_engines_apart(two: Running) -> None:
    with_stream = [post(f"{two.url}/v1/completions", {"prompt": "abc", "max_tokens": 4})[0] for _ in range(2)]
    assert with_stream == [200, 200] and get(f"{two.url}/health")[0] == 200
    text = get(f"{two.url}/metrics")[1]
    for engine in "01":
        assert f'vllm:num_requests_running{{engine="{engine}",model_name="fake"}}' in text or (
            f'vllm:num_requests_running{{model_name="fake",engine="{engine}"}}' in text
        )
        assert f'vllm:generation_tokens_total{{engine="{engine}",model_name="fake"}}' in text
    assert text.count("# TYPE vllm:num_requests_running gauge") == 1
    assert get(f"{two.url}/get_world_size")[1] == {"world_size": 2}
    status, told = post(f"{two.url}/scale_elastic_ep", {"new_data_parallel_size": 1})
    assert status == 200 and "1 data parallel engines" in told["message"], told
    assert get(f"{two.url}/get_world_size")[1] == {"world_size": 1}
    assert post(f"{two.url}/scale_elastic_ep", {"new_data_parallel_size": 0})[0] == 400
    assert post(f"{two.url}/scale_elastic_ep", {"new_data_parallel_size": 2})[0] == 200


@pytest.mark.parametrize(
    ("size", "rank", "experts", "message"),
    [
        (0, None, False, "data_parallel_size=0: wanted"), (True, None, False, "data_parallel_size=True"),
        (2, 2, False, "data_parallel_rank=2: wanted 0 to"),
    ],
)  # fmt: skip
def test_sizes_and_ranks_that_are_none_are_refused(size: int, rank: int | None, experts: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        starts_engines(size, rank, experts)
    assert starts_engines(1, None, True) == "one" and starts_engines(2, None, False) == "start"


def test_llm_with_two_engines_gives_what_one_gives(tiny_llama_dir: Path, pack_dir: Path, tmp_path: Path) -> None:
    prompts = [{"prompt_token_ids": [3 + i, 5, 7 * (i % 3)]} for i in range(9)]
    params = [
        SamplingParams(
            temperature=i % 3 / 2, max_tokens=8, n=1 + (i == 4), ignore_eos=True, detokenize=False, logprobs=1
        )
        for i in range(9)
    ]
    load = {"dtype": "float32", "device": "cpu", "pack_dir": str(pack_dir), "max_model_len": 64, "seed": 5}
    one = LLM(tiny_llama_dir, **load)
    two = LLM(tiny_llama_dir, data_parallel_size=2, profiler_config={"torch_profiler_dir": str(tmp_path)}, **load)
    try:
        two.start_profile("first")
        for _ in range(2):
            got, wanted = two.generate(prompts, params, use_tqdm=False), one.generate(prompts, params, use_tqdm=False)
            for g, w in zip(got, wanted, strict=True):
                assert [c.token_ids for c in g.outputs] == [c.token_ids for c in w.outputs]
                assert [c.finish_reason for c in g.outputs] == [c.finish_reason for c in w.outputs]
                assert g.outputs[0].logprobs is not None and len(g.outputs[0].logprobs) == 8
            if not any(tmp_path.iterdir()):
                two.stop_profile()
            assert sorted(f.name.partition(".")[0] for f in tmp_path.iterdir()) == [
                "first_dp0_rank0",
                "first_dp1_rank0",
            ]
        with pytest.raises(RuntimeError, match="stop_profile: no profile is being taken"):
            two.stop_profile()
        with pytest.raises(ValueError, match="prompt 1: the prompt has no tokens"):
            two.generate([prompts[0], {"prompt_token_ids": []}], params[0])
        weights = {"model.norm.weight": torch.full((one.engine.runner.config.raw["hidden_size"],), 0.5)}
        for llm in (one, two):
            llm.update_weights(weights)
        assert two.collective_rpc("weights_digest") == [one.weights_digest()] * 2
        assert two.weight_version == one.weight_version == "1"
        again = [
            [o.outputs[0].token_ids for o in llm.generate(prompts, params[0], use_tqdm=False)] for llm in (one, two)
        ]
        assert again[0] == again[1]
        two.sleep()
        assert two.is_sleeping()
        two.wake_up()
        two.reset_prefix_cache()
        pids = [m.pid for m in two.engine._llm.engine.members]
        os.kill(pids[0], signal.SIGKILL)
        with pytest.raises(RuntimeError, match="SIGKILL"):
            for _ in range(100):
                two.generate(prompts, params[0], use_tqdm=False)
                two.sleep()
                two.wake_up()
    finally:
        two.engine.shutdown()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
