"""How a runner is built: device, dtype, entry, compiler and cache options, resolved and checked once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from seamwise.compile import pack
from seamwise.compile.pipeline import PipelineConfig

from .checkpoint_formats import check_load_format
from .config import ModelConfig

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """Options of ModelRunner.load, in effect or refused.

    dtype          of weights, activations and KV cache
    device         "cpu" or "cuda[:n]"
    entry          "own": Seamwise's definition; "transformers": the checkpoint's own class
    max_model_len  longest request in tokens, prompt and output together
    block_size     tokens in a KV cache block
    load_format    "auto": what is there; "safetensors", "pt", "npz", "gguf"; "dummy": seeded random weights
    enforce_eager  record nothing: every step runs op by op
    max_recorded_requests  largest number of requests whose decode step is recorded (0: none)
    pipeline       what differs from the default compiler pipeline
    pack_dir       where compiled models are kept; None compiles every time
    pack_name      the pack in pack_dir to use and write; None: named by its key
    offline        neither trace nor compile: a pack that is missing or does not fit is an error
    """

    dtype: torch.dtype
    device: str
    entry: str
    max_model_len: int
    block_size: int = 16
    load_format: str = "auto"
    seed: int = 0
    enforce_eager: bool = False
    max_recorded_requests: int = 256
    pipeline: PipelineConfig = field(default_factory=PipelineConfig)
    pack_dir: Path | None = pack.DEFAULT_DIRECTORY
    pack_name: str | None = None
    offline: bool = False

    def __post_init__(self) -> None:
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size={self.block_size}: wanted a power of two (16 is the default)")
        check_load_format(self.load_format)
        if self.pack_dir is None and (self.offline or self.pack_name):
            raise ValueError("offline and pack_name need a pack_dir, got pack_dir=None")
        if self.pipeline.parallel is not None and self.pack_name:
            raise ValueError("pack_name: every rank has a pack of its own, found by its key; leave the name out")

    @property
    def tensor_parallel_size(self) -> int:
        return 1 if self.pipeline.parallel is None else self.pipeline.parallel.size

    @classmethod
    def for_model(
        cls,
        config: ModelConfig,
        *,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        entry: str = "auto",
        max_model_len: int | None = None,
        quantization: str | None = None,
        tensor_parallel_size: int = 1,
        tensor_parallel_plan: Mapping[str, str] | None = None,
        enable_expert_parallel: bool = False,
        **options: Any,
    ) -> RunnerConfig:
        """Resolve "auto" values against a model's configuration. Raises ValueError naming a bad value.

        quantization  "fp8", "fp8_block", "int8" or "w4a16": quantize the weights of linear layers at load
        tensor_parallel_size  ranks of the default process group, each with its part of the model
        tensor_parallel_plan  pattern of a parameter's path -> transformers' style; default: the model's own
        enable_expert_parallel  ranks have whole experts, not a part of each
        """
        from seamwise.model_defs import has_definition

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={device!r}: torch finds no CUDA device; use device='cpu'")
        if dtype == "auto":
            dtype = config.dtype
        if isinstance(dtype, str):
            if dtype not in _DTYPES:
                raise ValueError(f"dtype={dtype!r}: wanted 'auto' or one of {', '.join(_DTYPES)}")
            dtype = _DTYPES[dtype]
        own = has_definition(config.architecture)
        if entry == "auto":
            entry = "own" if own else "transformers"
        if entry not in ("own", "transformers"):
            raise ValueError(f"entry={entry!r}: wanted 'auto', 'own' or 'transformers'")
        if entry == "own" and not own:
            raise ValueError(
                f"entry='own': Seamwise has no definition of {config.architecture}; use entry='transformers'"
            )
        limit = config.max_position_embeddings
        if max_model_len is None:
            max_model_len = limit
        if not 1 <= max_model_len <= limit:
            raise ValueError(
                f"max_model_len={max_model_len}: wanted 1 to {limit} (the model's max_position_embeddings)"
            )
        pipeline = options.get("pipeline", PipelineConfig())
        if quantization is not None:
            options["pipeline"] = pipeline = replace(pipeline, quantization=quantization)
        if pipeline.quantization and config.raw.get("quantization_config"):
            raise ValueError(
                f"quantization={pipeline.quantization!r}: the checkpoint is quantized already, by its config.json's"
                " quantization_config; leave the option out"
            )
        if tensor_parallel_size != 1:
            from .distributed import join_group

            parallel, device = join_group(
                tensor_parallel_size, device, experts=enable_expert_parallel, plan=tensor_parallel_plan
            )
            options["pipeline"] = replace(pipeline, parallel=parallel)
        elif tensor_parallel_plan is not None or enable_expert_parallel:
            raise ValueError("tensor_parallel_plan and enable_expert_parallel need a tensor_parallel_size above 1")
        try:
            return cls(dtype=dtype, device=device, entry=entry, max_model_len=max_model_len, **options)
        except TypeError as error:
            known = ", ".join(cls.__slots__)
            raise ValueError(f"unknown runner option: {error}; the options are: {known}") from None
