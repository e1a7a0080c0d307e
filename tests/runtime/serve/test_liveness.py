"""A killed, stopped, raising or endless step: every stream gets an error in time, and the engine starts again."""

from __future__ import annotations

import concurrent.futures
import json
import time
from typing import Any

import pytest
from servers import Running, get, post, until

STREAM = {"prompt": "Z", "max_tokens": 100, "stream": True}


def events(url: str, body: dict[str, Any]) -> list[Any]:
    """Return a stream's events as JSON; a status other than 200 as one."""
    status, text = post(f"{url}/v1/completions", body)
    if status != 200:
        return [text]
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


@pytest.mark.parametrize(
    ("letter", "within_s", "message"),
    [
        ("K", 1.5, "was killed by SIGKILL while serving"),
        ("S", 1.5, "was stopped by a signal"),
        ("X", 1.5, "the fake engine raises, as told"),
        ("H", 3.0, "a step did not end within 1.5 s"),
    ],
)
def test_every_stream_gets_the_cause_and_the_next_request_is_served(
    fake: Running, letter: str, within_s: float, message: str
) -> None:
    fake.wait_ready()
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        running = [pool.submit(events, fake.url, STREAM) for _ in range(4)]
        until(lambda: fake.state.llm.engine.stats.num_running == 4)
        started = time.monotonic()
        fatal = pool.submit(events, fake.url, {"prompt": letter, "stream": True})
        ended = [f.result(60) for f in (*running, fatal)]
        elapsed_s = time.monotonic() - started
    for got in ended:
        assert message in got[-1]["error"]["message"] and got[-1]["error"]["code"] == 503, got[-1]
    assert elapsed_s < within_s + 5  # two of the slow steps come first, and the machine may be busy
    status, told = get(f"{fake.url}/health")
    assert status == 503 and message in told["reason"]
    fake.wait_ready()
    assert get(f"{fake.url}/health") == (200, {"status": "ok"})
    status, answer = post(f"{fake.url}/v1/completions", {"prompt": "abc", "max_tokens": 6})
    assert status == 200 and answer["choices"][0]["text"] == "abcabc"
    assert fake.state.num_in_work == 0 and fake.state.llm.engine.num_requests == 0


def test_a_request_while_the_engine_restarts_is_told_to_come_again(fake: Running) -> None:
    post(f"{fake.url}/v1/completions", {"prompt": "K"})
    status, answer = post(f"{fake.url}/v1/completions", {"prompt": "a"})
    assert status == 503 and "started again" in answer["error"]["message"]
    fake.wait_ready()
    assert "seamwise:engine_restarts{" in get(f"{fake.url}/metrics")[1]


def test_a_slow_step_within_the_deadline_is_no_hang(fake: Running) -> None:
    fake.wait_ready()
    restarts = fake.state.llm.engine.num_restarts
    assert post(f"{fake.url}/v1/completions", {"prompt": "Z", "max_tokens": 10})[0] == 200
    assert fake.state.llm.engine.num_restarts == restarts
