"""One sequence on its way through the scheduler."""

from __future__ import annotations

from collections.abc import Sequence as Series
from dataclasses import dataclass, field
from itertools import zip_longest

import numpy as np

from seamwise.runtime.kv.names import ROOT, BlockName, ImageSpan, images_within, name_after

NO_LIMIT = 1 << 30  # tokens of a chunk


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """What the host knows of a sequence; its counters while it runs are in its slot.

    prompt      (P,) int32
    output      sampled tokens of committed steps: nothing takes one back
    max_tokens  greatest length of output
    arrival     unique; the earlier goes first where a policy sees no difference
    root        name that its first block's follows from; images among the prompt's tokens
    names_ahead tokens behind a block on which its contents depend too: it has a name only when they are known
    priority, tenant, predicted  read by policies: the lower priority goes first; index of whom it is charged to;
                expected length of output
    max_chunk   tokens of it that a step computes at most
    reads_cache False: all of its tokens are computed
    blocked     why it cannot be scheduled now, None when it can
    slot, place where it runs, where it waits; -1 when it does not
    blocks      cache blocks it holds, in order, of each group of layers; 0 where what they held is needed no more.
                The first num_promised have been promised, the first num_published published
    num_cached  tokens found in the cache when it first started
    num_loaded  tokens that tiers behind the cache gave it before it started; asks_tiers: they may be asked
    publishes   False: its keys and values are of weights that are no more, so nobody else may find them
    done        no step will be planned for it again
    """

    id: str
    prompt: np.ndarray
    max_tokens: int
    arrival: int
    root: BlockName = ROOT
    images: Series[ImageSpan] = ()
    names_ahead: int = 0
    priority: int = 0
    tenant: int = 0
    predicted: float = 0.0
    max_chunk: int = NO_LIMIT
    reads_cache: bool = True
    blocked: str | None = None
    arrived_clock: int = 0
    output: list[int] = field(default_factory=list)
    slot: int = -1
    place: int = -1
    blocks: list[list[int]] = field(default_factory=list)
    names: list[BlockName] = field(default_factory=list)
    num_promised: int = 0
    num_published: int = 0
    num_cached: int | None = None
    num_loaded: int = 0
    asks_tiers: bool = True
    num_preemptions: int = 0
    charged: bool = False
    publishes: bool = True
    done: bool = False

    @property
    def num_known(self) -> int:
        """Tokens of committed steps."""
        return len(self.prompt) + len(self.output)

    @property
    def held_blocks(self) -> list[int]:
        """The blocks of all groups, those of the first tokens first."""
        return [block for at_index in zip_longest(*self.blocks, fillvalue=0) for block in at_index if block]

    @property
    def tokens(self) -> np.ndarray:
        """All of them, (num_known,) int32."""
        return np.concatenate([self.prompt, np.array(self.output, dtype=np.int32)])

    def names_of_full_blocks(self, num_tokens: int, block_size: int) -> list[BlockName]:
        """Return the names of the blocks that the first `num_tokens` known tokens fill, as far as they can have one."""
        count = min(num_tokens, self.num_known - self.names_ahead) // block_size
        if len(self.names) < count:
            start = len(self.names) * block_size
            tokens = self.tokens[start:] if start < len(self.prompt) else self._tail(start)
            for first in range(start, count * block_size, block_size):
                parent = self.names[-1] if self.names else self.root
                length = block_size + self.names_ahead
                images = images_within(self.images, first, first + length) if self.images else b""
                self.names.append(name_after(parent, tokens[first - start : first - start + length], images))
        return self.names[: max(count, 0)]

    def _tail(self, start: int) -> np.ndarray:
        return np.array(self.output[start - len(self.prompt) :], dtype=np.int32)

    def rename(self, root: BlockName) -> None:
        """Begin names anew from another root; what the sequence holds by now belongs to none."""
        self.root, self.names = root, []
        self.publishes = not self.blocks

    def let_go(self) -> list[int]:
        """Start over: return the blocks that were held, the first tokens' first."""
        held, self.blocks = self.held_blocks, []
        self.num_promised = self.num_published = 0
        self.num_loaded, self.asks_tiers, self.publishes = 0, True, True
        return held
