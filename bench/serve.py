"""`seamwise bench serve`: open-loop load on OpenAI servers: requests come when they come, as a Poisson process.

A closed loop waits for answers before it asks again, and so never shows a queue; here arrival times are drawn before.
Latencies are the client's: TTFT from sending a request to its first token, ITL between two events with text.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from .command_line import command_line, parse, picture, save

WORDS = "time way year work day thing man world life part house course case system place end group hand water".split()  # noqa: SIM905


@dataclass(slots=True)
class Measured:
    """One request: seconds from its planned arrival to each event with text, and why it failed, if it did."""

    planned_s: float
    sent_s: float = 0.0
    events_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """num_requests prompts of about prompt_words words, rate a second, output_tokens each."""

    num_requests: int
    rate: float
    prompt_words: int
    output_tokens: int
    seed: int

    def draw(self) -> list[tuple[float, str]]:
        """Return (arrival in seconds, prompt) for each request; the same for every server."""
        draw = np.random.default_rng(self.seed)
        arrivals = np.cumsum(draw.exponential(1 / self.rate, self.num_requests))
        prompts = [" ".join(draw.choice(WORDS, self.prompt_words)) for _ in range(self.num_requests)]
        return list(zip(arrivals.tolist(), prompts, strict=True))


@asynccontextmanager
async def post(
    url: str, route: str, body: dict[str, Any], api_key: str | None = None
) -> AsyncIterator[tuple[float, AsyncIterator[dict[str, Any]]]]:
    """Send a streaming request over a connection of its own; yield the time.perf_counter() of that, and its events.

    Reading them raises RuntimeError for a status other than 200, and for an event that is an error.
    """
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80, limit=1 << 20)
    try:
        data = json.dumps(body).encode()
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        head = (
            f"POST {parts.path.rstrip('/').removesuffix('/v1')}{route} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"{key}Content-Type: application/json\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        sent_s = time.perf_counter()
        writer.write(head.encode() + data)
        await writer.drain()
        yield sent_s, _events(reader)
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    status = (await reader.readline()).decode().split(" ")[1]
    if status != "200":
        raise RuntimeError(f"status {status}: {(await reader.read())[-300:].decode(errors='replace')}")
    async for line in reader:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            yield event


async def ask(url: str, body: dict[str, Any], measured: Measured, started_s: float, api_key: str | None) -> None:
    """Send one request and note when its text came."""
    async with post(url, "/v1/completions", body, api_key) as (sent_s, events):
        measured.sent_s = sent_s - started_s
        async for event in events:
            if event.get("usage"):
                measured.num_tokens = event["usage"]["completion_tokens"]
            if event.get("choices") and event["choices"][0].get("text"):
                measured.events_s.append(time.perf_counter() - started_s)


async def run_load(url: str, model: str, load: Load, api_key: str | None) -> tuple[list[Measured], float]:
    """Send the load; return what each request met, and the seconds until the last was done."""
    started_s = time.perf_counter()

    async def one(arrival_s: float, prompt: str) -> Measured:
        measured = Measured(arrival_s)
        await asyncio.sleep(arrival_s - (time.perf_counter() - started_s))
        body = {
            "model": model, "prompt": prompt, "max_tokens": load.output_tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}, "ignore_eos": True,
        }  # fmt: skip
        try:
            await ask(url, body, measured, started_s, api_key)
        except RuntimeError as error:  # what the server said
            measured.error = str(error)
        except (OSError, ValueError, IndexError) as error:
            measured.error = f"{type(error).__name__}: {error}"
        return measured

    done = await asyncio.gather(*(one(*drawn) for drawn in load.draw()))
    return list(done), time.perf_counter() - started_s


def summary(done: list[Measured], elapsed_s: float) -> dict[str, Any]:
    """Return the figures of a run: milliseconds, and tokens a second. Raises RuntimeError when no request succeeded."""
    good = [m for m in done if m.events_s and not m.error]
    if not good:
        raise RuntimeError(f"no request succeeded; the first said: {done[0].error or 'nothing'}")
    ttft = [1e3 * (m.events_s[0] - m.sent_s) for m in good]
    itl = [1e3 * gap for m in good for gap in np.diff(m.events_s)]
    e2e = [1e3 * (m.events_s[-1] - m.sent_s) for m in good]
    figures: dict[str, Any] = {"requests": len(done), "failed": len(done) - len(good)}
    figures["output_tokens_per_s"] = sum(m.num_tokens or len(m.events_s) for m in good) / elapsed_s
    for name, values in (("ttft_ms", ttft), ("itl_ms", itl), ("e2e_ms", e2e)):
        for percent in (50, 90, 99):
            figures[f"{name}_p{percent}"] = float(np.percentile(values, percent)) if values else float("nan")
    figures["late_ms_p99"] = float(np.percentile([1e3 * (m.sent_s - m.planned_s) for m in good], 99))
    return figures


def plot(runs: dict[str, list[Measured]], target: Path) -> None:
    """Draw the distribution of TTFT and ITL of each server."""
    with picture(target, 9, 3.5, columns=2) as axes:
        for name, done in runs.items():
            good = [m for m in done if m.events_s and not m.error]
            series: dict[str, list[float]] = {
                "time to first token": [m.events_s[0] - m.sent_s for m in good],
                "time between tokens": [gap for m in good for gap in np.diff(m.events_s)],
            }
            for axis, (title, seconds) in zip(axes, series.items(), strict=True):
                axis.plot(1e3 * np.sort(seconds), np.linspace(0, 100, len(seconds)), label=name)
                axis.set(xlabel=f"{title}, ms", ylabel="% of them below", xscale="log")
        axes[0].legend()


def main(arguments: list[str]) -> int:
    """`seamwise bench serve`."""
    parser = command_line("serve", __doc__, model=False, cpu=False, plot="how TTFT and ITL are distributed")
    parser.add_argument("--url", action="append", required=True, help="NAME=http://…; give it again for another server")
    parser.add_argument("--model", action="append", required=True, help="the served model's name, one for each --url")
    parser.add_argument("--api-key")
    parser.add_argument("--num-requests", type=int, default=100)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second, on the average (2)")
    parser.add_argument("--prompt-words", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    options = parse(parser, arguments)
    if len(options.model) not in (1, len(options.url)):
        raise ValueError(f"got {len(options.model)} --model for {len(options.url)} --url; wanted one, or one for each")
    if not options.rate > 0 or min(options.num_requests, options.prompt_words, options.output_tokens) < 1:
        raise ValueError("--rate, --num-requests, --prompt-words and --output-tokens: wanted above 0")
    load = Load(
        num_requests=options.num_requests, rate=options.rate, prompt_words=options.prompt_words,
        output_tokens=options.output_tokens, seed=options.seed,
    )  # fmt: skip
    models = options.model * (len(options.url) if len(options.model) == 1 else 1)
    runs: dict[str, list[Measured]] = {}
    results: dict[str, dict[str, Any]] = {}
    for given, model in zip(options.url, models, strict=True):
        name, _, url = given.rpartition("=") if "=http" in given else (given, "", given)
        runs[name], elapsed_s = asyncio.run(run_load(url, model, load, options.api_key))
        results[name] = summary(runs[name], elapsed_s)
        print(f"{name}: " + "  ".join(f"{key} {value:,.1f}" for key, value in results[name].items()))
    save(options, load=asdict(load), results=results)
    if options.plot:
        plot(runs, options.plot)
    return 0
