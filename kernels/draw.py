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
