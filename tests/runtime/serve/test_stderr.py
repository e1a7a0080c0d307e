"""A server whose stderr nobody reads goes on answering, and ends."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import threading
import time

from servers import HERE, get, post

from seamwise.runtime.serve import stderr
from seamwise.runtime.serve.stderr import Behind

COMMAND = """
from seamwise.runtime.serve import async_llm
made = async_llm.AsyncLLM
async_llm.AsyncLLM = lambda model, **options: made(model, engine_factory="fake_llm:make")
from seamwise.runtime.serve.cli import main
raise SystemExit(main(["serve", "--model", "fake", "--port", "0"]))
"""
_PIPE = 4096


def test_a_server_whose_stderr_is_full_answers_and_ends() -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", COMMAND], stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(HERE)}
    )
    assert process.stderr is not None
    try:
        descriptor = process.stderr.fileno()
        fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE)
        said = b""
        while not (found := re.search(rb"is ready at (http\S+)\n", said)):
            more = os.read(descriptor, 1)
            assert more, said.decode()
            said += more
        url = found[1].decode()
        for i in range(100):  # a line of some hundred bytes each
            assert get(f"{url}/health?{i}{'x' * 100}")[0] == 200
        assert post(f"{url}/v1/completions", {"prompt": "abc", "max_tokens": 4})[1]["choices"][0]["text"] == "abca"
        process.terminate()
        assert process.wait(60) == 0
        held = os.read(descriptor, 1 << 20)
        assert 0 < len(held) <= _PIPE
    finally:
        process.kill()
        process.stderr.close()


def test_what_is_dropped_is_counted_and_the_rest_keeps_its_order() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, _PIPE)
    os.set_blocking(writing, False)
    behind = Behind(writing)
    line = "x" * 1000
    count = 2 * stderr.MOST_BYTES // len(line)
    started = time.monotonic()
    for i in range(count):
        print(f"{i:6d} {line}\ud800", file=behind)
    assert time.monotonic() - started < 60
    got: list[bytes] = []

    def read() -> None:
        while data := os.read(reading, 1 << 16):
            got.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    behind.end(60)
    os.close(writing)
    reader.join(60)
    os.close(reading)
    texts = b"".join(got).decode()
    numbers = [int(n) for n in re.findall(r"(?m)^ *(\d+) x", texts)]
    (dropped,) = re.findall(r"(\d+) texts for stderr were dropped", texts)
    assert numbers == [*range(len(numbers))] and 500 < len(numbers) < count and "\\ud800" in texts
    ends = texts.count("\n") - 1  # print writes a line and its end apart
    assert len(numbers) + ends + int(dropped) == 2 * count
    assert texts.splitlines()[-1].endswith("dropped: nobody read it")


def test_a_reader_that_has_gone_is_no_error() -> None:
    reading, writing = os.pipe()
    behind = Behind(writing)
    os.close(reading)
    for _ in range(3):
        assert behind.write("words\n") == 6
    behind.end(5)
    os.close(writing)


def test_a_blocked_end_is_not_waited_for_longer_than_said() -> None:
    reading, writing = os.pipe()
    behind = Behind(writing)
    behind.write("x" * (1 << 19))
    started = time.monotonic()
    behind.end(0.2)
    assert time.monotonic() - started < 60
    os.close(reading)  # ends the thread
    behind.end(5)
    os.close(writing)
    assert not any(t.name == "seamwise-stderr" and t.is_alive() for t in threading.enumerate())
