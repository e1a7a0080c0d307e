"""The speeds of rotary position embedding, read from a configuration.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; the Llama 3 scaling as transformers computes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hf_config import Reader


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """theta, and for Llama 3's longer contexts its factor, low and high frequency factors and original length."""

    theta: float
    llama3: tuple[float, float, float, float] | None = None

    @classmethod
    def from_hf(cls, read: Reader) -> Rope:
        """Read what transformers 5 keeps in rope_parameters and transformers 4 in rope_theta and rope_scaling.

        Raises ValueError naming a kind of RoPE that is not served.
        """
        found: dict[str, Any] = {}
        for name in ("rope_scaling", "rope_parameters"):
            part = read.raw.get(name) or {}
            if not isinstance(part, Mapping):
                raise ValueError(f"{read.where}: {name} is {part!r}, wanted an object")
            found |= part
        for name in ("rope_theta", "partial_rotary_factor"):
            found.setdefault(name, read.raw.get(name))
        found.setdefault("rope_type", found.get("type"))
        found.setdefault("original_max_position_embeddings", read.raw.get("max_position_embeddings"))
        rope = Reader(found, f"{read.where}: rope")
        kind = rope.choice("rope_type", ("default", "llama3"), "default")
        if (part := rope.positive("partial_rotary_factor", 1.0)) != 1.0:
            raise ValueError(f"{rope.where}: partial_rotary_factor is {part}, wanted 1 (rotation of whole heads)")
        theta = rope.positive("rope_theta", 10000.0)
        if kind == "default":
            return cls(theta=theta)
        low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
        if low >= high:
            raise ValueError(f"{rope.where}: low_freq_factor {low} is not below high_freq_factor {high}")
        original = rope.positive("original_max_position_embeddings")
        return cls(theta=theta, llama3=(rope.positive("factor"), low, high, original))

    def speeds(self, E: int) -> Tensor:
        """Return the E/2 speeds in radians a position: float32, on the CPU also where modules are built on meta.

        In float32 step by step, as transformers does: at position 8000 one ulp of a speed is already 5e-4 radians.
        """
        if E % 2:
            raise ValueError(f"rope: head_dim is {E}, wanted an even number (halves are rotated against each other)")
        speeds = 1.0 / (self.theta ** (torch.arange(0, E, 2, dtype=torch.float32, device="cpu") / E))
        if self.llama3 is None:
            return speeds
        factor, low, high, original = self.llama3
        turns = original / (2 * math.pi / speeds)  # rotations within the original context
        kept = (turns - low) / (high - low)
        between = (1 - kept) * speeds / factor + kept * speeds
        return torch.where(turns < low, speeds / factor, torch.where(turns > high, speeds, between))
