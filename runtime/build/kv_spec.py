"""The paged KV cache's memory: each layer's tensors, planned in bytes before they are allocated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from seamwise.compile.program import CacheGroup, Program
from seamwise.kernels.cpu import huge_pages
from seamwise.model_defs.deepseek_mtp import ARCHITECTURE

from .kv_groups import FULL, Groups, KVGroup
from .model_config import ModelConfig
from .runner_config import RunnerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """What a block of block_size tokens holds; block 0 is the null block, which padding points at.

    layers  of each layer, the shapes of its tensors in one block: (K, P, D) for keys and again for values, or (P, E)
            where one row holds a token's latent and rotary key (MLA)
    groups  of layers, which each have blocks of their own; (): one that keeps all tokens
    """

    layers: tuple[tuple[tuple[int, ...], ...], ...]
    block_size: int
    dtype: torch.dtype
    groups: tuple[CacheGroup, ...] = ()

    @classmethod
    def of(cls, config: ModelConfig, options: RunnerConfig) -> KVCacheSpec:
        """Return what a model built with these options caches: our definitions latents, transformers' classes heads."""
        layer: tuple[tuple[int, ...], ...] = ((config.num_kv_heads, options.block_size, config.head_dim),) * 2
        if config.latent_dim and options.entry == "own":
            layer = ((options.block_size, config.latent_dim),)
        if config.architecture == ARCHITECTURE:
            layer = (*layer, (options.block_size, config.hidden_size))
        return cls(layers=(layer,) * config.num_layers, block_size=options.block_size, dtype=options.kv_cache_dtype)

    @classmethod
    def of_calls(cls, called: Sequence[tuple[int, int]], options: RunnerConfig) -> KVCacheSpec:
        """Return what calls of attention cache, of the heads and the width of each one's keys."""
        layers = tuple(((heads, options.block_size, width),) * 2 for heads, width in called)
        return cls(layers=layers, block_size=options.block_size, dtype=options.kv_cache_dtype)

    @classmethod
    def of_program(cls, program: Program, options: RunnerConfig) -> KVCacheSpec:
        """Return what a compiled model caches."""
        layers = tuple(tuple(tuple(shape) for shape in layer) for layer in program.kv_layers)
        groups = tuple(program.kv_groups)
        return cls(layers=layers, block_size=options.block_size, dtype=options.kv_cache_dtype, groups=groups)

    def local(self, program: Program) -> KVCacheSpec:
        """Return what this rank caches: some of the heads, where ranks share a model."""
        names = (name for name in program.inputs if name.startswith("kv_caches"))

        def cut(shape: tuple[int, ...]) -> tuple[int, ...]:
            dim, start, end = program.local_inputs.get(next(names), (1, 0, shape[0]))
            return (*shape[: dim - 1], end - start, *shape[dim:])

        return replace(self, layers=tuple(tuple(cut(shape) for shape in layer) for layer in self.layers))

    def needs(self, max_model_len: int) -> Groups:
        """Return what each group reads of the past, of requests of so many tokens: a window that holds them is none."""

        def need(group: CacheGroup) -> KVGroup:
            if 0 < group.window < max_model_len:
                return KVGroup(kind="sliding_window", size=group.window)
            if 0 < -group.window < max_model_len:
                return KVGroup(kind="chunked_local", size=-group.window)
            return KVGroup(kind="latent") if group.latent else FULL

        return tuple(map(need, self.groups)) or (FULL,)

    @property
    def bytes_per_token(self) -> int:
        """What a token takes that all layers keep."""
        return self._bytes(self.layers) // self.block_size

    @property
    def bytes_per_block(self) -> int:
        """What a block takes: of all layers, or of one group's."""
        return self._bytes(self._stored)

    @property
    def _stored(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """The layers that have memory of their own: those of the longest group, whose tensors the others share."""
        return self.layers[: max(len(group.layers) for group in self.groups)] if self.groups else self.layers

    def _bytes(self, layers: tuple[tuple[tuple[int, ...], ...], ...]) -> int:
        return sum(math.prod(shape) for layer in layers for shape in layer) * self.dtype.itemsize

    def blocks_within(self, budget_bytes: int) -> int:
        """Return how many blocks fit in a budget. Raises ValueError when not even one besides the null block does."""
        blocks = budget_bytes // self.bytes_per_block
        if blocks < 2:
            raise ValueError(
                f"KV cache: a budget of {budget_bytes} bytes holds {blocks} blocks of {self.bytes_per_block} bytes,"
                " wanted at least 2; raise the memory budget or lower block_size"
            )
        return blocks

    def allocate(self, num_blocks: int, device: str) -> list[list[Tensor]]:
        """Allocate each layer's zeroed tensors: (num_blocks, *shape of its block). Groups share them, not their blocks.

        On a CPU a block's memory is one stretch for all layers, in huge pages: few pages hold what a step reads, and
        those that no request reaches are never backed.
        """
        if torch.device(device).type != "cpu":
            made = [
                [torch.zeros(num_blocks, *shape, dtype=self.dtype, device=device) for shape in layer]
                for layer in self._stored
            ]
        else:
            memory = huge_pages.empty((num_blocks, self.bytes_per_block // self.dtype.itemsize), self.dtype)
            parts = iter(memory.split([math.prod(shape) for layer in self._stored for shape in layer], dim=1))
            made = [[next(parts).unflatten(1, shape) for shape in layer] for layer in self._stored]
        places = {layer: made[i] for group in self.groups for i, layer in enumerate(group.layers)}
        return [places[layer] for layer in range(len(self.layers))] if self.groups else made
