"""The importable model runner: weights, compiled pieces and KV cache; no scheduler, no tokenizer, no globals.

runner = ModelRunner.load("path/to/model", device="cpu")
runner.allocate_kv(num_blocks=512)
logits = runner.step(StepInput(...)).logits
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from seamwise import caches
from seamwise.compile import pack
from seamwise.compile.ledger import Ledger
from seamwise.compile.program import Executable, Program
from seamwise.compile.record.recorder import Recording
from seamwise.runtime.build.kv_spec import KVCacheSpec
from seamwise.runtime.build.loading import load_step_weights
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.packs import load_program, open_pack, with_recorded
from seamwise.runtime.build.progress import shown_ledger
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.build.step import STEP_ARGUMENTS, StepInput, StepOutput, step_of_padding
from seamwise.runtime.distributed.group import smallest

from .memory_plan import MemoryPlan, plan_memory
from .named_tensors import named_tensors
from .recordings import CapturePlan, Eager, Empty, Full, Piecewise, Recordings, RecordingStats
from .update_weights import WeightUpdates


class ModelRunner:
    """One model, ready to step. Several may live in one process; nothing is shared between them but code.

    config     the model's own configuration
    program    what was compiled: passes' reports, pieces, generated source
    startup_s  seconds by stage of start-up
    buffers    what recipes read that no checkpoint holds
    """

    def __init__(
        self, config: ModelConfig, options: RunnerConfig, executable: Executable, ledger: Ledger,
        buffers: Mapping[str, Tensor],
    ) -> None:  # fmt: skip
        self.config = config
        self.buffers = buffers
        self.options = options
        self.executable = executable
        self.startup_s = ledger.seconds
        self.kv_spec = KVCacheSpec.of_program(executable.program, options).local(executable.program)
        self._updates = WeightUpdates()
        self.kv_caches: list[list[Tensor]] = []
        self._caches_flat: list[Tensor] = []
        self._recordings = self._new_recordings()

    def _new_recordings(self) -> Recordings:
        ranks = self.options.tensor_parallel_size > 1
        agree = partial(smallest, device=self.options.device) if ranks else int
        return Recordings(self.program, self.options, agree)

    @classmethod
    def load(cls, path: str | Path, *, cache_dir: str | Path | None = None, **options: Any) -> ModelRunner:
        """Load a Hugging Face model directory, compiling it or taking its pack, or a pack of `seamwise compile`.

        Options are the fields of RunnerConfig; cache_dir moves all caches of this process. Raises ValueError for a
        directory, configuration or checkpoint that cannot be served, naming what is wrong.
        """
        if cache_dir is not None:
            caches.set_cache_dir(cache_dir)
        with shown_ledger("start-up") as ledger:
            path = Path(path)
            if pack.is_pack(path):
                path, options = open_pack(path, options)
            elif options.get("pack_name"):
                options = with_recorded(options)
            with ledger.stage("read config"):
                config = ModelConfig.from_directory(Path(path))
                settings = RunnerConfig.for_model(config, **options)
            if torch.device(settings.device).index is not None:
                torch.cuda.set_device(settings.device)  # where kernels are launched
            program, buffers = load_program(config, settings, ledger)
            with ledger.stage("load weights"):
                weights = load_step_weights(Path(path), settings, program, buffers)
            with ledger.stage("bind"):
                executable = Executable(program, weights)
        return cls(config, settings, executable, ledger, buffers)

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

    def plan(self, budget: int | None = None, **limits: Any) -> MemoryPlan:
        """Return every byte that this runner takes, before its KV cache is allocated. limits: see plan_memory."""
        derived = [n for n, recipe in self.program.recipes.items() if "weight" not in recipe]
        places = dict(zip(self.program.recipes, self.executable.weights, strict=True))
        return plan_memory(
            self.program, self.options, self.kv_spec, sum(b.nbytes for b in self.buffers.values()),
            sum(places[name].nbytes for name in derived), budget=budget,
            held_bytes=sum(weight.nbytes for weight in self.executable.weights), **limits,
        )  # fmt: skip

    def limit_model_len(self, max_model_len: int) -> None:
        """Let requests be at most so long, as a plan says. Raises ValueError for more than the model was built for."""
        if not 1 <= max_model_len <= self.options.max_model_len:
            raise ValueError(f"max_model_len={max_model_len}: wanted 1 to {self.options.max_model_len}")
        self.options = replace(self.options, max_model_len=max_model_len)
        self._recordings = self._new_recordings()

    def allocate_kv(self, num_blocks: int) -> None:
        """Allocate the KV cache. Raises ValueError for fewer than 2 blocks (block 0 is the null block)."""
        if num_blocks < 2:
            raise ValueError(f"allocate_kv: got num_blocks={num_blocks}, wanted at least 2 (block 0 holds padding)")
        self.kv_caches = self.kv_spec.allocate(num_blocks, self.options.device)
        self._caches_flat = [cache for layer in self.kv_caches for cache in layer]
        self._recordings.clear()

    @torch.inference_mode()
    def step(self, batch: StepInput) -> StepOutput:
        """Run the model over one ragged batch: write its keys and values to the cache, return the wanted logits.

        A step that cudagraph_mode has recorded is replayed; its recording is made when its size is first seen.
        """
        if not self.kv_caches:
            raise RuntimeError("step: the KV cache is not allocated; call allocate_kv(num_blocks) first")
        if (unfinished := self._updates.unfinished(self.program)) is not None:
            raise RuntimeError(unfinished)
        batch.check()
        self._check_served(batch)
        match self._recordings.kind_of(batch):
            case Empty():
                results = self._empty()
            case Eager():
                results = self.executable(*self._flat(self._on_device(batch)))
            case Full() | Piecewise() as key:
                results = self._recordings.run(key, self.executable, batch, self._flat)
        logits, hidden = results if self.options.return_hidden_states else (results, None)
        return StepOutput(
            logits=logits, hidden_states=hidden if batch.hidden_states else None, request_slots=batch.request_slots,
            request_generations=batch.request_generations,
        )  # fmt: skip

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write new values of parameters, (the checkpoint's name, tensor) each, in place; recordings stay valid.

        What the KV cache holds was computed with the old ones. See update_weights.py for what is refused.
        """
        self._updates.update(self.executable, self.options, self.buffers, named_tensors(weights).items())

    def recording(self, num_requests: int, tokens_each: int = 1) -> Recording:
        """Return the recorded step of so many requests and tokens of each. Raises KeyError before such a step ran."""
        return self._recordings[Full(num_requests, tokens_each)]

    def capture_plan(self) -> CapturePlan:
        """Return what may be recorded, and the memory it takes. str() of it is for people."""
        return self._recordings.plan

    @property
    def recording_stats(self) -> RecordingStats:
        """How steps ran until now, and what is recorded."""
        return self._recordings.stats

    def _check_served(self, batch: StepInput) -> None:
        """Raise ValueError for what a step may ask for and this model does not have."""
        if batch.positions.dim() > 1:
            raise ValueError("StepInput.positions is (3, T), this model rotates by one position a token: wanted (T,)")
        if batch.further_groups:
            raise ValueError(
                f"StepInput has {1 + len(batch.further_groups)} KV cache groups, this model has 1: leave further_groups"
                " out"
            )
        if batch.adapter_slots is not None and batch.adapter_slots.any():
            raise ValueError(
                f"StepInput.adapter_slots is {batch.adapter_slots.tolist()}, no adapter is loaded: wanted 0"
            )
        if batch.hidden_states and not self.options.return_hidden_states:
            raise ValueError("the step asks for hidden states; load the runner with return_hidden_states=True")

    def _empty(self) -> Any:
        """Run no tokens: alone, nothing; beside other ranks, a row of padding, for their collectives wait for ours."""
        if self.options.tensor_parallel_size > 1:
            results = self.executable(*self._flat(self._on_device(step_of_padding())))
            return tree_map(lambda result: result[:0], results)
        logits, hidden = (
            torch.empty(0, size, dtype=self.options.dtype, device=self.options.device)
            for size in (self.config.vocab_size, self.config.hidden_size)
        )
        return (logits, hidden) if self.options.return_hidden_states else logits

    def _on_device(self, batch: StepInput) -> StepInput:
        if torch.device(self.options.device).type == "cpu":
            return batch
        moved = {n: getattr(batch, n).to(self.options.device) for n in STEP_ARGUMENTS if n != "kv_caches"}
        return StepInput(**moved)

    def _flat(self, batch: StepInput) -> list[Tensor]:
        """Return the step's tensors flattened in the program's order."""
        flat: list[Tensor] = []
        for name in STEP_ARGUMENTS:
            flat += self._caches_flat if name == "kv_caches" else [getattr(batch, name)]
        return flat
