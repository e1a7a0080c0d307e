"""vllm-router, in an environment of its own, routes to two of our servers.

It is skipped where SEAMWISE_TEST_ROUTER does not name the program: `pip install vllm-router==0.1.17` brings it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time

import pytest
from servers import fake_llm, get, post, run_app

PROGRAM = os.environ.get("SEAMWISE_TEST_ROUTER")


@pytest.mark.skipif(PROGRAM is None, reason="SEAMWISE_TEST_ROUTER names no vllm-router")
def test_both_servers_answer_through_the_router() -> None:
    assert PROGRAM is not None
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with run_app({"fake": fake_llm()}) as one, run_app({"fake": fake_llm()}) as other:
        command = [PROGRAM, "--worker-urls", one.url, other.url, "--port", str(port), "--policy", "round_robin"]
        router = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 90
            while True:
                with contextlib.suppress(OSError):
                    if get(f"{url}/v1/models")[0] == 200:
                        break
                assert time.monotonic() < deadline, "the router did not come up"
                time.sleep(0.2)
            for _ in range(4):
                status, answer = post(f"{url}/v1/completions", {"model": "fake", "prompt": "abc", "max_tokens": 6})
                assert status == 200 and answer["choices"][0]["text"] == "abcabc"
            chat = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
            assert post(f"{url}/v1/chat/completions", chat)[1]["choices"][0]["message"]["content"] == "<use"
            status, events = post(f"{url}/v1/completions", {"model": "fake", "prompt": "abc", "stream": True})
            assert status == 200 and events.rstrip().endswith("data: [DONE]")
            generate = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 3}}
            assert post(f"{url}/inference/v1/generate", generate)[1]["choices"][0]["token_ids"] == [1, 2, 1]
            for server in (one, other):
                assert "vllm:request_success_total{" in get(f"{server.url}/metrics")[1]
        finally:
            router.terminate()
            router.wait(60)
