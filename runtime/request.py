"""One sequence on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from .kv_blocks import ROOT, BlockName
from .sampling_params import SamplingParams


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Tokens known and tokens computed; there are no phases, only the difference between the two.

    tokens        (capacity,) int64: prompt, then output
    num_tokens    how many of them are known
    num_computed  how many have their keys and values in the cache
    blocks        the cache blocks it holds, in order
    stop_ids      EOS ids that end it (none with ignore_eos)
    seed          of its draws
    last_name     name of its last full block, for prefix caching; num_named counts its named blocks
    plain         its next token is the argmax of its logits and nothing else is asked of them
    """

    id: str
    tokens: np.ndarray
    num_tokens: int
    num_prompt: int
    params: SamplingParams
    max_tokens: int
    arrival: int
    num_computed: int = 0
    num_cached: int = 0
    num_preemptions: int = 0
    blocks: list[int] = field(default_factory=list)
    last_name: BlockName = ROOT
    num_named: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        p = self.params
        self.plain = p.greedy and not (p.has_penalties or p.logit_bias or p.min_tokens) and p.logprobs is None
        self.check()

    def check(self) -> None:
        """Assert what always holds between steps."""
        assert 0 < self.num_prompt <= self.num_tokens <= len(self.tokens)
        assert 0 <= self.num_computed <= self.num_tokens
        assert self.num_named <= len(self.blocks)

    @property
    def num_pending(self) -> int:
        """Known tokens whose keys and values are not computed yet."""
        return self.num_tokens - self.num_computed

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt : self.num_tokens].tolist()

    def append(self, token: int) -> None:
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1
