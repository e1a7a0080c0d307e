"""The four fixed workloads by which Seamwise is compared with its peers: seeded token ids, greedy, fixed lengths.

single   one request, 128 prompt tokens, 128 output tokens: decode rate and time to first token
batch    32 requests of 128 + 128 tokens at once: output tokens a second
prefill  8 prompts of 512 tokens, 1 output token each: prompt tokens a second
prefix   16 prompts of 448 shared + 64 own tokens, 32 output tokens: output tokens a second
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`num_requests` prompts of `shared_tokens` equal and `own_tokens` different ids, `output_tokens` each."""

    name: str
    num_requests: int
    shared_tokens: int
    own_tokens: int
    output_tokens: int

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """Draw the prompts. Ids below 100 are left out: special tokens live there in most vocabularies."""
        draw = np.random.default_rng(seed)
        low = min(100, vocab_size - 1)
        shared = draw.integers(low, vocab_size, self.shared_tokens).tolist()
        return [shared + draw.integers(low, vocab_size, self.own_tokens).tolist() for _ in range(self.num_requests)]

    def job(self, vocab_size: int, runs: int) -> dict[str, Any]:
        """Return what a process of engine_process.py is told of it: each run with prompts of its own."""
        return {"tokens": self.output_tokens, "prompts": [self.prompts(vocab_size, seed) for seed in range(runs)]}


WORKLOADS = {
    w.name: w
    for w in (
        Workload(name="single", num_requests=1, shared_tokens=0, own_tokens=128, output_tokens=128),
        Workload(name="batch", num_requests=32, shared_tokens=0, own_tokens=128, output_tokens=128),
        Workload(name="prefill", num_requests=8, shared_tokens=0, own_tokens=512, output_tokens=1),
        Workload(name="prefix", num_requests=16, shared_tokens=448, own_tokens=64, output_tokens=32),
    )
}
