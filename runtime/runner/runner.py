"""The importable model runner: weights, compiled pieces and KV cache; no scheduler, no tokenizer, no globals.

runner = ModelRunner.load("path/to/model", device="cpu")
runner.allocate_kv(num_blocks=512)
logits = runner.step(StepInput(...)).logits
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seamwise import caches
from seamwise.compile import pack
from seamwise.compile.program import Executable, Program
from seamwise.compile.record.recorder import Recording
from seamwise.compile.startup_times import Ledger
from seamwise.kernels.cpu.attention_cpu import cascade
from seamwise.kernels.cpu.tape import reusing_memory
from seamwise.kernels.cpu.tape_memory import StepMemory
from seamwise.runtime.build.hidden_states import without_head
from seamwise.runtime.build.kv_groups import Groups
from seamwise.runtime.build.kv_spec import KVCacheSpec
from seamwise.runtime.build.loading import load_step_weights
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.packs import load_program, open_pack, pack_parts, with_recorded
from seamwise.runtime.build.progress import shown_ledger
from seamwise.runtime.build.ranks import placed, share_sums
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.build.step import StepInput, StepOutput, check_plain, flattened, step_of_padding
from seamwise.runtime.distributed.group import check_alike, smallest
from seamwise.runtime.weights.read_adapter import Adapter

from .adapter_slots import AdapterSlots
from .balance import Balancer
from .data_ranks import agree
from .kv_cache import KVCache
from .memory_plan import MemoryPlan, plan_memory
from .named_tensors import ModelWeights, named_tensors
from .recordings import CapturePlan, Eager, Full, Recordings, RecordingStats
from .sleep import TAGS, Sleep
from .sparse_kv import Pick, SparseKV, check_sparse_kv
from .step_tensors import logits_and_hidden, no_results, on_device
from .update_weights import WeightUpdates


class ModelRunner:
    """One model, ready to step. Several may live in one process; nothing is shared between them but code.

    config     the model's own configuration
    program    what was compiled: passes' reports, pieces, generated source
    startup_s  seconds by stage of start-up
    buffers    what recipes read that no checkpoint holds
    checkpoint  where the weights were read
    """

    def __init__(
        self, config: ModelConfig, options: RunnerConfig, executable: Executable, ledger: Ledger,
        buffers: Mapping[str, Tensor], checkpoint: Path | None = None,
    ) -> None:  # fmt: skip
        self.config, self.checkpoint = config, checkpoint
        self.buffers = buffers
        self.options = options
        self.executable = executable
        self.startup_s = ledger.seconds
        self.kv_spec = KVCacheSpec.of_program(executable.program, options).local(executable.program)
        self._kv, self._memory = KVCache(), StepMemory()
        self._pick: Pick | None = None
        self._run: Callable[..., Any] = executable
        self.all_idle = True  # no rank had tokens in the last step that ranks took together
        self._recordings = self._new_recordings()
        self.weights = WeightUpdates(executable, options, buffers)
        self.adapters = AdapterSlots(executable)
        groups = config.raw.get("n_group") or 1
        self.balancer = None if options.eplb is None else Balancer(executable, options, groups)
        self._sleep = Sleep(executable, options, self._kv, self.weights, self.adapters)
        # On a GPU nothing else may reach the device while a step is captured.
        self._turn: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if torch.device(options.device).type == "cuda":
            self._turn = threading.Lock()

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
                config = ModelConfig.from_directory(Path(path), options.get("hf_overrides"))
                settings = placed(RunnerConfig.for_model(config, **options))
            if torch.device(settings.device).index is not None:
                torch.cuda.set_device(settings.device)  # where kernels are launched
            share_sums(settings)
            program, buffers = load_program(config, settings, ledger)
            with ledger.stage("load weights"):
                weights = load_step_weights(Path(path), settings, program, buffers)
            with ledger.stage("bind"):
                executable = Executable(program, weights)
                if settings.enable_dbo and not executable.takes_turns:
                    raise ValueError("enable_dbo: nothing is begun in this program; do not disable begin_exchanges")
                if settings.pipeline.parallel is not None:
                    said = " ".join(each.said for each in program.ranges)
                    check_alike(said, "the collectives of a step, or their order,")
        return cls(config, settings, executable, ledger, buffers, path)

    @property
    def program(self) -> Program:
        return self.executable.program

    @property
    def block_size(self) -> int:
        return self.options.block_size

    @property
    def kv_groups(self) -> Groups:
        """What each group of layers reads of a request's past; each has a block table in a step."""
        return self.kv_spec.needs(self.options.max_model_len)

    @property
    def num_blocks(self) -> int:
        """Blocks in the KV cache, the null block included; 0 before allocate_kv."""
        return self._kv.num_blocks

    @property
    def kv_caches(self) -> list[list[Tensor]]:
        """Each layer's tensors of the KV cache."""
        return self._kv.layers

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
        self.use_kv(self.kv_spec.allocate(num_blocks, self.options.device), num_blocks)

    def use_kv(self, kv_caches: list[list[Tensor]], num_blocks: int) -> None:
        """Use a KV cache that is there: each layer's tensors, as allocate_kv makes them, of another runner too."""
        self._kv.hold(kv_caches, num_blocks)
        self._recordings.clear()
        if self._pick is not None:
            self.set_sparse_kv(self._pick)

    def set_sparse_kv(self, pick: Pick | None) -> None:
        """Let a function pick the pages of the KV cache that each layer attends to in a step; None: all of them.

        See sparse_kv.py. What the cache holds was computed with what was picked before. Raises ValueError for what it
        does not work with: decode recorded in full, several ranks, windows, ALiBi, MLA.
        """
        if pick is not None:
            check_sparse_kv(self.program, self.options)
        self._pick = pick
        self._run = self.executable
        if pick is not None:
            self._run = self.executable.around(SparseKV(pick, self.kv_caches).around)
        self._recordings.clear()

    @torch.inference_mode()
    def step(self, batch: StepInput) -> StepOutput:
        """Run the model over one ragged batch: write its keys and values to the cache, return the wanted logits.

        A step that cudagraph_mode has recorded is replayed; its recording is made when its size is first seen.
        """
        self._check_ready(batch)
        if self.options.pipeline_parallel_size > 1:
            raise RuntimeError("step: this runner is one stage of several (pipeline_parallel_size); call step_stage")
        parts, own_rows = [batch], [batch.logit_rows.shape[0]]
        if self.options.data_parallel_size > 1:
            parts, own_rows = agree(batch, self.options)
            self.all_idle = not parts[0].num_tokens
            if self.balancer is not None and not self.all_idle:
                self.balancer.between_steps()
        if self.adapters.in_step:
            of_rows = self.adapters.of_rows(batch.adapter_slots, batch.query_starts)
            parts = [replace(batch, token_adapters=of_rows)]
        run = self._run if len(parts) == 1 else self.executable.in_turns
        with self._launching(), self._turn:
            match self._recordings.kind_of(*parts):
                case Eager("empty"):
                    results = self._empty()
                case Eager():
                    with reusing_memory(self._memory.of(sum(part.num_tokens for part in parts))):
                        results = run(*(tensor for part in parts for tensor in self._inputs(part)))
                case key:
                    results = self._recordings.run(key, run, parts, partial(flattened, caches=self._kv.flat))
        given = [logits_and_hidden(each, self.options) for each in (results if len(parts) > 1 else [results])]
        logits, hidden = (_first_rows(each, own_rows) for each in zip(*given, strict=True))
        assert logits is not None
        return StepOutput(
            logits=logits, hidden_states=hidden if batch.hidden_states else None, request_slots=batch.request_slots,
            request_generations=batch.request_generations,
        )  # fmt: skip

    @torch.inference_mode()
    def step_stage(self, batch: StepInput, carried: Sequence[Tensor]) -> Sequence[Tensor]:
        """Run this stage of a step (pipeline_parallel_size) on what the stage before gave, `program.carried`.

        Returns what the next stage takes; of the last one the logits, and hidden states where it was loaded for them.
        """
        self._check_ready(batch)
        with self._launching(), reusing_memory(self._memory.of(batch.num_tokens)):
            results = self.executable(*self._inputs(batch), *carried)
        stage, stages = self.options.pipeline.stage
        if stage + 1 == stages:
            return tuple(part for part in logits_and_hidden(results, self.options) if part is not None)
        return results if isinstance(results, tuple) else (results,)

    def _launching(self) -> contextlib.AbstractContextManager[Any]:
        """Within it kernels may be launched: on this runner's GPU, whose ever the thread is; attention may cascade."""
        if torch.device(self.options.device).type == "cuda":
            return torch.cuda.device_of(self.executable.weights[0])
        return cascade(None if self.options.disable_cascade_attn else self.recording_stats.spared)

    def update_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Write new values of parameters, (the checkpoint's name, tensor) each, in place; recordings stay valid.

        What the KV cache holds was computed with the old ones. What is joined with others (q with k and v) waits for
        them, and no step runs until they are given. See WeightUpdates.write for what is refused.
        """
        self._check_in_place("update_weights")
        if "weights" in self.asleep:
            raise RuntimeError("update_weights: the weights are asleep; call wake(['weights']) first")
        named = named_tensors(weights)
        if self.options.pooler is not None:
            named = without_head(named)
        with self._launching():
            self.weights.write(named.items())

    def start_weight_update(self) -> None:
        """Begin an update in any number of update_weights calls: no step runs until finish_weight_update."""
        self._check_in_place("start_weight_update")
        self.weights.start()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """End an update. Raises RuntimeError that lists what lacks; weight_version is then what it was."""
        self.weights.finish(weight_version)

    def _check_in_place(self, what: str) -> None:
        if self.balancer is not None:
            raise ValueError(
                f"{what}: experts move between ranks (enable_eplb), new weights have no place; leave it out"
            )

    def check_adapter(self, adapter: Adapter) -> None:
        """Raise ValueError that lists all in which an adapter does not fit, or where enable_lora was not asked for."""
        self.adapters.check(adapter)

    def set_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """Put an adapter into slot 1 to max_loras, or empty it, in place; steps name it by StepInput.adapter_slots.

        Raises ValueError for one that does not fit; nothing has changed then.
        """
        if "weights" in self.asleep:
            raise RuntimeError("set_adapter: the weights are asleep; call wake(['weights']) first")
        if adapter is not None:
            self.check_adapter(adapter)
        self.adapters.write(slot, adapter)

    @property
    def num_weight_updates(self) -> int:
        """How often weights were written since the runner was made."""
        return self.weights.updates

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of a block of the KV cache, of all layers that share it."""
        return self.kv_spec.bytes_per_block

    @property
    def kv_layout(self) -> str:
        """What keys and values depend on besides weights and tokens, and how a block holds them: equal text, equal
        bytes."""
        return f"{pack.key_of(pack_parts(self.config, self.options))} {self.kv_spec}"

    def read_kv_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        """Return a copy of the bytes of blocks, (n, kv_block_bytes) uint8, layer after layer.

        Nothing may be written to them meanwhile. May be called beside a step, as write_kv_blocks.
        """
        with self._turn:
            return self._kv.read(blocks)

    def write_kv_blocks(self, blocks: Sequence[int], data: np.ndarray) -> None:
        """Write to blocks what read_kv_blocks gave. No step may touch them meanwhile."""
        with self._turn:
            self._kv.write(blocks, data)

    @property
    def weight_version(self) -> str:
        """Which weights these are: what finish_weight_update was told, else how often they were updated."""
        return self.weights.version

    def weights_digest(self, weights: Iterable[tuple[str, Tensor]] | None = None) -> str:
        """Return a digest of all weights, or of what they would be with these; see WeightUpdates.digest."""
        self._check_in_place("weights_digest")
        return self.weights.digest(weights)

    @property
    def model(self) -> ModelWeights:
        """The weights by vLLM's name of the call that writes them: `runner.model.load_weights([(name, tensor)])`."""
        return ModelWeights(self.update_weights)

    def sleep(self, level: int = 1) -> None:
        """Give the memory of weights and KV cache back to the system; no step runs until both are awake again.

        level  1: weights are kept elsewhere (a CPU's in a file, a GPU's in the machine's memory) and come back;
               2: they are lost, and must be given to update_weights after they woke
        """
        if level == 2:
            self._check_in_place("sleep(2)")
        self._sleep.begin(level)
        self._memory.give_back()
        if not self.kv_caches:  # a GPU's tensors are others when they wake
            self._recordings.clear()

    def wake(self, tags: Iterable[str] | None = None) -> None:
        """Take memory again: of "weights", of "kv_cache", by default of both. The cache holds nothing then."""
        self._sleep.end(tags)
        if "kv_cache" not in self.asleep and not self.kv_caches and self.num_blocks:
            self.allocate_kv(self.num_blocks)

    @property
    def asleep(self) -> frozenset[str]:
        """Which of "weights" and "kv_cache" have no memory now."""
        return frozenset(self._sleep.asleep)

    def _why_not(self) -> str | None:
        if self.balancer is not None and self.balancer.failure:
            return self.balancer.failure
        if self.asleep:
            return f"{' and '.join(t for t in TAGS if t in self.asleep)} asleep; call wake first"
        return self.weights.problem()

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

    def _check_ready(self, batch: StepInput) -> None:
        """Raise RuntimeError where no step may run; ValueError for what it may ask for and this model does not have."""
        if (problem := self._why_not()) is not None:
            raise RuntimeError(f"step: {problem}")
        if not self.kv_caches:
            raise RuntimeError("step: the KV cache is not allocated; call allocate_kv(num_blocks) first")
        batch.check()
        check_plain(batch, max(1, len(self.kv_spec.groups)), self.adapters.max_loras)
        if batch.hidden_states and not (self.options.return_hidden_states or self.options.pooler):
            raise ValueError("the step asks for hidden states; load the runner with return_hidden_states=True")

    def _empty(self) -> Any:
        """Run no tokens: alone, nothing; beside other ranks, a row of padding, for their collectives wait for ours."""
        if self.options.tensor_parallel_size > 1:
            padding = step_of_padding(len(self.kv_groups))
            if self.adapters.in_step:
                padding = replace(padding, token_adapters=self.adapters.of_rows(None, padding.query_starts))
            return self.executable(*self._inputs(padding))
        return no_results(self.options, self.config.vocab_size, self.config.hidden_size)

    def _inputs(self, batch: StepInput) -> list[Tensor]:
        """Return what the program takes of a step, on its device."""
        return flattened(on_device(batch, self.options.device), self._kv.flat)


def _first_rows(results: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor | None:
    """Return the first rows of each batch's results, one behind the other."""
    parts = [part[:count] for part, count in zip(results, counts, strict=True) if part is not None]
    return torch.cat(parts) if len(parts) > 1 else next(iter(parts), None)
