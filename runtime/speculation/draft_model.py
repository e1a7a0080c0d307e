"""Guess with a smaller model of the same vocabulary, which has a KV cache of its own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from seamwise.runtime.runner.runner import ModelRunner

from .drafter import Known
from .model_drafter import ModelDrafter, Place


@dataclass(slots=True)
class _Held:
    """What the cache has of a sequence: blocks, and the tokens whose keys are in them, guesses too."""

    owner: tuple[int, int]
    blocks: list[int]
    tokens: np.ndarray


class DraftModel(ModelDrafter):
    """A ModelDrafter. Blocks stay with a slot of the scheduler's until another sequence runs there or they are needed.

    What is there of a sequence is compared with its tokens, so guesses that fell are computed anew, and nothing else.
    """

    def __init__(self, runner: ModelRunner, budget: int) -> None:
        super().__init__(runner, budget)
        self.bytes_per_block = runner.kv_spec.bytes_per_block
        self.free: list[int] = []
        self.held: dict[int, _Held] = {}  # by slot, the one that was used longest ago first

    def allocate(self, num_blocks: int) -> None:
        self.runner.allocate_kv(num_blocks)
        self._forget()

    def sleep(self) -> None:
        self.runner.sleep(1)  # a trainer gives the model new weights, not this one

    def wake(self, tags: Iterable[str] | None) -> None:
        self.runner.wake(tags)
        self._forget()

    def most(self, one: Known) -> int:
        return min(one.most, self.runner.options.max_model_len - len(one.tokens) + 1)

    def places(self, known: Sequence[Known]) -> list[Place]:
        asked = {one.owner[0] for one in known}
        return [
            Place(index, self._table(held), held.tokens.shape[0])
            for index, one in enumerate(known)
            if self.most(one) > 0 and (held := self._holding(one, asked)) is not None
        ]

    def propose(self, known: Sequence[Known]) -> list[list[int]]:
        guesses = super().propose(known)
        for one, guess in zip(known, guesses, strict=True):
            if guess:  # the last one is not computed
                given = np.array(guess[:-1], dtype=np.int32)
                self.held[one.owner[0]].tokens = np.concatenate((one.tokens, given))
        return guesses

    def _holding(self, one: Known, asked: set[int]) -> _Held | None:
        """Return what is held of a sequence, with blocks for its guesses too; None when there are not enough."""
        slot = one.owner[0]
        held = self.held.pop(slot, None)
        if held is not None and held.owner != one.owner:
            self.free += held.blocks
            held = None
        held = held or _Held(one.owner, [], one.tokens[:0])
        self.held[slot] = held
        missing = -(-(len(one.tokens) + self.most(one) - 1) // self.runner.block_size) - len(held.blocks)
        for other in [s for s in self.held if s not in asked]:
            if len(self.free) >= missing:
                break
            self.free += self.held.pop(other).blocks
        if len(self.free) < missing:
            return None
        held.blocks += [self.free.pop() for _ in range(missing)]
        last = min(len(held.tokens), len(one.tokens) - 1)
        same = held.tokens[:last] == one.tokens[:last]
        held.tokens = held.tokens[: last if same.all() else int(same.argmin())]
        return held

    def _table(self, held: _Held) -> np.ndarray:
        table = np.zeros((1, -(-self.runner.options.max_model_len // self.runner.block_size)), dtype=np.int32)
        table[0, : len(held.blocks)] = held.blocks
        return table

    def _forget(self) -> None:
        self.held, self.free = {}, list(range(self.runner.num_blocks - 1, 0, -1))
