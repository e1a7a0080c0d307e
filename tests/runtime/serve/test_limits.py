"""What a server refuses, and how: keys, sizes, counts, unknown fields, templates; and what it does to slow clients."""

from __future__ import annotations

import hmac
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from servers import Running, fake_llm, get, post, run_app

from seamwise.runtime.serve.http import guards
from seamwise.runtime.serve.http.guards import KeyCheck
from seamwise.runtime.serve.http.run import listen
from seamwise.runtime.serve.http.settings import ServeSettings

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
USER = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with keys and small limits."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# ours\nfrom-the-file\n")
    limits: dict[str, Any] = {
        "api_key": ("first", "second"), "api_key_file": keys, "max_body_bytes": 2000, "max_n": 3, "max_logprobs": 2,
        "max_concurrent_requests": 2, "max_prompts": 2, "write_timeout_s": 1.0, "cors_allow_origins": ("https://ours",),
    }  # fmt: skip
    with run_app({"fake": fake_llm(max_num_seqs=2)}, **limits) as running:
        yield running


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("Bearer first", 200), ("Bearer second", 200), ("bearer from-the-file", 200), ("Bearer firs", 401),
        ("Bearer first2", 401), ("first", 401), ("Basic first", 401), ("", 401), ("Bearer # ours", 401),
        ("Bearer \xe9", 401),
    ],
)  # fmt: skip
def test_keys(small: Running, header: str, status: int) -> None:
    got, answer = get(f"{small.url}/v1/models", Authorization=header)
    assert got == status
    assert status == 200 or "wants an API key" in answer["error"]["message"]


