"""What a runner takes of memory, byte by byte, before it is allocated: from the compiled program and its options."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seamwise.compile.program import Program
from seamwise.runtime.build.kv_groups import blocks_of, most_tokens
from seamwise.runtime.build.kv_spec import KVCacheSpec
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.weights import machine_memory

from .recordings import CapturePlan

_CPU_SHARE = 4  # the KV cache takes at most one part in so many of a CPU's memory, unless told otherwise


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Bytes of one rank.

    weight_bytes, derived_bytes  of weights as the checkpoint has them, and of those packed, joined or quantized from it
    buffer_bytes      of computed tables
    activation_bytes  of memory that the largest step's values take turns in, outside the kernels
    recording_bytes   of the recordings' memory and their input buffers
    pooling_bytes     of what is pooled of texts under way, on a CPU (beside a GPU it is the host's)
    kv_bytes          of the KV cache: num_blocks blocks
    budget_bytes      what all of it was to fit in
    max_model_len     longest request in tokens: what was asked for, or what num_blocks holds
    """

    weight_bytes: int
    derived_bytes: int
    buffer_bytes: int
    activation_bytes: int
    recording_bytes: int
    pooling_bytes: int
    kv_bytes: int
    num_blocks: int
    budget_bytes: int
    max_model_len: int

    @property
    def total_bytes(self) -> int:
        return (
            self.weight_bytes + self.derived_bytes + self.buffer_bytes + self.activation_bytes + self.recording_bytes
            + self.pooling_bytes + self.kv_bytes
        )  # fmt: skip

    def __str__(self) -> str:
        rows = {
            "weights": self.weight_bytes, "derived weights": self.derived_bytes, "buffers": self.buffer_bytes,
            "largest step": self.activation_bytes, "recordings": self.recording_bytes,
            "pooled states": self.pooling_bytes, "KV cache": self.kv_bytes,
            "in all": self.total_bytes, "budget": self.budget_bytes,
        }  # fmt: skip
        lines = [f"    {name:16} {size / 1e6:12.1f} MB" for name, size in rows.items()]
        return "\n".join([f"memory ({self.num_blocks} KV blocks, max_model_len {self.max_model_len}):", *lines])


def plan_memory(
    program: Program, options: RunnerConfig, spec: KVCacheSpec, buffer_bytes: int, derived_bytes: int, *,
    budget: int | None = None, kv_cache_memory_bytes: int | None = None, held_bytes: int = 0,
    utilization: float = 0.9, max_num_seqs: int = 256, max_num_batched_tokens: int = 2048, fit_model_len: bool = False,
) -> MemoryPlan:  # fmt: skip
    """Return what a compiled model takes, its KV cache being what is left of a budget.

    budget        bytes for everything; default: `utilization` of the device's memory (of a container's share), without
                  what others have taken; on a CPU the cache is then at most a quarter of it
    kv_cache_memory_bytes  of the cache, in place of what is left
    held_bytes    of what is planned here, allocated already
    max_num_seqs, max_num_batched_tokens  the most requests, and tokens, of a step: the cache is no larger than these
                  requests can fill, unless kv_cache_memory_bytes says so
    fit_model_len  lower max_model_len to what the cache holds

    Raises ValueError with the whole plan where the budget does not hold it, or the cache not one request.
    """
    recordings = CapturePlan.of(program, options).total_bytes
    rows, pooler = min(max_num_seqs, max_num_batched_tokens), options.pooler
    kept = pooler is not None and pooler.kind != "LAST" and torch.device(options.device).type == "cpu"
    if options.return_hidden_states or (pooler is not None and pooler.kind == "MEAN"):
        rows = max_num_batched_tokens  # every state is wanted
    fixed = {
        "weight_bytes": program.weight_bytes - derived_bytes, "derived_bytes": derived_bytes,
        "buffer_bytes": buffer_bytes, "recording_bytes": recordings,
        "pooling_bytes": 2 * max_num_seqs * pooler.size * 8 if kept and pooler else 0,  # float64, two slots a sequence
        "activation_bytes": program.token_bytes * max_num_batched_tokens + program.logit_bytes * rows,
    }  # fmt: skip
    needed = sum(fixed.values())
    groups, chunk = spec.needs(options.max_model_len), max_num_batched_tokens
    of_request = blocks_of(groups, spec.block_size, options.max_model_len, chunk)
    longest = of_request + 1  # the null block stands beside a request's
    if kv_cache_memory_bytes is not None:
        blocks, budget = spec.blocks_within(kv_cache_memory_bytes), needed + kv_cache_memory_bytes
    else:
        chosen, budget = budget, _budget(options.device, utilization, held_bytes) if budget is None else budget
        left = budget - needed
        if chosen is None and torch.device(options.device).type == "cpu":
            left = min(left, machine_memory.total_bytes() // (_CPU_SHARE * options.num_ranks))
        blocks = min(max_num_seqs * of_request + 1, left // spec.bytes_per_block)
    length = options.max_model_len
    if fit_model_len and 2 <= blocks < longest:
        length = most_tokens(groups, spec.block_size, blocks - 1, chunk, length)
    plan = MemoryPlan(
        **fixed, kv_bytes=max(blocks, 0) * spec.bytes_per_block, num_blocks=blocks, budget_bytes=budget,
        max_model_len=length,
    )  # fmt: skip
    if blocks < min(longest, 1 + len(groups) if fit_model_len else longest):
        raise ValueError(
            f"the KV cache would have {max(blocks, 0)} blocks of {spec.block_size} tokens, one request of"
            f" max_model_len={options.max_model_len} needs {longest}; lower max_model_len (or 'auto'),"
            f" max_num_batched_tokens or max_num_seqs, or give it more memory\n{plan}"
        )
    return plan


def _budget(device: str, utilization: float, held_bytes: int) -> int:
    """Return the part of a device's memory that is ours: what is free and what we hold, a margin apart."""
    total, free = machine_memory.total_bytes(device), machine_memory.free_bytes(device)
    return int(free + held_bytes - (1 - utilization) * total)
