"""`seamwise bench lora`: a batch whose requests have adapters, beside the same batch without, in turns in one run.

Adapters are drawn, of one rank, on every linear layer that takes them, and saved as PEFT saves them. Without adapters
the batch runs twice: where adapters could come (enable_lora), and where they could not, which is what the others are
compared with. `--vllm PYTHON` runs vLLM on the same prompts and adapters, with and without, a process each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from seamwise.passes.add_adapters import AdaptedLayer

from .command_line import command_line, parse, save
from .compare import preloads, run_engine
from .machine import label
from .workloads import Workload

GOAL = 1 / 1.15  # of the tokens a second without adapters: they may cost 15 %


def write_adapters(folder: Path, layers: list[AdaptedLayer], count: int, rank: int) -> list[str]:
    """Draw adapters of every layer, save them as PEFT does, and return their directories."""
    directories = []
    for number in range(count):
        draw = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in layers:
            outputs, inputs = layer.shape
            for role, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
                drawn = torch.randn(shape, generator=draw) / shape[1] ** 0.5
                tensors[f"base_model.model.{layer.module}.lora_{role}.weight"] = drawn.to(torch.bfloat16)
        names = sorted({layer.module.rpartition(".")[2] for layer in layers})
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": names}
        directory = folder / f"adapter-{number}"
        directory.mkdir()
        (directory / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, directory / "adapter_model.safetensors")
        directories.append(str(directory))
    return directories


def ours(options: argparse.Namespace, workload: Workload, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the speeds of each case by round, and the adapters' directories."""
    from seamwise import LLM, LoRARequest, SamplingParams

    limits: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": workload.num_requests, "dtype": "bfloat16"}
    plain = LLM(options.model, **limits)
    adapted = LLM(options.model, enable_lora=True, max_loras=options.adapters, max_lora_rank=options.rank, **limits)
    directories = write_adapters(folder, adapted.engine.runner.adapters.layers, options.adapters, options.rank)
    given = [LoRARequest(Path(d).name, i + 1, d) for i, d in enumerate(directories)]
    mixed = [given[i % len(given)] for i in range(workload.num_requests)]
    cases = {"plain": (plain, None), "enable_lora": (adapted, None), "adapters": (adapted, mixed)}
    params = SamplingParams(temperature=0, max_tokens=workload.output_tokens, ignore_eos=True, detokenize=False)
    speeds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(options.rounds + 1):  # the first makes recordings and reads adapters, and is not counted
        prompts = [{"prompt_token_ids": p} for p in workload.prompts(plain.engine.runner.config.vocab_size, turn)]
        found = {}
        for name, (llm, lora) in cases.items():
            llm.reset_prefix_cache()
            began = time.perf_counter()
            outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=lora)
            seconds = time.perf_counter() - began
            found[name] = [o.outputs[0].token_ids for o in outputs]
            if turn:
                speeds[name].append(sum(map(len, found[name])) / seconds)
        assert found["enable_lora"] == found["plain"] != found["adapters"], "adapters changed who has none, or nobody"
    return speeds, directories


def vllm(options: argparse.Namespace, workload: Workload, directories: list[str]) -> dict[str, list[float]]:
    """Return vLLM's speeds with and without adapters. Raises RuntimeError with what it says when it fails."""
    from seamwise.runtime.build.model_config import ModelConfig

    vocab_size = ModelConfig.from_directory(Path(options.model)).vocab_size
    job = {
        "engine": "vllm", "model": str(options.model), "dtype": "bfloat16", "threads": torch.get_num_threads(),
        "instruction_set": options.instruction_set, "max_model_len": 1024, "quantization": None,
        "workloads": {"batch": workload.job(vocab_size, options.rounds + 1)},
    }  # fmt: skip
    speeds = {}
    for name, adapters in (("vllm plain", []), ("vllm adapters", directories)):
        given = {**job, "adapters": adapters, "rank": options.rank}
        report = run_engine(given, python=options.vllm, preload=preloads(options.vllm), home=None)
        speeds[name] = [run["output_tokens_per_s"] for run in report["results"]["batch"]]
    return speeds


def main(arguments: list[str]) -> int:
    """Parse arguments, measure, print a line a case, write JSON when asked."""
    from seamwise.runtime.weights.hub import resolve_model

    parser = command_line("lora", __doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter that has vLLM")
    options = parse(parser, arguments)
    options.model = resolve_model(options.model)
    shape = {
        "num_requests": options.requests,
        "own_tokens": options.prompt_tokens,
        "output_tokens": options.output_tokens,
    }
    workload = Workload(name="lora", shared_tokens=0, **shape)
    with tempfile.TemporaryDirectory() as folder:
        speeds, directories = ours(options, workload, Path(folder))
        if options.vllm:
            speeds |= vllm(options, workload, directories)
    results = {}
    for name, values in speeds.items():
        beside = speeds["vllm plain" if name.startswith("vllm") else "plain"]
        ratio = statistics.median(a / b for a, b in zip(values, beside, strict=True))
        results[name] = {"tokens_per_s": statistics.median(values), "of_plain": ratio, "runs": values}
        print(f"{label()} {name:13} {results[name]['tokens_per_s']:8.1f} tokens/s  {ratio:5.3f} x (goal {GOAL:.3f})")
    shape |= {"adapters": options.adapters, "rank": options.rank, "goal": GOAL}
    save(options, model=options.model.name, shape=shape, results=results)
    return 0
