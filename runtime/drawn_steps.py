"""Small drawn steps on which a model's graph is run to validate or compare it: one token, decode, ragged prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .config import ModelConfig
from .kv_cache import KVCacheSpec
from .step import STEP_ARGUMENTS

# Requests of each case, as (tokens already in the cache, tokens of this step).
CASES: Mapping[str, Sequence[tuple[int, int]]] = {
    "one token": [(0, 1)],
    "decode of 3 requests": [(5, 1), (0, 1), (17, 1)],
    "7 tokens of 3 requests": [(0, 4), (9, 1), (2, 2)],
}


def draw_steps(config: ModelConfig, spec: KVCacheSpec, seed: int = 0) -> dict[str, list[Tensor]]:
    """Return the flattened step inputs of each case, on the CPU, with caches of random numbers."""
    return {
        case: _flat(config, requests, spec, torch.Generator().manual_seed(seed)) for case, requests in CASES.items()
    }


def _flat(
    config: ModelConfig, requests: Sequence[tuple[int, int]], spec: KVCacheSpec, generator: torch.Generator
) -> list[Tensor]:
    size = spec.block_size
    lengths = [known + new for known, new in requests]
    owned = [-(-n // size) for n in lengths]
    blocks = (torch.randperm(sum(owned), generator=generator) + 1).split(owned)
    table = torch.zeros(len(requests), max(owned), dtype=torch.int32)
    positions, slots = [], []
    for r, (known, new) in enumerate(requests):
        table[r, : owned[r]] = blocks[r]
        position = torch.arange(known, known + new)
        positions.append(position)
        slots.append(blocks[r][position // size] * size + position % size)
    starts = torch.tensor([0, *(new for _, new in requests)]).cumsum(0)
    tokens = int(starts[-1])
    shapes = [(sum(owned) + 1, *shape) for layer in spec.layers for shape in layer]
    values: dict[str, list[Tensor]] = {
        "token_ids": [torch.randint(config.vocab_size, (tokens,), generator=generator)],
        "positions": [torch.cat(positions)],
        "kv_caches": [torch.randn(shape, generator=generator).to(spec.dtype) for shape in shapes],
        "slot_mapping": [torch.cat(slots)],
        "block_table": [table],
        "seq_lens": [torch.tensor(lengths, dtype=torch.int32)],
        "query_starts": [starts.to(torch.int32)],
        "logit_rows": [starts[1:] - 1],
    }
    return [tensor for name in STEP_ARGUMENTS for tensor in values[name]]
