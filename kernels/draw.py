"""The random tensors that tests and benchmarks call ops with, reproducible from one seed."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Draw:
    """Tensors of one seed on one device; `dtype` is the float type that the op is asked to work in."""

    dtype: torch.dtype
    device: str
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator(self.device).manual_seed(self.seed))

    def __call__(self, *shape: int) -> Tensor:
        """Draw from the standard normal distribution, in the dtype asked for."""
        return self.normal(*shape).to(self.dtype)

    def normal(self, *shape: int) -> Tensor:
        """Draw from the standard normal distribution, in float32."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Draw from [0, 1), in float32."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Draw from low to high - 1."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device, dtype=dtype)

    def permutation(self, count: int) -> Tensor:
        """Draw an order of 0 to count - 1."""
        return torch.randperm(count, generator=self.generator, device=self.device)

    def batch(self, requests: int, queries: int, context: int, block_size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw an attention step's (block_table, seq_lens, query_starts), over shuffled blocks from 1 on.

        Requests have context, context + 1, … tokens before their queries.
        """
        lengths = [context + r + queries for r in range(requests)]
        owned = [-(-n // block_size) for n in lengths]
        table_RB = torch.zeros(requests, max(owned), dtype=torch.int32, device=self.device)
        for r, blocks in enumerate((self.permutation(sum(owned)) + 1).split(owned)):
            table_RB[r, : owned[r]] = blocks
        starts_S = torch.arange(0, (requests + 1) * queries, queries, dtype=torch.int32, device=self.device)
        return table_RB, torch.tensor(lengths, dtype=torch.int32, device=self.device), starts_S

    def slots(self, tokens: int, block_size: int) -> tuple[int, Tensor]:
        """Draw (blocks of a cache, different slots of it for the tokens), some of which are -1."""
        blocks = -(-tokens // block_size) + 2
        slots_T = self.permutation(blocks * block_size)[:tokens]
        slots_T[1::4] = -1
        return blocks, slots_T
