"""`AsyncLLM` over the fake engine: outputs grow, leaving aborts, calls reach the engine, errors have their kinds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from servers import fake_llm

from seamwise.runtime.engine.lora_request import LoRARequest
from seamwise.runtime.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from seamwise.runtime.sampling.logprob import Logprob
from seamwise.runtime.sampling.params import RequestOutputKind, SamplingParams
from seamwise.runtime.serve.async_llm import AsyncLLM
from seamwise.runtime.serve.process.deltas import Deltas
from seamwise.runtime.serve.process.messages import Delta
from seamwise.runtime.serve.process.streams import EngineError, Stream, Unsupported, merged


def with_llm(work: Callable[[AsyncLLM], Awaitable[Any]]) -> Any:
    async def go() -> Any:
        llm = fake_llm()
        try:
            return await work(llm)
        finally:
            await llm.shutdown()

    return asyncio.run(go())


def test_outputs_grow_and_end() -> None:
    async def work(llm: AsyncLLM) -> None:
        params = SamplingParams(max_tokens=5, n=2, logprobs=0)
        seen = [len(o.outputs[1].token_ids) async for o in llm.generate("abc", params, "one")]
        assert seen == sorted(seen) and seen[-1] == 5
        async for output in llm.generate({"prompt_token_ids": [3, 4]}, params):
            last = output
        assert last.finished and [c.text for c in last.outputs] == ["deded"] * 2
        assert last.outputs[0].logprobs is not None and len(last.outputs[0].logprobs) == 5
        assert last.outputs[0].cumulative_logprob == -2.5
        assert last.metrics.first_token_time is not None and last.metrics.finished_time is not None

    with_llm(work)


def test_leaving_the_loop_aborts_and_ids_are_refused_twice() -> None:
    async def work(llm: AsyncLLM) -> None:
        slow = SamplingParams(max_tokens=50)
        first = llm.generate("Z", slow, "same")
        await anext(first)
        with pytest.raises(ValueError, match="request id 'same' is in use"):
            await anext(llm.generate("Z", slow, "same"))
        await first.aclose()
        await llm.wait_for_requests_to_drain(60)
        while llm.engine.stats.num_running:
            await asyncio.sleep(0.02)
        second = llm.generate("Z", slow, "same")
        await anext(second)
        await llm.abort("same")
        reasons = [o.outputs[0].finish_reason async for o in second]
        assert reasons[-1] == "abort"

    with_llm(work)


def test_calls_and_refusals() -> None:
    async def work(llm: AsyncLLM) -> None:
        await llm.ready()
        assert await llm.collective_rpc("m", args=(1,), kwargs={"a": 2}) == [["m", [1], {"a": 2}]]
        assert await llm.reset_prefix_cache() and not await llm.is_paused()
        await llm.pause_generation(mode="keep")
        assert await llm.is_paused()
        await llm.resume_generation()
        await llm.check_health()
        assert llm.is_running and not llm.errored and llm.world_size == 1
        with pytest.raises(Unsupported, match="this engine has no"):
            await llm.start_profile()
        with pytest.raises(ValueError, match="has no embeddings"):
            await anext(llm.encode("abc"))
        for call in (llm.list_loras(), llm.add_lora(LoRARequest("x", 1, "directory")), llm.remove_lora(1)):
            with pytest.raises(ValueError, match="no adapters here"):
                await call
        with pytest.raises(ValueError, match="no prompt of 13 tokens"):
            await anext(llm.generate("a" * 13))
        with pytest.raises(ValueError, match="outputs grow here"):
            await anext(llm.generate("a", SamplingParams(output_kind=RequestOutputKind.DELTA)))
        with pytest.raises(ValueError, match="functions are not sent"):
            await anext(llm.generate("a", SamplingParams(logits_processors=[max])))
        await llm.shutdown()
        with pytest.raises(EngineError, match="shutting down"):
            await llm.check_health()

    with_llm(work)


def test_options_that_are_no_plain_data_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pipeline=<object .*another process cannot be given it"):
        AsyncLLM("x", pipeline=object())


def test_a_stream_merges_what_is_not_taken() -> None:
    def delta(text: str, finished: bool = False) -> Delta:
        row = [{1: Logprob(-0.1, 1, text)}]
        return Delta("r", 0, text, [1], row, "stop" if finished else None, request_finished=finished)

    async def go() -> None:
        stream = Stream("r")
        for text in "abc":
            stream.put(delta(text))
        (one,) = await stream.take()
        assert one.text == "abc" and one.token_ids == [1, 1, 1] and one.logprobs is not None and len(one.logprobs) == 3
        stream.put(delta("d"))
        stream.fail(EngineError("gone"))
        assert (await stream.take())[0].text == "d"
        with pytest.raises(EngineError, match="gone"):
            await stream.take()
        whole = merged(delta("a"), delta("b", finished=True))
        assert whole.request_finished and whole.finish_reason == "stop"
        end = delta("b", finished=True)
        end.vector = b"1234"
        assert merged(delta("a"), end).vector == b"1234"

    asyncio.run(go())


def test_an_end_is_sent_once_though_the_engine_repeats_it() -> None:
    def output(second: str | None) -> RequestOutput:
        outputs = [
            CompletionOutput(index=0, text="", token_ids=[], finish_reason="stop"),
            CompletionOutput(index=1, text="a", token_ids=[1], finish_reason=second),
        ]
        metrics = RequestMetrics(arrival_time=0.0)
        return RequestOutput(
            request_id="r", prompt=None, prompt_token_ids=[1], outputs=outputs, finished=second is not None,
            metrics=metrics,
        )  # fmt: skip

    deltas = Deltas()
    deltas.follow("r")
    assert [d.index for d in deltas.of(output(None))] == [0, 1]
    (last,) = deltas.of(output("length"))
    assert last.index == 1 and last.request_finished and deltas.unfinished == []


def test_neither_the_http_process_nor_the_loop_of_any_engine_imports_torch() -> None:
    """Where an engine needs it, its factory has imported it."""
    code = (
        "import sys, seamwise.runtime.serve.http.run, seamwise.runtime.serve.http.app, seamwise.runtime.serve.cli;"
        "import seamwise.runtime.serve.commands.serve, seamwise.runtime.serve.batch_file;"
        "import seamwise.runtime.serve.process.main, seamwise.runtime.serve.process.engine_loop;"
        "print([m for m in ('torch', 'transformers', 'triton') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


DRAIN = """
import asyncio, sys
sys.path.insert(0, {here!r})
from servers import fake_llm
from seamwise.runtime.serve.http.run import serve
from seamwise.runtime.serve.http.serving import Serving
from seamwise.runtime.serve.http.settings import ServeSettings
settings = ServeSettings(port=0, shutdown_timeout_s={timeout})
state = Serving({{"fake": fake_llm()}}, settings)
sys.exit(serve(state, ready=lambda address: print(address, flush=True)))
"""


@pytest.mark.parametrize(("timeout_s", "finishes"), [(60.0, True), (0.5, False)])
def test_sigterm_lets_requests_finish_within_the_deadline(timeout_s: float, finishes: bool) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from servers import get, post, until

    code = DRAIN.format(here=str(Path(__file__).parent), timeout=timeout_s)
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        with ThreadPoolExecutor(2) as pool:
            running = pool.submit(post, f"{address}/v1/completions", {"prompt": "Z", "max_tokens": 20})
            until(lambda: get(f"{address}/load")[1]["num_requests_running"] == 1)
            process.terminate()

            def refused() -> bool:
                status, late = post(f"{address}/v1/completions", {"prompt": "a", "max_tokens": 1})
                return status == 503 and "shutting down" in late["error"]["message"]

            until(refused)
            status, answer = running.result(60)
        if finishes:
            assert status == 200 and answer["choices"][0]["text"] == "Z" * 20
        else:
            assert status == 503 and "shutting down" in answer["error"]["message"]
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_a_request_to_an_engine_that_has_just_died_gets_the_cause() -> None:
    """Nobody has said so yet, and no send may wait for a process that is gone: the front end would stand still."""

    async def work(llm: AsyncLLM) -> None:
        await llm.ready()
        os.kill(llm.engine.members[0].pid, signal.SIGKILL)
        time.sleep(0.3)  # the event loop hears nothing meanwhile, zmq's own thread does
        stream = llm.submit("late", [3, 4], SamplingParams(max_tokens=5))
        with pytest.raises(EngineError, match="was killed by SIGKILL"):
            async with asyncio.timeout(60):
                while await stream.take():
                    pass

    ended: Future[None] = Future()

    def run() -> None:
        try:
            ended.set_result(with_llm(work))
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=run, daemon=True).start()  # a front end that stands still ends nothing but the wait
    ended.result(120)


def test_one_is_made_and_its_end_is_told_by_vllms_names() -> None:
    given = {"model": "fake", "engine_factory": "fake_llm:make", "max_num_seqs": 2}
    llm = AsyncLLM.from_engine_args(given, max_num_seqs=3)
    assert llm.engine.members[0].options["max_num_seqs"] == 3
    assert isinstance(llm.dead_error, EngineError) and str(llm.dead_error) == llm.engine.reason != ""
