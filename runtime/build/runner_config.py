"""How a runner is built: device, dtype, entry, compiler and cache options, resolved and checked once."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from seamwise import caches
from seamwise.compile.pipeline import PipelineConfig
from seamwise.runtime.weights.file_formats import check_load_format
from seamwise.runtime.weights.quantization_config import packed_gguf, read_quantization, warn_of_experts
from seamwise.runtime.weights.quantization_rules import Quantization

from .arguments import refuse_unknown
from .auto_options import choose_device, choose_dtype, choose_entry, choose_kv_dtype, choose_length
from .eplb_config import EPLBConfig
from .model_config import ModelConfig
from .pooler import Pooler, PoolerConfig, choose_pooler
from .sharing import Sharing

_ELSEWHERE = {  # options that users of vLLM and transformers ask for, and what there is instead
    "trust_remote_code": "code inside a checkpoint is never run; entry='transformers' runs transformers' own classes",
    "max_seq_len_to_capture": "use cudagraph_capture_sizes, in tokens, and max_recorded_requests",
    "compilation_config": "use cudagraph_mode, cudagraph_capture_sizes and pipeline=PipelineConfig(…)",
    "enable_chunked_prefill": "prompts are always computed in chunks of at most max_num_batched_tokens",
    "swap_space": "preempted requests are computed again",
    "device_map": "use device",
    "torch_dtype": "use dtype",
    "attn_implementation": "attention is always Seamwise's",
    "task": "use runner='pooling' or 'generate'",
}
_MODES = {
    "none": (), "piecewise": ("piecewise",), "full_decode_only": ("full",), "full_and_piecewise": ("full", "piecewise"),
}  # fmt: skip
_SHARING = tuple(field.name for field in fields(Sharing))


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """Options of ModelRunner.load, in effect or refused.

    dtype          of weights and activations
    kv_cache_dtype  of the KV cache: the same, or float8_e4m3fn
    device         "cpu" or "cuda[:n]"
    entry          "own": Seamwise's definition; "transformers": the checkpoint's own class
    max_model_len  longest request in tokens, prompt and output together; default: the model's, and of LongRoPE and
                   "dynamic" RoPE their original length, at which short prompts are computed as trained (as in vLLM)
    block_size     tokens in a KV cache block
    disable_hybrid_kv_cache_manager  one group of KV blocks for all layers, whatever their windows: steps have one block
                   table, for schedulers that keep one; every token takes memory in every layer; with data_parallel_size
                   it is so
    disable_cascade_attn  on a CPU, attend to each request alone; else blocks that several begin with are read once for
                   all, where that is measured to be faster; results are the same in bits
    disable_custom_all_reduce  on GPUs, let NCCL sum all that ranks share; else ranks of 2, 4, 6 or 8 read each other's
                   memory for sums of up to 8 MiB, which must be within reach
    hf_overrides   values in place of config.json's, by its keys, as {"rope_parameters": {"rope_type": "yarn", …}}
    load_format    "auto": what is there; "safetensors", "pt", "npz", "gguf"; "dummy": seeded random weights
    enforce_eager  record nothing: every step runs op by op
    stored         how the checkpoint holds quantized weights, where the graph reads them so
    cudagraph_mode  what is recorded (in CUDA graphs; on a CPU, on tapes): "full_decode_only": steps that decode one
                   token a request; "piecewise": every step, between seams; "full_and_piecewise": each by what it is;
                   "none". Default: "full_and_piecewise" on CUDA; "full_decode_only" on a CPU
    num_speculative_tokens  drafts of a request that one step verifies: steps of up to one more token for each request
                   are recorded in full
    return_hidden_states  a step may ask for what its logits are computed from (StepInput.hidden_states)
    pooler         how texts become vectors, where the model pools: steps give hidden states, and logits of width 0
    dbo_decode_token_threshold, dbo_prefill_token_threshold  with enable_dbo: fewest tokens of a step that is taken as
                   two, where every request decodes one token, and of any other. Unmeasured: vLLM's
    eplb           how experts are balanced over ranks while requests run; None: they stay where they are
    max_recorded_requests  most requests of a full recording, and most rows of logits of any (0: nothing is recorded)
    cudagraph_capture_sizes  numbers of tokens that piecewise recordings are padded to; larger steps run op by op
    max_recorded_bytes  memory of recordings; what would take more runs op by op
    pipeline       what differs from the default compiler pipeline
    pack_dir       where compiled models are kept; None compiles every time
    pack_name      the pack of `seamwise compile` in pack_dir to run; None: one named by its key
    offline        neither trace nor compile: a pack that is missing or does not fit is an error
    """

    dtype: torch.dtype
    kv_cache_dtype: torch.dtype
    device: str
    entry: str
    max_model_len: int
    block_size: int = 16
    disable_hybrid_kv_cache_manager: bool = False
    disable_cascade_attn: bool = False
    disable_custom_all_reduce: bool = False
    hf_overrides: Mapping[str, Any] | None = None
    load_format: str = "auto"
    seed: int = 0
    stored: Quantization | None = None
    enforce_eager: bool = False
    cudagraph_mode: str | None = None
    num_speculative_tokens: int = 0
    return_hidden_states: bool = False
    pooler: Pooler | None = None
    dbo_decode_token_threshold: int = 32
    dbo_prefill_token_threshold: int = 512
    eplb: EPLBConfig | None = None
    max_recorded_requests: int = 256
    cudagraph_capture_sizes: tuple[int, ...] | None = None
    max_recorded_bytes: int = 2 << 30
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    pack_dir: Path | None = field(default_factory=lambda: caches.folder("packs"))
    pack_name: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size={self.block_size}: wanted a power of two (16 is the default)")
        if self.pack_dir is not None:
            object.__setattr__(self, "pack_dir", Path(self.pack_dir).absolute())  # a str is taken too
        check_load_format(self.load_format)
        if self.cudagraph_mode not in (None, *_MODES):
            raise ValueError(f"cudagraph_mode={self.cudagraph_mode!r}: wanted one of {', '.join(map(repr, _MODES))}")
        if self.enforce_eager and self.cudagraph_mode not in (None, "none"):
            raise ValueError(f"enforce_eager and cudagraph_mode={self.cudagraph_mode!r} contradict; leave one out")
        if type(self.num_speculative_tokens) is not int or self.num_speculative_tokens < 0:
            raise ValueError(f"num_speculative_tokens={self.num_speculative_tokens!r}: wanted 0 or more")
        sizes = self.capture_sizes
        if not sizes or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
            raise ValueError(f"cudagraph_capture_sizes={sizes}: wanted rising numbers of tokens, from 1 up")
        if self.cudagraph_capture_sizes is not None and "piecewise" not in self.recorded_modes:
            warnings.warn(
                "cudagraph_capture_sizes has no effect here: no pieces are recorded; they are with"
                " cudagraph_mode='piecewise' or 'full_and_piecewise'",
                stacklevel=2,
            )
        if self.pack_dir is None and (self.offline or self.pack_name):
            raise ValueError("offline and pack_name need a pack_dir, got pack_dir=None")
        if self.pipeline_parallel_size > 1 and self.cudagraph_mode not in (None, "none"):
            raise ValueError(
                f"cudagraph_mode={self.cudagraph_mode!r} with pipeline_parallel_size={self.pipeline_parallel_size}:"
                " stages run op by op, what comes from the one before is nowhere twice; leave one out"
            )
        if (self.pipeline.parallel is not None or self.pipeline_parallel_size > 1) and self.pack_name:
            raise ValueError("pack_name: every rank has a pack of its own, found by its key; leave the name out")

    @property
    def recorded_modes(self) -> tuple[str, ...]:
        """What is recorded: of "full" (uniform decode) and "piecewise" (any step), those in effect."""
        default = "full_decode_only" if torch.device(self.device).type == "cpu" else "full_and_piecewise"
        nothing = self.enforce_eager or not self.max_recorded_requests or self.pipeline_parallel_size > 1
        return () if nothing else _MODES[self.cudagraph_mode or default]

    @property
    def capture_sizes(self) -> tuple[int, ...]:
        """Numbers of tokens that piecewise recordings are padded to. Default: vLLM's, up to 512."""
        if self.cudagraph_capture_sizes is not None:
            return tuple(self.cudagraph_capture_sizes)
        return (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))

    @property
    def max_blocks(self) -> int:
        """Blocks of the longest request."""
        return -(-self.max_model_len // self.block_size)

    @property
    def num_ranks(self) -> int:
        """Ranks that share the model, or its experts."""
        return self.pipeline_parallel_size if self.pipeline.parallel is None else self.pipeline.parallel.size

    @property
    def pipeline_parallel_size(self) -> int:
        """Stages, each with some of the layers, that a step goes through."""
        return self.pipeline.stage[1]

    @property
    def tensor_parallel_size(self) -> int:
        """Ranks that compute the same requests."""
        return 1 if self.pipeline.parallel is None or self.pipeline.parallel.data else self.pipeline.parallel.size

    @property
    def enable_dbo(self) -> bool:
        """Whether a step may be two batches that take turns."""
        return self.pipeline.parallel is not None and self.pipeline.parallel.two_batches

    @property
    def data_parallel_size(self) -> int:
        """Ranks with requests of their own that take each step together, for they share out the experts."""
        return 1 if self.pipeline.parallel is None else self.pipeline.parallel.size // self.tensor_parallel_size

    @classmethod
    def for_model(
        cls, config: ModelConfig, *, dtype: str | torch.dtype = "auto", device: str = "auto", entry: str = "auto",
        max_model_len: int | None = None, quantization: str | None = None, kv_cache_dtype: str = "auto",
        allow_missed: Sequence[str] = (),
        enable_lora: bool = False, max_loras: int | None = None, max_lora_rank: int | None = None,
        runner: str = "auto", convert: str = "auto", pooler_config: Mapping[str, Any] | PoolerConfig | None = None,
        **options: Any,
    ) -> RunnerConfig:  # fmt: skip
        """Resolve "auto" values against a model's configuration. Raises ValueError naming a bad value.

        quantization  "fp8", "fp8_block", "int8" or "w4a16": quantize the weights of linear layers at load; "gguf": keep
                      those of a GGUF file packed where a kernel reads them so
        kv_cache_dtype  "fp8" (or "fp8_e4m3"): keys and values in float8, by the checkpoint's scales or as they are;
                      "auto": so where the checkpoint has scales, else the model's dtype
        allow_missed  names of passes that may match fewer places than the model and its graph promise
        enable_lora   requests may have adapters: at most max_loras (1) in a step, of rank max_lora_rank (16)
        runner        "pooling": the model gives vectors; "generate"; "auto": pooling for a class without a head and
                      where sentence-transformers' files are
        convert       "embed": pool the states before a generating model's head; pooler_config: see PoolerConfig
        **options     those of Sharing, and further fields
        """
        check_options(options)
        shared = Sharing(**{name: options.pop(name) for name in _SHARING if name in options})
        device = choose_device(device)
        dtype = choose_dtype(dtype, config)
        stored = read_quantization(config.raw, config.architecture)
        if quantization == "gguf":
            stored, quantization = packed_gguf(config.raw), None
        served = dtype == torch.bfloat16 and torch.device(device).type == "cpu"
        warn_of_experts(config.raw, stored if served else None)
        kv_dtype = choose_kv_dtype(kv_cache_dtype, dtype, stored is not None and stored.has_kv_scales)
        entry = choose_entry(entry, config.architecture)
        pooler = choose_pooler(
            config.pooler, config.has_head, config.raw, config.hidden_size, runner=runner, convert=convert,
            pooler_config=pooler_config,
        )  # fmt: skip
        if pooler is not None:
            _check_pooling(shared.data_parallel_size, options)
        max_model_len = choose_length(max_model_len, config, None if pooler is None else pooler.max_length)
        pipeline = options.pop("pipeline", PipelineConfig())
        if quantization is not None:
            pipeline = replace(pipeline, quantization=quantization)
        if allow_missed:
            names = (allow_missed,) if isinstance(allow_missed, str) else tuple(allow_missed)
            pipeline = replace(pipeline, allow_missed=(*pipeline.allow_missed, *names))
        if enable_lora:
            rooms = {"max_loras": 1 if max_loras is None else max_loras}
            rooms["max_lora_rank"] = 16 if max_lora_rank is None else max_lora_rank
            alone = max(shared.data_parallel_size, shared.pipeline_parallel_size) == 1
            _check_adapters(pipeline.quantization, alone, shared.enable_async_tp, **rooms)
            pipeline = replace(pipeline, **rooms)
        elif max_loras is not None or max_lora_rank is not None:
            raise ValueError("max_loras and max_lora_rank need enable_lora=True, which they limit")
        if pipeline.quantization and config.raw.get("quantization_config"):
            raise ValueError(
                f"quantization={pipeline.quantization!r}: the checkpoint is quantized already, by its config.json's"
                " quantization_config; leave the option out"
            )
        if not shared.enable_dbo and (given := [name for name in options if name.startswith("dbo_")]):
            raise ValueError(f"{given[0]} needs enable_dbo=True, whose batches it limits")
        return cls(
            dtype=dtype, kv_cache_dtype=kv_dtype, stored=stored, device=device, entry=entry,
            max_model_len=max_model_len, pooler=pooler, eplb=shared.eplb, pipeline=shared.told_to(pipeline), **options,
        )  # fmt: skip


def _check_pooling(data_parallel_size: int, options: Mapping[str, Any]) -> None:
    wrong = [name for name in ("return_hidden_states", "num_speculative_tokens") if options.get(name)]
    if data_parallel_size != 1:
        wrong.append("data_parallel_size")
    if wrong:
        raise ValueError(f"runner='pooling' with {wrong[0]}, which is for models that generate; leave one out")


def _check_adapters(quantization: str | None, alone: bool, async_tp: bool, max_loras: int, max_lora_rank: int) -> None:
    for name, value, most in (("max_loras", max_loras, 4096), ("max_lora_rank", max_lora_rank, 512)):
        if type(value) is not int or not 1 <= value <= most:
            raise ValueError(f"{name}={value!r}: wanted 1 to {most}")
    if quantization not in (None, "w4a16"):
        raise ValueError(
            f"enable_lora with quantization={quantization!r}: it quantizes the rows that adapters read as they are; use"
            " 'w4a16', or leave one out"
        )
    if not alone:
        raise ValueError(
            "enable_lora with data_parallel_size or pipeline_parallel_size: adapters are shared out over the ranks of"
            " tensor_parallel_size alone; leave them out"
        )
    if async_tp:
        raise ValueError(
            "enable_lora with enable_async_tp, which takes linear layers together that adapters change apart; leave one"
            " out"
        )


def check_options(options: Iterable[str], others: Iterable[str] = ()) -> None:
    """Raise ValueError for a name that is no option of RunnerConfig.for_model, nor one of others."""
    asked = {*inspect.signature(RunnerConfig.for_model).parameters} - {"config", "options"}
    known = sorted(asked | {*_SHARING} | {*RunnerConfig.__slots__} - {"stored", "eplb", "pooler"} | {*others})
    refuse_unknown(options, known, _ELSEWHERE, "option")
