"""Clients that mean harm, or crash at every point: nothing is lost, and the server is where it was.

A few hundred requests here; `python tests/runtime/serve/test_hostile.py 2000` sends as many as it is told.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import time
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance
from servers import Running, fake_llm, get, post, run_app

PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize",
    "/inference/v1/generate", "/v1/chat/completions/render", "/abort_requests", "/nowhere", "/v1/models/%00",
)  # fmt: skip
GOOD: dict[str, Any] = {"prompt": "abcZ", "max_tokens": 30, "stream": True, "n": 2, "logprobs": 1}


def hostile(draw: random.Random) -> tuple[bytes, float]:
    """Return the bytes of a request and how much of it is sent before the client leaves; 1: it stays."""
    kind = draw.randrange(12)
    body: bytes = json.dumps(GOOD).encode()
    head: dict[str, str] = {"Content-Type": "application/json"}
    cut = 1.0
    if kind == 0:
        body = bytes(draw.randrange(256) for _ in range(draw.randrange(200)))
    elif kind == 1:
        body = body[: draw.randrange(len(body))]
    elif kind == 2:
        depth = draw.choice([10, 1000, 30_000])
        body = b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"
    elif kind == 3:
        value = draw.choice(
            ["1e999", "-1e999", "9" * 5000, "NaN", '"' + "x" * 5000 + '"', "true", "{}", "-0.0", "null"]
        )
        name = draw.choice(
            ["max_tokens", "temperature", "n", "seed", "top_k", "logprobs", "stop", "logit_bias", "model"]
        )
        body = f'{{"prompt": "a", "{name}": {value}}}'.encode()
    elif kind == 4:
        body = b'{"prompt": "' + draw.choice([b"\xff\xfe", b"\\ud83d", b"\\u0000", b"\xed\xa0\x80"]) + b'"}'
    elif kind == 5:
        head["Content-Length"] = draw.choice(["-1", "x", "999999999999", "1" * 400, "+5", ""])
    elif kind == 6:
        head = {
            "Content-Type": draw.choice(["text/plain", "application/json; charset=utf-16", "x", "multipart/form-data"])
        }
    elif kind == 7:
        cut = draw.random()
    elif kind == 8:
        head["Transfer-Encoding"] = "chunked"
        body = draw.choice([b"zz\r\n", b"5\r\nabc", b"FFFFFFFFF\r\n", b"0\r\n\r\n", b"186a1\r\n" + b"a" * 100_001])
    elif kind == 9:
        name = draw.choice(["X-Request-Id", "traceparent", "Authorization", "Host", "Expect"])
        head[name] = draw.choice(["\x7f" * 300, "%0d%0aX: y", "x" * 9000, "00-zz", ""])
    elif kind == 10:
        cut = -draw.random()  # it sends all, reads a little, and leaves
    path, method = draw.choice(PATHS), draw.choice(["POST"] * 8 + ["GET", "DELETE", "PATCH", "\x01"])
    lines = [f"{method} {path} HTTP/1.1", "Host: x", *(f"{name}: {value}" for name, value in head.items())]
    if "Content-Length" not in head and "Transfer-Encoding" not in head:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode("latin1") + b"\r\n\r\n" + body, cut


def send(running: Running, data: bytes, cut: float) -> int:
    """Send a hostile request; return the status of its answer, 0 without one."""
    host, _, port = running.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as one:
        one.settimeout(0.3)
        try:
            one.sendall(data[: max(1, int(len(data) * cut))] if 0 < cut < 1 else data)
            if 0 < cut < 1:
                return 0
            got = one.recv(4096)
        except OSError:  # it waits for more of the body, or has closed already
            return 0
        return int(got.split(b" ")[1]) if got.startswith(b"HTTP/1.1 ") else 0


def attack(running: Running, count: int, seed: int) -> dict[int, int]:
    """Send so many hostile requests; return how often each status came. Good ones between them must be served."""
    draw, statuses = random.Random(seed), dict[int, int]()
    for i in range(count):
        data, cut = hostile(draw)
        status = send(running, data, cut)
        statuses[status] = statuses.get(status, 0) + 1
        assert status < 500 or status in (501, 503), (status, data[:300])
        if i % 50 == 0:
            answer = post(f"{running.url}/v1/completions", {"prompt": "abc", "max_tokens": 4})
            assert answer[0] == 200 and answer[1]["choices"][0]["text"] == "abca", answer
    return statuses


def settle(running: Running) -> None:
    """Wait until nothing is in work, and everything is free again."""
    deadline = time.monotonic() + 60
    engine = running.state.llm.engine
    while running.state.num_in_work or engine.num_requests or engine.stats.num_running or engine.stats.kv_cache_usage:
        assert time.monotonic() < deadline, (running.state.num_in_work, engine.num_requests, engine.stats)
        time.sleep(0.05)
    assert not any(member._calls for member in engine.members) and not running.state.works


def test_hostile_requests_lose_nothing(fake: Running) -> None:
    fake.wait_ready()
    restarts = fake.state.llm.engine.num_restarts
    statuses = attack(fake, 240, seed=1)
    settle(fake)
    assert fake.state.llm.engine.num_restarts == restarts
    assert {200, 400, 404, 405, 413} <= statuses.keys(), statuses


def test_schemathesis_finds_no_server_error_and_no_undocumented_status(fake: Running) -> None:
    fake.wait_ready()
    status, description = get(f"{fake.url}/openapi.json")
    assert status == 200
    schema = schemathesis.openapi.from_dict(description)
    schema.config.base_url = fake.url
    statuses: dict[int, int] = {}
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 28
    for operation in operations:
        if operation.path == "/scale_elastic_ep":  # starts as many processes as it is told; see test_data_parallel
            continue
        fake.wait_ready()  # a drawn text may have a letter at which the fake engine dies or hangs

        @settings(
            max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        def one(case: Any) -> None:
            answer = case.call(timeout=60)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1
            if answer.status_code not in (501, 503):  # what the engine lacks, or a pause that aborts
                case.validate_response(
                    answer, checks=[not_a_server_error, status_code_conformance, content_type_conformance]
                )

        given(case=operation.as_strategy())(one)()
    post(f"{fake.url}/resume", {})
    assert statuses[200] > 20 and statuses[400] > 10, statuses
    settle(fake)


if __name__ == "__main__":
    with run_app(
        {"fake": fake_llm()}, max_body_bytes=100_000, max_concurrent_requests=64, enable_control=True
    ) as server:
        started = time.monotonic()
        print(attack(server, int(sys.argv[1]), seed=int(sys.argv[2]) if len(sys.argv) > 2 else 2))
        settle(server)
        print(f"{time.monotonic() - started:.1f} s")
