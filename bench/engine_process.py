"""One engine in one process, for fair comparison: `python engine_process.py JOB.json`; the last line it prints is JSON.

It runs alone, also by an interpreter where only the peer is installed: it imports nothing of Seamwise unless the engine
is Seamwise. JOB: engine, model, dtype, threads, max_model_len, repeats, and workloads as {name: {tokens, prompts}} with
prompts[run][request] lists of token ids; run 0 is the warm-up. Without workloads it measures start-up alone.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], list[int]]  # (prompts, output tokens) -> tokens produced for each prompt


def seamwise(job: dict[str, Any]) -> Generate:
    import torch

    torch.set_num_threads(job["threads"])
    from seamwise import LLM, SamplingParams

    llm = LLM(job["model"], dtype=job["dtype"], max_model_len=job["max_model_len"], max_num_seqs=64)

    def generate(prompts: list[list[int]], tokens: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [len(o.outputs[0].token_ids) for o in outputs]

    return generate


def transformers(job: dict[str, Any]) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"]).eval()

    def generate(prompts: list[list[int]], tokens: int) -> list[int]:
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
                pad_token_id=0,
            )  # fmt: skip
        return [out.shape[1] - ids.shape[1]] * len(prompts)

    return generate


def vllm(job: dict[str, Any]) -> Generate:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in-process: its fastest form here
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(job["model"], dtype=job["dtype"], max_model_len=job["max_model_len"], max_num_seqs=64, seed=0)

    def generate(prompts: list[list[int]], tokens: int) -> list[int]:
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        return [len(o.outputs[0].token_ids) for o in outputs]

    return generate


ENGINES = {"seamwise": seamwise, "transformers": transformers, "vllm": vllm}


def timed(generate: Generate, prompts: list[list[int]], tokens: int) -> float:
    """Return the seconds of one call. Raises RuntimeError when tokens are missing."""
    began = time.perf_counter()
    produced = generate(prompts, tokens)
    elapsed_s = time.perf_counter() - began
    if produced != [tokens] * len(prompts):
        raise RuntimeError(f"wanted {tokens} tokens for each of {len(prompts)} prompts, got {produced}")
    return elapsed_s


def measure(generate: Generate, tokens: int, runs: list[list[list[int]]]) -> list[dict[str, float]]:
    """Time every run after the warm-up; a single request also tells first token and decode rate.

    The time to first token is that of asking for one token of another prompt of the same length.
    """
    figures = []
    for index, prompts in enumerate(runs):
        elapsed_s = timed(generate, prompts, tokens)
        row = {
            "prompt_tokens_per_s": sum(map(len, prompts)) / elapsed_s,
            "output_tokens_per_s": tokens * len(prompts) / elapsed_s,
        }
        if len(prompts) == 1 and tokens > 1:
            first_s = timed(generate, [prompts[0][::-1]], 1)
            row |= {"ttft_ms": 1e3 * first_s, "decode_tokens_per_s": (tokens - 1) / (elapsed_s - first_s)}
        if index:
            figures.append(row)
    return figures


def process_age_s() -> float:
    """Return the seconds since this process began (field 22 of /proc/self/stat, in clock ticks)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")


def main(path: str) -> None:
    """Run a job and print its report: start_s, peak_mib, results {workload: [figures of each run]}."""
    job = json.loads(Path(path).read_text())
    generate = ENGINES[job["engine"]](job)
    timed(generate, [[101, 102, 103, 104]], 1)
    start_s = process_age_s()
    report: dict[str, Any] = {"start_s": start_s, "results": {}}
    for name, workload in job["workloads"].items():
        report["results"][name] = measure(generate, workload["tokens"], workload["prompts"])
    report["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
