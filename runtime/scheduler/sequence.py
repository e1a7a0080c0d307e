"""One sequence on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from seamwise.runtime.kv.pool import ROOT, BlockName, name_after
from seamwise.runtime.sampling.params import SamplingParams


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """Tokens known and tokens computed; there are no phases, only the difference between the two.

    tokens        (capacity,) int64: prompt, then output
    num_tokens    how many of them are known
    num_computed  how many have their keys and values in the cache
    blocks        the cache blocks it holds, in order; table (capacity in blocks,) int32 starts with the same
    names         names of its full blocks of known tokens, as far as they were needed, for prefix caching
    num_named     how many of the blocks it holds were given to the cache under their names
    stop_ids      EOS ids that end it (none with ignore_eos)
    seed          of its draws
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
    table: np.ndarray = field(init=False)
    names: list[BlockName] = field(default_factory=list)
    num_named: int = 0
    seed: int = 0
    stop_ids: tuple[int, ...] = ()
    plain: bool = field(init=False)

    def __post_init__(self) -> None:
        p = self.params
        self.plain = p.greedy and not (p.has_penalties or p.logit_bias or p.min_tokens) and p.logprobs is None
        self.table = np.empty(0, dtype=np.int32)
        self.check()

    def check(self) -> None:
        """Assert what always holds between steps."""
        assert 0 < self.num_prompt <= self.num_tokens <= len(self.tokens)
        assert 0 <= self.num_computed <= self.num_tokens
        assert self.num_named <= len(self.blocks)
        assert self.table[: len(self.blocks)].tolist() == self.blocks

    @property
    def num_pending(self) -> int:
        """Known tokens whose keys and values are not computed yet."""
        return self.num_tokens - self.num_computed

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.num_prompt : self.num_tokens].tolist()

    def hold(self, blocks: list[int]) -> None:
        """Take hold of further blocks."""
        start, end = len(self.blocks), len(self.blocks) + len(blocks)
        if end > len(self.table):
            self.table = np.resize(self.table, max(end, 2 * len(self.table)))
        self.table[start:end] = blocks
        self.blocks += blocks

    def let_go(self) -> list[int]:
        """Start over: forget what is computed, and return the blocks that were held."""
        held, self.blocks = self.blocks, []
        self.num_computed = self.num_named = 0
        return held

    def names_of_full_blocks(self, num_tokens: int, block_size: int) -> list[BlockName]:
        """Return the names of the blocks that the first `num_tokens` tokens fill; each is computed once."""
        count = num_tokens // block_size
        while len(self.names) < count:
            start = len(self.names) * block_size
            parent = self.names[-1] if self.names else ROOT
            self.names.append(name_after(parent, self.tokens[start : start + block_size]))
        return self.names[:count]

    def append(self, token: int) -> None:
        self.tokens[self.num_tokens] = token
        self.num_tokens += 1
