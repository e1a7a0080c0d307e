"""Many streams at once on the demo model: no token is lost, doubled or other than offline; memory is given back."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from servers import Running, get, post

from seamwise.bench.streams import run_streams, stream

NUM_STREAMS, NUM_TOKENS = 64, 24


def test_what_is_lost_or_other_is_counted(fake: Running) -> None:
    fake.wait_ready()
    prompts = [[1, 2, 3], [4, 5]]
    right = [[1, 2, 3, 1], [4, 5, 4, 5]]  # the fake engine's answers
    other = [[1, 2, 3, 1], [4, 5, 4, 4]]
    for wanted, wrong in ((right, False), (other, True)):
        seen, _ = asyncio.run(run_streams(fake.url, prompts, wanted, 4, 0.3, os.getpid()))
        assert bool(seen.wrong) == wrong and seen.answers >= 4 and seen.tokens == 4 * seen.answers
        assert not wrong or "prompt 1: [4, 5, 4, 5] instead of [4, 5, 4, 4]" in seen.wrong[0]
        assert seen.memory_mib[0] > 10


def test_a_request_that_is_refused_is_an_error(fake: Running) -> None:
    fake.wait_ready()
    with pytest.raises(RuntimeError, match=r"(?s)status 400: .*max_tokens: got -1"):
        asyncio.run(stream(fake.url, [1, 2], -1))


@pytest.mark.slow
def test_64_streams_give_the_ids_that_each_alone_gives(server: str, demo_model: Path) -> None:
    texts = [f"{i} plus {i + 1} is" for i in range(NUM_STREAMS)]
    prompts = [post(f"{server}/tokenize", {"prompt": text})[1]["tokens"] for text in texts]

    async def everything() -> list[list[int]]:
        return [ids for ids, _ in await asyncio.gather(*(stream(server, ids, NUM_TOKENS) for ids in prompts))]

    together = asyncio.run(everything())
    assert all(len(ids) == NUM_TOKENS for ids in together)
    for i in range(0, NUM_STREAMS, 16):  # a step's rows do not depend on each other: alone is the reference
        params = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        alone = post(f"{server}/inference/v1/generate", {"token_ids": prompts[i], "sampling_params": params})[1]
        assert together[i] == alone["choices"][0]["token_ids"]
    load = get(f"{server}/load")[1]
    assert load["server_load"] == load["num_requests_running"] == load["num_requests_waiting"] == 0
    assert load["kv_cache_usage"] == 0
