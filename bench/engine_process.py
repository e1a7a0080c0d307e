"""One engine in one process, for fair comparison: `python engine_process.py JOB.json`; the last line it prints is JSON.

It runs alone, also by an interpreter where only the peer is installed: it imports nothing of Seamwise unless the engine
is Seamwise. JOB: engine, model, dtype, quantization, threads, max_model_len, repeats, and workloads as {name: {tokens,
prompts}} with prompts[run][request] lists of token ids; run 0 is the warm-up. Without workloads it measures start-up
alone. vLLM takes adapters too: directories that its requests have in turn, of the rank given.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

Generate = Callable[[list[list[int]], int], list[int]]  # (prompts, output tokens) -> tokens produced for each prompt


def greedy(llm: Any, params: Callable[..., Any], adapters: Sequence[Any] = ()) -> Generate:
    """Return what runs prompts through an LLM with vLLM's names; `params` is its SamplingParams.

    Requests have the adapters in turn, where there are any.
    """

    def generate(prompts: list[list[int]], tokens: int) -> list[int]:
        asked = params(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        mixed = [adapters[i % len(adapters)] for i in range(len(prompts))] if adapters else None
        given = [{"prompt_token_ids": p} for p in prompts]
        outputs = llm.generate(given, asked, use_tqdm=False, lora_request=mixed)
        return [len(o.outputs[0].token_ids) for o in outputs]

    return generate


def greedy_module(model: Any, **options: Any) -> Generate:
    """Return what runs prompts of one length through a class of transformers; `options` are those of its generate."""
    import torch

    def generate(prompts: list[list[int]], tokens: int) -> list[int]:
        ids = torch.tensor(prompts, device=model.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
            pad_token_id=0, **options,
        )  # fmt: skip
        return [out.shape[1] - ids.shape[1]] * len(prompts)

    return generate


def seamwise(job: dict[str, Any]) -> Generate:
    import torch

    torch.set_num_threads(job["threads"])
    from seamwise import LLM, SamplingParams
    from seamwise.kernels.cpu import instruction_set

    instruction_set.use(job["instruction_set"])
    llm = LLM(
        job["model"], dtype=job["dtype"], max_model_len=job["max_model_len"], max_num_seqs=64,
        quantization=job["quantization"],
    )  # fmt: skip
    return greedy(llm, SamplingParams)


def transformers(job: dict[str, Any]) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=job["dtype"]).eval()
    return torch.inference_mode()(greedy_module(model))


def vllm(job: dict[str, Any]) -> Generate:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in-process: its fastest form here
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    adapters = [LoRARequest(Path(d).name, i + 1, d) for i, d in enumerate(job.get("adapters", []))]
    lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": job["rank"]} if adapters else {}
    llm = LLM(job["model"], dtype=job["dtype"], max_model_len=job["max_model_len"], max_num_seqs=64, seed=0, **lora)
    return greedy(llm, SamplingParams, adapters)


def llama_cpp(job: dict[str, Any]) -> Generate:
    """llama.cpp by its C interface, as its example "batched": a sequence for each request, one batch a step.

    The model is a .gguf, in whose kinds it computes. What all prompts begin with is computed once and copied, as
    llama-batched-bench -pps does. Source: https://github.com/ggml-org/llama.cpp/tree/master/examples/batched.
    """
    import llama_cpp as library  # type: ignore[import-not-found]
    import numpy as np

    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # its level is what llama.cpp prints
    library.llama_backend_init()
    model = library.llama_model_load_from_file(job["model"].encode(), library.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp cannot read {job['model']}")
    sequences = max((len(run) for w in job["workloads"].values() for run in w["prompts"]), default=1)
    options = library.llama_context_default_params()
    options.n_seq_max, options.n_ctx = sequences, sequences * job["max_model_len"]
    options.n_threads = options.n_threads_batch = job["threads"]
    context = library.llama_init_from_model(model, options)
    if not context:
        raise RuntimeError(f"llama.cpp has no context of {options.n_ctx} tokens")
    most, vocab_size = options.n_batch, library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
    batch, memory = library.llama_batch_init(most, 0, 1), library.llama_get_memory(context)

    def run(rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Compute (sequence, position, token, whether its next is wanted); return the likeliest next ones."""
        nexts = []
        for start in range(0, len(rows), most):
            part = rows[start : start + most]
            batch.n_tokens = len(part)
            for i, (sequence, position, token, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if error := library.llama_decode(context, batch):
                raise RuntimeError(f"llama_decode of {len(part)} tokens: {error}")
            for i in (i for i, row in enumerate(part) if row[3]):
                logits = np.ctypeslib.as_array(library.llama_get_logits_ith(context, i), shape=(vocab_size,))
                nexts.append(int(logits.argmax()))
        return nexts

    def generate(prompts: list[list[int]], tokens: int) -> list[int]:
        library.llama_memory_clear(memory, False)
        shared = 0
        if len(prompts) > 1:  # each computes its last token itself, whose logits it needs
            alike = (len({*column}) == 1 for column in zip(*(p[:-1] for p in prompts), strict=False))
            shared = sum(takewhile(bool, alike))
        if shared:
            run([(0, i, token, False) for i, token in enumerate(prompts[0][:shared])])
            for sequence in range(1, len(prompts)):
                library.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
        rows = [(s, i, p[i], i == len(p) - 1) for s, p in enumerate(prompts) for i in range(shared, len(p))]
        produced = [[token] for token in run(rows)]
        for step in range(tokens - 1):
            rows = [(s, len(p) + step, produced[s][-1], True) for s, p in enumerate(prompts)]
            for known, token in zip(produced, run(rows), strict=True):
                known.append(token)
        return [len(known) for known in produced]

    return generate


ENGINES = {"seamwise": seamwise, "transformers": transformers, "vllm": vllm, "llama_cpp": llama_cpp}


def timed(generate: Generate, prompts: list[list[int]], tokens: int) -> float:
    """Return the seconds of one call. Raises RuntimeError when tokens are missing."""
    began = time.perf_counter()
    produced = generate(prompts, tokens)
    elapsed_s = time.perf_counter() - began
    if produced != [tokens] * len(prompts):
        raise RuntimeError(f"wanted {tokens} tokens for each of {len(prompts)} prompts, got {produced}")
    return elapsed_s


def measure(generate: Generate, tokens: int, prompts: list[list[list[int]]]) -> list[dict[str, float]]:
    """Time every run of prompts after the warm-up; a single request also tells first token and decode rate.

    The time to first token is that of asking for one token of another prompt of the same length.
    """
    figures = []
    for index, run in enumerate(prompts):
        elapsed_s = timed(generate, run, tokens)
        row = {
            "prompt_tokens_per_s": sum(map(len, run)) / elapsed_s,
            "output_tokens_per_s": tokens * len(run) / elapsed_s,
        }
        if len(run) == 1 and tokens > 1:
            first_s = timed(generate, [run[0][::-1]], 1)
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
        report["results"][name] = measure(generate, **workload)
    report["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print("\n" + json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
