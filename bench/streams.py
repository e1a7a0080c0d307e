"""`seamwise bench streams`: many streams for minutes through a server, against the same model offline.

Every stream asks again when its answer has ended. Prompts come from a fixed set, so that each answer's ids are known
from the offline run: none may be lost, doubled or other. The offline batch is measured before and after, one stream
alone in turns with one request offline, and the memory of the server's processes from the first minute on.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from .command_line import command_line, parse, save
from .serve import WORDS, post

GOAL_THROUGHPUT, GOAL_TTFT_MS = 0.92, 5.0
_REST_S = 0.1  # OpenMP's threads stay on their cores for milliseconds after they computed, in the other's way


@dataclass(slots=True)
class Seen:
    """What the streams met."""

    tokens: int = 0
    answers: int = 0
    wrong: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)


async def stream(url: str, prompt_ids: list[int], num_tokens: int) -> tuple[list[int], float]:
    """Return the ids of a stream and the seconds to its first event. Raises RuntimeError for an error it met."""
    # offline starts with an empty prefix cache; so must each turn of a prompt here
    params = {"temperature": 0, "max_tokens": num_tokens, "ignore_eos": True, "skip_reading_prefix_cache": True}
    body = {"token_ids": prompt_ids, "sampling_params": params, "stream": True}
    first_s, found = 0.0, list[int]()
    async with post(url, "/inference/v1/generate", body) as (sent_s, events):
        async for event in events:
            first_s = first_s or time.perf_counter() - sent_s
            found += event["choices"][0]["token_ids"]
    return found, first_s


async def run_streams(
    url: str, prompts: list[list[int]], wanted: list[list[int]], num_streams: int, seconds: float, pid: int
) -> tuple[Seen, float]:
    """Keep `num_streams` streams busy; return what they met, and the seconds until the last had ended."""
    seen, started = Seen(), time.perf_counter()

    async def one(first: int) -> None:
        turn = first
        while time.perf_counter() - started < seconds:
            number = turn % len(prompts)
            found, _ = await stream(url, prompts[number], len(wanted[number]))
            seen.answers, seen.tokens = seen.answers + 1, seen.tokens + len(found)
            if found != wanted[number]:
                seen.wrong.append(f"prompt {number}: {found} instead of {wanted[number]}")
            turn += num_streams

    async def watch() -> None:
        while True:
            seen.memory_mib.append(sum(_memory_mib(process) for process in _family(pid)))
            await asyncio.sleep(5)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(one(i) for i in range(num_streams)))
    watching.cancel()
    return seen, time.perf_counter() - started


def _family(pid: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [pid]
    for number in found:
        for thread in Path(f"/proc/{number}/task").glob("*/children"):
            found += [int(child) for child in thread.read_text().split()]
    return found


def _memory_mib(pid: int) -> float:
    """Return the memory that a process holds alone (resident, without what is shared)."""
    _, resident, shared, *_ = Path(f"/proc/{pid}/statm").read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextmanager
def served(model: Path, num_streams: int, max_model_len: int) -> Iterator[tuple[str, int]]:
    """Yield the address and process number of a server on a free port."""
    command = [
        sys.executable, "-m", "seamwise", "serve", "--model", str(model), "--port", "0",
        "--max-num-seqs", str(num_streams), "--max-model-len", str(max_model_len),
    ]  # fmt: skip
    # to a file: a pipe that nobody reads any more fills up with a line a request, and then the server stands still
    with tempfile.TemporaryFile("a+") as log:
        process = subprocess.Popen(command, stderr=log, text=True)
        try:
            yield _ready(process, log), process.pid
        finally:
            process.terminate()
            process.wait(30)


def _ready(process: subprocess.Popen[str], log: IO[str]) -> str:
    """Wait until the server says that it is ready; return its address. Raises RuntimeError when it ends before."""
    while True:
        ended = process.poll() is not None
        log.seek(0)
        for line in log.read().splitlines():
            if " is ready at http" in line:
                return line.rpartition(" ")[2]
        if ended:
            log.seek(0)
            raise RuntimeError(f"the server did not start:\n{log.read()}")
        time.sleep(0.1)


def main(arguments: list[str]) -> int:
    """`seamwise bench streams`. The status is 1 when an answer was not what offline gives."""
    from seamwise import LLM, SamplingParams
    from seamwise.runtime.weights.hub import resolve_model

    parser = command_line("streams", __doc__, cpu=False)
    parser.add_argument("--num-streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--prompt-words", type=int, default=24)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--alone", type=int, default=15, help="turns of one stream and one offline request (15)")
    options = parse(parser, arguments)
    model = resolve_model(options.model)
    max_model_len = 4 * options.prompt_words + options.output_tokens
    llm = LLM(model, max_num_seqs=options.num_streams, max_model_len=max_model_len)
    words = [" ".join(WORDS[(i * k) % len(WORDS)] for k in range(options.prompt_words)) for i in range(256)]
    prompts = [[*llm.get_tokenizer().encode(f"{i}: {text}")] for i, text in enumerate(words)]
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    params = SamplingParams(temperature=0, max_tokens=options.output_tokens, ignore_eos=True, detokenize=False)

    def offline() -> tuple[list[list[int]], float]:
        llm.reset_prefix_cache()
        started = time.perf_counter()
        outputs = llm.generate(asked, params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs], time.perf_counter() - started

    def first_offline(number: int) -> float:
        llm.reset_prefix_cache()
        started = time.perf_counter()
        llm.generate([asked[number]], SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        return time.perf_counter() - started

    wanted, before_s = offline()
    with served(model, options.num_streams, max_model_len) as (url, pid):
        alone = []
        for turn in range(options.alone):
            time.sleep(_REST_S)
            here = first_offline(turn)
            time.sleep(_REST_S)
            found, there = asyncio.run(stream(url, prompts[turn], options.output_tokens))
            assert found == wanted[turn], f"prompt {turn} alone: {found} instead of {wanted[turn]}"
            alone.append(1e3 * (there - here))
        seen, elapsed_s = asyncio.run(
            run_streams(url, prompts, wanted, options.num_streams, options.seconds, pid)
        )  # fmt: skip
    _, after_s = offline()
    batch = 2 * len(prompts) * options.output_tokens / (before_s + after_s)
    settled = seen.memory_mib[min(12, len(seen.memory_mib) - 1) :]  # after the first minute
    results: dict[str, Any] = {
        "answers": seen.answers, "wrong_answers": len(seen.wrong), "seconds": elapsed_s,
        "output_tokens_per_s": seen.tokens / elapsed_s, "offline_output_tokens_per_s": batch,
        "throughput_of_offline": seen.tokens / elapsed_s / batch, "ttft_over_offline_ms": statistics.median(alone),
        "memory_mib_first_minute": settled[0], "memory_mib_most": max(settled), "memory_mib_end": settled[-1],
    }  # fmt: skip
    for name, value in results.items():
        print(f"{name:30} {value:,.2f}")
    print(f"goals: throughput {GOAL_THROUGHPUT:.0%} of offline, first token {GOAL_TTFT_MS:.0f} ms over offline")
    print("\n".join(seen.wrong[:5]), file=sys.stderr)
    save(options, shape={k: v for k, v in vars(options).items() if k not in ("json", "model")}, results=results)
    return int(bool(seen.wrong))
