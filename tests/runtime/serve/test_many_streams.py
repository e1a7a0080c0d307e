"""Many streams at once on the demo model: no token is lost, doubled or other than offline; memory is given back."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from servers import get, post

NUM_STREAMS, NUM_TOKENS = 64, 24


async def stream(url: str, ids: list[int], started: asyncio.Event) -> list[int]:
    """Return the ids that a stream of /inference/v1/generate gives."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=1 << 20)
    params = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    body = json.dumps({"token_ids": ids, "sampling_params": params, "stream": True}).encode()
    head = "POST /inference/v1/generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    await started.wait()
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    found: list[int] = []
    async for line in reader:
        if line.startswith(b"data: {"):
            found += json.loads(line[6:])["choices"][0]["token_ids"]
    writer.close()
    return found


@pytest.mark.slow
def test_64_streams_give_the_ids_that_each_alone_gives(server: str, demo_model: Path) -> None:
    texts = [f"{i} plus {i + 1} is" for i in range(NUM_STREAMS)]
    prompts = [post(f"{server}/tokenize", {"prompt": text})[1]["tokens"] for text in texts]

    async def everything() -> list[list[int]]:
        started = asyncio.Event()
        tasks = [asyncio.create_task(stream(server, ids, started)) for ids in prompts]
        await asyncio.sleep(0.1)
        started.set()
        return list(await asyncio.gather(*tasks))

    together = asyncio.run(everything())
    assert all(len(ids) == NUM_TOKENS for ids in together)
    for i in range(0, NUM_STREAMS, 16):  # a step's rows do not depend on each other: alone is the reference
        params = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
        alone = post(f"{server}/inference/v1/generate", {"token_ids": prompts[i], "sampling_params": params})[1]
        assert together[i] == alone["choices"][0]["token_ids"]
    load = get(f"{server}/load")[1]
    assert load["server_load"] == load["num_requests_running"] == load["num_requests_waiting"] == 0
    assert load["kv_cache_usage"] == 0
