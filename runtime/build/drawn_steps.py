"""Small drawn steps on which a model's graph is run to validate or compare it: one token, decode, ragged prefill."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .kv_spec import KVCacheSpec
from .model_config import ModelConfig
from .step import flattened, ragged_step

# Requests of each case, as (tokens already in the cache, tokens of this step).
CASES: Mapping[str, Sequence[tuple[int, int]]] = {
    "one token": [(0, 1)],
    "decode of 3 requests": [(5, 1), (0, 1), (17, 1)],
    "7 tokens of 3 requests": [(0, 4), (9, 1), (2, 2)],
}


def draw_steps(
    config: ModelConfig, spec: KVCacheSpec, seed: int = 0, adapters: bool = False
) -> dict[str, list[Tensor]]:
    """Return the flattened step inputs of each case, on the CPU, with caches of random numbers.

    adapters  the step has an input for them: no row has one, as a graph without them computes
    """
    return {
        case: _flat(config, requests, spec, torch.Generator().manual_seed(seed), adapters)
        for case, requests in CASES.items()
    }


def _flat(
    config: ModelConfig, requests: Sequence[tuple[int, int]], spec: KVCacheSpec, generator: torch.Generator,
    adapters: bool,
) -> list[Tensor]:  # fmt: skip
    known, new = np.array(requests).T
    owned = -(-(known + new) // spec.block_size)
    blocks = (torch.randperm(int(owned.sum()), generator=generator) + 1).split(owned.tolist())
    table = torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True).int().numpy()
    token_ids = torch.randint(config.vocab_size, (int(new.sum()),), generator=generator).numpy()
    step = ragged_step(
        token_ids, np.stack([table] * max(1, len(spec.groups))), known, new, spec.block_size,
        token_adapters=torch.full((len(token_ids),), -1, dtype=torch.int32) if adapters else None,
    )  # fmt: skip
    shapes = [(int(owned.sum()) + 1, *shape) for layer in spec.layers for shape in layer]
    caches = [torch.randn(shape, generator=generator).to(spec.dtype) for shape in shapes]
    return flattened(step, caches)
