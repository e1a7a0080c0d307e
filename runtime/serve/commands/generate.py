"""`seamwise generate`: one answer, streamed to a terminal, then its figures."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from seamwise.extras import pip_install

from .options import Commands, add_command, loading, model_options


def add(commands: Commands) -> None:
    what = "answer a prompt (or continue it, with --raw) and print text, speed and where start-up time went"
    parser = add_command(commands, "generate", run, what)
    model_options(parser)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--raw", action="store_true", help="continue the text, without the model's chat template")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--next", action="store_true", help="say what to try next")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(options: argparse.Namespace) -> int:
    """`seamwise generate`: one prompt, streamed to a terminal, then its figures."""
    from seamwise.runtime.sampling.params import SamplingParams
    from seamwise.runtime.serve.llm import LLM

    params = SamplingParams(
        temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, seed=options.seed,
        max_tokens=options.max_tokens,
    )  # fmt: skip
    llm = LLM(options.model, max_num_seqs=8, **loading(options))
    engine, tokenizer = llm.engine, llm.tokenizer
    if tokenizer is None:
        raise ValueError(f"{options.model}: has no tokenizer, which --prompt needs")
    messages = [{"role": "user", "content": options.prompt}]
    chat = not options.raw and bool(tokenizer.chat_templates)
    ids = tokenizer.apply_chat_template(messages) if chat else tokenizer.encode(options.prompt)
    engine.add_request("cli", ids, params, prompt=options.prompt)
    output, shown, first_token_s = None, 0, None
    while engine.has_unfinished_requests():
        for output in engine.step():
            first_token_s = first_token_s or _seconds_since_process_start()
            text = output.outputs[0].text
            if not options.json:
                print(text[shown:], end="", flush=True)
            shown = len(text)
    assert output is not None and first_token_s is not None
    figures = _figures(output, first_token_s)
    startup = engine.runner.startup_s
    if options.json:
        text, reason = output.outputs[0].text, output.outputs[0].finish_reason
        print(json.dumps({"text": text, "finish_reason": reason, **figures, "startup_s": startup}))
        return 0
    print(f"\n\n{figures['output_tokens']} tokens, {figures['decode_tokens_per_s']:.1f} tokens/s,", end=" ")
    print(f"time to first token {figures['ttft_ms']:.1f} ms")
    print(f"process start to first token {first_token_s:.2f} s, of which:")
    stages = {**startup, "first step": figures["ttft_ms"] / 1e3}
    rest = {"imports, tokenizer, allocation": first_token_s - sum(stages.values())}  # what no stage claims
    for stage, seconds in (rest | stages).items():
        print(f"  {stage:32} {seconds:6.2f} s")
    if options.next:
        print(f"\nnow try:  {Path(sys.argv[0])} chat --model {options.model}")
        missing = [name for name in ("fastapi", "uvicorn", "zmq", "msgspec") if find_spec(name) is None]
        first = f"   (after {pip_install('serve')})" if missing else ""
        print(f"     or:  {Path(sys.argv[0])} serve --model {options.model}{first}")
    return 0


def _figures(output: Any, first_token_s: float) -> dict[str, float]:
    m, produced = output.metrics, len(output.outputs[0].token_ids)
    decode_s = m.finished_time - m.first_token_time
    return {
        "prompt_tokens": len(output.prompt_token_ids),
        "output_tokens": produced,
        "decode_tokens_per_s": (produced - 1) / decode_s if produced > 1 else 0.0,
        "ttft_ms": 1e3 * (m.first_token_time - m.arrival_time),
        "start_to_first_token_s": first_token_s,
    }


def _seconds_since_process_start() -> float:
    """Return the age of this process, from the kernel's own record (field 22 of /proc/self/stat, in clock ticks)."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.process_time()
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return uptime_s - ticks / os.sysconf("SC_CLK_TCK")
