"""The open-loop load: arrivals are drawn before, every request is measured, failures are counted."""

from __future__ import annotations

import asyncio
import itertools
import json
import statistics
from pathlib import Path

import pytest

from seamwise.bench import serve
from seamwise.bench.serve import Load, Measured, run_load, summary


def test_arrivals_are_a_poisson_process_and_the_same_again() -> None:
    load = Load(num_requests=4000, rate=5.0, prompt_words=3, output_tokens=1, seed=1)
    drawn = load.draw()
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(drawn)]
    assert drawn == load.draw()
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(statistics.mean(gaps), rel=0.05)  # exponential


def test_a_load_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = int(head.lower().partition("content-length: ")[2].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length))
        if "water" in body["prompt"]:
            writer.write(b"HTTP/1.1 429 Too Many\r\n\r\nfull")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            for i in range(body["max_tokens"]):
                await asyncio.sleep(0.02)
                writer.write(b"data: " + json.dumps({"choices": [{"text": f" {i}"}]}).encode() + b"\n\n")
                await writer.drain()
            usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}
            writer.write(b"data: " + json.dumps(usage).encode() + b"\n\ndata: [DONE]\n\n")
        writer.close()

    async def go() -> dict[str, float]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        load = Load(num_requests=40, rate=100.0, prompt_words=2, output_tokens=4, seed=3)
        done, elapsed_s = await run_load(url, "m", load, None)
        expected = sum("water" in prompt for _, prompt in load.draw())
        serve.plot({"ours": done}, tmp_path / "plot.png")
        figures = summary(done, elapsed_s)
        assert figures["failed"] == expected > 0
        return figures

    figures = asyncio.run(go())
    assert 15 < figures["ttft_ms_p50"] < 5000 and 10 < figures["itl_ms_p50"] < 5000
    assert figures["output_tokens_per_s"] > 1 and (tmp_path / "plot.png").stat().st_size > 1000
    with pytest.raises(RuntimeError, match="no request succeeded; the first said: refused"):
        summary([Measured(0.0, error="refused")], 1.0)


def test_an_error_behind_the_first_text_is_a_failure() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for event in ({"choices": [{"text": "a"}]}, {"error": {"message": "the engine died"}}):
            writer.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        writer.close()

    async def go() -> list[Measured]:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        load = Load(num_requests=2, rate=100.0, prompt_words=1, output_tokens=2, seed=0)
        return (await run_load(url, "m", load, None))[0]

    for measured in asyncio.run(go()):
        assert len(measured.events_s) == 1 and measured.error == "{'message': 'the engine died'}"
