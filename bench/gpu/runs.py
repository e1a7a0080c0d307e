"""Stage 5 of `seamwise bench gpu`: whole runs of `LLM` with random weights, beside transformers and installed peers."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from seamwise.bench.engine_process import Generate, greedy, greedy_module, timed

from .models import configuration, model_directory
from .rows import Absent, Context, Lazy, Row

REAL: dict[str, Any] = {"batches": (64, 256, 1), "prompt": 128, "output": 128}
TINY: dict[str, Any] = {"batches": (2,), "prompt": 12, "output": 4}
SCHEMES = {"bf16": None, "fp8": "fp8"}
# model, engine, scheme, whether only the second round takes it, seconds to load, seconds of a run
PLAN = (
    ("llama-3-8b", "seamwise", "bf16", False, 25, 10), ("llama-3-8b", "transformers", "bf16", False, 10, 60),
    ("llama-3-8b", "seamwise", "fp8", False, 25, 8), ("qwen3-30b-a3b", "seamwise", "bf16", False, 40, 10),
    ("qwen3-30b-a3b", "seamwise", "fp8", False, 40, 10), ("llama-3-8b", "vllm", "bf16", True, 90, 10),
    ("qwen3-30b-a3b", "transformers", "bf16", True, 30, 90), ("qwen3-30b-a3b", "vllm", "bf16", True, 120, 10),
)  # fmt: skip


def rows(context: Context) -> Iterator[Row]:
    """Yield output tokens a second by model, engine, scheme and batch; an engine is loaded when a row needs it."""
    shapes = TINY if context.tiny else REAL
    for model, engine, scheme, extra, load_s, run_s in PLAN:
        start = partial(ENGINES[engine], model, context, shapes, quantization=SCHEMES[scheme])
        generate = Lazy(start, load_s)
        for batch in shapes["batches"]:
            estimate_s = run_s + generate.pending_s
            run = partial(measure, generate, configuration(model, context.tiny)["vocab_size"], batch, shapes)
            yield from context.take(f"runs/{model}/{engine}/{scheme}/{batch}", estimate_s, run, extra=extra)
        loaded = not generate.pending_s
        del generate, run
        if loaded:
            free_memory(context.device)


def free_memory(device: str) -> None:
    """Give back what a dropped model held; dynamo's caches hold it too."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(lazy: Lazy[Generate], vocab_size: int, batch: int, shapes: dict[str, Any]) -> Row:
    """Run a batch of random prompts of one length, the second time timed; then the same for one token, the first."""
    generate, output = lazy(), shapes["output"]
    generator = torch.Generator().manual_seed(batch)

    def prompts() -> list[list[int]]:
        return torch.randint(vocab_size, (batch, shapes["prompt"]), generator=generator).tolist()

    timed(generate, prompts(), output)
    whole_s, first_s = timed(generate, prompts(), output), timed(generate, prompts(), 1)
    decode_s = max(whole_s - first_s, 1e-9)
    return {
        "batch": batch, "prompt": shapes["prompt"], "output": output, "tokens_per_s": batch * output / whole_s,
        "first_token_s": first_s, "decode_tokens_per_s": batch * (output - 1) / decode_s,
    }  # fmt: skip


def seamwise(model: str, context: Context, shapes: dict[str, Any], quantization: str | None) -> Generate:
    """Load Seamwise's own engine. No prompt is cached: every one is computed."""
    from seamwise import LLM, SamplingParams

    with model_directory(model, context.tiny) as directory:
        llm = LLM(
            directory, dtype="bfloat16", device=context.device, load_format="dummy", quantization=quantization,
            max_model_len=shapes["prompt"] + shapes["output"], max_num_seqs=max(shapes["batches"]),
            max_num_batched_tokens=8192, enable_prefix_caching=False, pack_dir=None,
        )  # fmt: skip
    return greedy(llm, SamplingParams)


def transformers(model: str, context: Context, shapes: dict[str, Any], quantization: str | None) -> Generate:
    """Load transformers' own class with random weights: static cache, forward by torch.compile for each batch size.

    On a CPU it is traced by dynamo and runs eagerly: there it only has to work.
    """
    import transformers as hf

    with model_directory(model, context.tiny) as directory:
        config = hf.AutoConfig.from_pretrained(directory)
    with torch.device(context.device):
        module = hf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    backend = "inductor" if context.device == "cuda" else "eager"
    compiling = hf.generation.CompileConfig(backend=backend, dynamic=False)
    compiling._compile_all_devices = True
    module.generation_config.eos_token_id = None
    return greedy_module(module, cache_implementation="static", compile_config=compiling)


def vllm(model: str, context: Context, shapes: dict[str, Any], quantization: str | None) -> Generate:
    """Load vLLM with random weights. Raises Absent where it is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise Absent("vllm is not installed")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    with model_directory(model, context.tiny) as directory:
        llm = LLM(
            str(directory), dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True,
            enable_prefix_caching=False, max_model_len=shapes["prompt"] + shapes["output"],
            max_num_seqs=max(shapes["batches"]),
        )  # fmt: skip
    return greedy(llm, SamplingParams)


ENGINES: dict[str, Callable[..., Generate]] = {"seamwise": seamwise, "transformers": transformers, "vllm": vllm}
