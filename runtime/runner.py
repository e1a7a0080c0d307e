"""The importable model runner: weights, compiled pieces and KV cache; no scheduler, no tokenizer, no globals.

runner = ModelRunner.load("path/to/model", device="cpu")
runner.allocate_kv(num_blocks=512)
logits = runner.step(StepInput(...)).logits
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seamwise.compile.ledger import Ledger
from seamwise.compile.program import Executable, Program

from .config import ModelConfig
from .kv_cache import KVCacheSpec
from .loading import load_program, load_step_weights
from .runner_config import RunnerConfig
from .step import STEP_ARGUMENTS, StepInput, StepOutput


class ModelRunner:
    """One model, ready to step. Several may live in one process; nothing is shared between them but code.

    config     the model's own configuration
    program    what was compiled: passes' reports, pieces, generated source
    startup_s  seconds by stage of start-up
    """

    def __init__(self, config: ModelConfig, options: RunnerConfig, executable: Executable, ledger: Ledger) -> None:
        self.config = config
        self.options = options
        self.executable = executable
        self.startup_s = ledger.seconds
        self.kv_spec = KVCacheSpec(
            num_layers=config.num_layers,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            block_size=options.block_size,
            dtype=options.dtype,
        )
        self.kv_caches: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def load(cls, path: str | Path, **options: Any) -> ModelRunner:
        """Load a Hugging Face model directory: compile it (or take its pack), read its weights.

        Options are the fields of RunnerConfig. Raises ValueError for a directory, configuration or checkpoint that
        cannot be served, naming what is wrong.
        """
        ledger = Ledger()
        with ledger.stage("read config"):
            config = ModelConfig.from_directory(Path(path))
            settings = RunnerConfig.for_model(config, **options)
        program, buffers = load_program(config, settings, ledger)
        with ledger.stage("load weights"):
            weights = load_step_weights(Path(path), settings, program, buffers)
        with ledger.stage("bind"):
            executable = Executable(program, weights)
        return cls(config, settings, executable, ledger)

    @property
    def program(self) -> Program:
        return self.executable.program

    @property
    def block_size(self) -> int:
        return self.options.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks in the KV cache, the null block included; 0 before allocate_kv."""
        return self.kv_caches[0][0].shape[0] if self.kv_caches else 0

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the KV cache. Raises ValueError for fewer than 2 blocks (block 0 is the null block)."""
        if num_blocks < 2:
            raise ValueError(f"allocate_kv: got num_blocks={num_blocks}, wanted at least 2 (block 0 holds padding)")
        self.kv_caches = self.kv_spec.allocate(num_blocks, self.options.device)

    @torch.inference_mode()
    def step(self, batch: StepInput) -> StepOutput:
        """Run the model over one ragged batch: write its keys and values to the cache, return the wanted logits."""
        if not self.kv_caches:
            raise RuntimeError("step: the KV cache is not allocated; call allocate_kv(num_blocks) first")
        batch.check()
        return StepOutput(logits=self.executable(*self._inputs(batch)))

    def _inputs(self, batch: StepInput) -> list[Tensor]:
        """Return the step's tensors on the device, flattened in the program's order."""
        device = self.options.device
        flat: list[Tensor] = []
        for name in STEP_ARGUMENTS:
            if name == "kv_caches":
                flat += [cache for pair in self.kv_caches for cache in pair]
            else:
                flat.append(getattr(batch, name).to(device, non_blocking=True))
        return flat