def test_health_and_pages_need_no_key_everything_else_does(small: Running) -> None:
    for path in ("/health", "/health/ready", "/ping"):
        assert get(small.url + path)[0] == 200
    for path in ("/metrics", "/v1/models", "/load", "/version", "/openapi.json", "/is_paused", "/no-such"):
        assert get(small.url + path)[0] == 401, path


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every key, whether or not an earlier one is right, as digests of one length, by a comparison of constant time."""
    compared: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    monkeypatch.setattr(guards, "hmac", SimpleNamespace(compare_digest=compare))
    check = KeyCheck(["k" * 4000, "x"])
    for given, right in (
        ("k" * 4000, True),
        ("x", True),
        ("j" + "k" * 3999, False),
        ("k" * 3999 + "j", False),
        ("", False),
    ):
        compared.clear()
        assert check(f"Bearer {given}") == right and compared == [(32, 32)] * 2


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        (TEXT, {"prompt": "a" * 3000}, 413, "longer than 2000 bytes"),
        (TEXT, {"prompt": "a", "n": 4}, 400, "n=4: this server gives at most 3"),
        (TEXT, {"prompt": "a", "logprobs": 3}, 400, "gives at most 2 (max_logprobs)"),
        (CHAT, {"messages": USER, "logprobs": True, "top_logprobs": 3}, 400, "gives at most 2"),
        (TEXT, {"prompt": ["a", "b", "c"]}, 400, "got 3 prompts, wanted 1 to 2"),
        (TEXT, {"prompt": []}, 400, "wanted 1 to 2"),
        (TEXT, {"prompt": ""}, 400, "has no tokens"),
        (TEXT, {"prompt": [1, 10_000]}, 400, "token id 10000"),
        (TEXT, {"prompt": "a" * 13}, 400, "no prompt of 13 tokens"),
        (TEXT, {"prompt": "a", "max_token": 3}, 400, "did you mean max_tokens?"),
        (TEXT, {"prompt": "a", "best_of": 3}, 400, "use n"),
        (TEXT, {"prompt": "a", "max_tokens": "3"}, 400, "max_tokens: Input should be a valid integer, got '3'"),
        (TEXT, {"prompt": "a", "temperature": -1}, 400, "temperature"),
        (TEXT, {"prompt": "a", "stop": [""]}, 400, "empty string"),
        (TEXT, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "key 'x', wanted token ids"),
        (TEXT, {"prompt": "a", "response_format": {"type": "json_schema"}}, 400, "wanted json_schema="),
        (TEXT, {"prompt": "a", "structured_outputs": {"regex": "(a"}}, 400, "structured_outputs: "),
        (TEXT, {"prompt": "a", "stream_options": {}}, 400, "stream=true"),
        (TEXT, {"prompt": "a", "model": "other"}, 404, "'other' is not served; there are: fake"),
        (CHAT, {"messages": USER, "chat_template": "x"}, 400, "templates from requests are refused"),
        (CHAT, {"messages": []}, 400, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        (CHAT, {"messages": USER, "tool_choice": "required"}, 400, "there are no tools"),
        (CHAT, {"messages": USER, "chat_template_kwargs": {"messages": 1}}, 400, "a field of its own"),
        (CHAT, {"messages": USER, "top_logprobs": 2}, 400, "logprobs=true"),
        ("/v1/embeddings", {"input": "a"}, 400, "has no embeddings"),
        ("/v1/responses", {"input": "a", "store": True}, 400, "store"),
        ("/inference/v1/generate", {"token_ids": [1], "sampling_params": {"temp": 1}}, 400, "temp"),
        ("/pause", {}, 404, "enable_control"),
        (TEXT, b'{"prompt": ', 400, "not valid JSON"),
        (TEXT, b'{"prompt": "\xff"}', 400, ""),
        (TEXT, b'{"prompt": "\\ud800"}', 400, ""),
        (TEXT, b"[" * 1900, 400, ""),
        (TEXT, b'{"prompt": "a", "seed": 1' + b"0" * 1000 + b"}", 400, "seed"),
        (TEXT, b'{"prompt": "a", "temperature": NaN}', 400, "temperature"),
        (TEXT, b"null", 400, ""),
        ("/tokenize", {"prompt": "a", "messages": USER}, 400, ""),
    ],
)  # fmt: skip
def test_what_is_refused(small: Running, path: str, body: Any, status: int, message: str) -> None:
    got, answer = post(small.url + path, body, Authorization="Bearer first")
    assert got == status, answer
    assert message in answer["error"]["message"] and answer["error"]["code"] == status
    assert "Traceback" not in json.dumps(answer)
    assert small.state.num_in_work == 0


def test_a_body_in_chunks_is_counted_too(small: Running) -> None:
    with socket.create_connection(_address(small)) as one:
        head = "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer first\r\n"
        one.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"7d1\r\n" + b"a" * 2001 + b"\r\n0\r\n\r\n")
        assert b" 413 " in one.recv(4096)


def test_a_field_that_asks_for_nothing_is_let_be(small: Running) -> None:
    body = {"prompt": "ab", "max_tokens": 2, "no_stop_trim": False, "return_hidden_states": None, "regex": ""}
    assert post(small.url + TEXT, body, Authorization="Bearer first")[0] == 200
    assert post(small.url + TEXT, {**body, "regex": "a+"}, Authorization="Bearer first")[0] == 400


def test_one_request_too_many_is_429_with_retry_after(small: Running) -> None:
    sockets = [_begin(small, {"prompt": "Z", "max_tokens": 40, "stream": True}) for _ in range(2)]
    while small.state.num_in_work < 2:
        time.sleep(0.01)
    with _begin(small, {"prompt": "a"}) as one_more:
        head = ""
        while not head.endswith("}"):
            head += one_more.recv(10_000).decode()
    assert " 429 " in head and "retry-after: 1" in head.lower() and "max_concurrent_requests=2" in head
    for one in sockets:
        one.close()  # and a client that leaves ends its request
    _settled(small)


def test_a_client_that_leaves_before_the_first_token_ends_its_request(small: Running) -> None:
    for body in ({"prompt": "Z" * 50, "max_tokens": 50}, {"prompt": "Z" * 50, "max_tokens": 50, "stream": True}):
        one = _begin(small, body)
        while not small.state.llm.engine.stats.num_running:
            time.sleep(0.005)
        one.close()
        _settled(small)


def test_a_client_that_reads_nothing_is_given_up(small: Running) -> None:
    body = {"prompt": "abc", "max_tokens": 1990, "stream": True, "n": 3, "return_token_ids": True, "logprobs": 2}
    started = time.monotonic()
    with _begin(small, body, receive_buffer=2048):
        while not small.state.num_in_work:
            time.sleep(0.005)
        _settled(small)
        assert time.monotonic() - started > 0.9


def test_a_slow_reader_gets_merged_deltas_and_loses_nothing(small: Running) -> None:
    with _begin(small, {"prompt": "abcdefg", "max_tokens": 1500, "stream": True}, receive_buffer=2048) as one:
        text, received = "", b""
        while not received.endswith(b"0\r\n\r\n"):
            data = one.recv(2048)
            assert data, received[-200:]
            received += data
            time.sleep(0.001)
    body = b"".join(part for part in received.split(b"\r\n") if part.startswith(b"data: {") or b"\ndata: {" in part)
    events = [json.loads(line[6:]) for line in body.decode().split("\n") if line.startswith("data: {")]
    text = "".join(event["choices"][0]["text"] for event in events)
    assert text == ("abcdefg" * 300)[:1500]


def test_pages_of_other_origins_may_not_call(small: Running) -> None:
    def allowed(origin: str) -> bool:
        with socket.create_connection(_address(small)) as one:
            one.sendall(f"GET /health HTTP/1.1\r\nHost: x\r\nOrigin: {origin}\r\nConnection: close\r\n\r\n".encode())
            return b"access-control-allow-origin: " + origin.encode() in one.recv(10_000).lower()

    assert allowed("https://ours") and not allowed("https://theirs")


def test_the_settings_themselves_are_checked(tmp_path: Path) -> None:
    (tmp_path / "none").write_text("\n")
    for options, message in (
        ({"api_key": ("",)}, "non-empty"), ({"api_key_file": tmp_path / "none"}, "holds no key"),
        ({"max_n": 0}, "max_n=0"), ({"write_timeout_s": 0.0}, "write_timeout_s"), ({"max_logprobs": -1}, "max_log"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            ServeSettings(**options)


def _address(running: Running) -> tuple[str, int]:
    host, _, port = running.url.removeprefix("http://").partition(":")
    return host, int(port)


def _begin(running: Running, body: Any, receive_buffer: int | None = None) -> socket.socket:
    """Send a request and return its socket."""
    one = socket.socket()
    if receive_buffer:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    one.settimeout(30)
    one.connect(_address(running))
    data = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer first\r\n"
    )
    one.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return one


def _settled(running: Running, within_s: float = 60) -> None:
    """Wait until nothing is in work, here and in the engine."""
    deadline = time.monotonic() + within_s
    engine = running.state.llm.engine
    while running.state.num_in_work or engine.num_requests or engine.stats.num_running or engine.stats.num_waiting:
        assert time.monotonic() < deadline, (running.state.num_in_work, engine.num_requests, engine.stats)
        time.sleep(0.02)


def test_what_a_connection_is_sent_waits_for_no_acknowledgement() -> None:
    """Without it each answer on a connection that was kept took 44 ms, 40 of them until the client's system said so."""
    with listen(ServeSettings(port=0)) as sock, socket.create_connection(sock.getsockname()[:2]):
        connection, _ = sock.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
