"""A runner without a model: its logits are a hash of the token history, read through the block table.

Its cache holds token ids where a model's holds keys and values, so a wrong block, slot, position or length changes
what it answers, and reading what was never written fails.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch

from seamwise.runtime.build.kv_groups import FULL, Groups
from seamwise.runtime.build.step import StepInput, StepOutput, check_plain
from seamwise.runtime.weights.read_adapter import Adapter

_UNWRITTEN = -1


def adapted(digest: str) -> int:
    """Return what is added to tokens that are computed with an adapter of this digest; "": none."""
    return zlib.crc32(digest.encode()) << 16 if digest else 0


class FakeRunner:
    """Deterministic logits of a request's history alone; `fail_at` are the steps that raise, half done.

    weights  counts the weights that there have been: reading what was written under other ones fails
    """

    def __init__(
        self, *, num_blocks: int, block_size: int, vocab_size: int = 24, max_model_len: int = 512,
        eos_ids: tuple[int, ...] = (2,), max_tokens: int | None = None, fail_at: frozenset[int] = frozenset(),
        sharpness: float = 2.0, kv_groups: Groups = (FULL,), max_loras: int = 0,
    ) -> None:  # fmt: skip
        self.kv_groups = kv_groups
        self.num_blocks, self.block_size = num_blocks, block_size
        self.options = SimpleNamespace(max_model_len=max_model_len, device="cpu")
        self.config = SimpleNamespace(vocab_size=vocab_size, eos_ids=eos_ids)
        self.startup_s = {"fake": 0.0}
        self.cache = np.full((num_blocks, block_size), _UNWRITTEN, dtype=np.int64)
        self.max_tokens, self.fail_at, self.sharpness = max_tokens, fail_at, sharpness
        self.weights = 0
        self.written_by = np.zeros_like(self.cache)
        self.adapters: dict[int, str] = dict.fromkeys(range(1, max_loras + 1), "")
        self.num_steps = 0
        self.num_computed = 0

    def step(self, batch: StepInput) -> StepOutput:
        """Return the logits of the wanted rows. Asserts that the step is what an engine may give."""
        batch.check()
        check_plain(batch, len(self.kv_groups), len(self.adapters))
        self.num_steps += 1
        starts, lengths = batch.query_starts.numpy(), batch.seq_lens.numpy()
        tokens = batch.token_ids.numpy() + self._adapted(batch, np.diff(starts))
        stored = [(slots.numpy(), table.numpy()) for slots, table in batch.groups]
        slots = np.concatenate([slots for slots, _ in stored])
        assert len(tokens) == starts[-1] and (np.diff(starts) > 0).all()
        assert self.max_tokens is None or len(tokens) <= self.max_tokens, "the step is over the token budget"
        assert len(set(slots.tolist())) == len(slots), "two tokens of a step are written to one slot"
        assert (slots >= self.block_size).all(), "the null block is written"
        self.num_computed += len(tokens)
        self.written_by.reshape(-1)[slots] = self.weights
        half = len(tokens) // 2 if self.num_steps in self.fail_at else len(tokens)
        for slots, _ in stored:
            self.cache.reshape(-1)[slots[:half]] = tokens[:half]
            if half < len(tokens):
                self.cache.reshape(-1)[slots[half:]] = 1  # what a failed step leaves behind is not what was asked for
        if self.num_steps in self.fail_at:
            raise RuntimeError("the fake runner fails here, as told")
        positions = batch.positions.numpy()
        logits = []
        for row in batch.logit_rows.tolist():
            r = int(np.searchsorted(starts, row, side="right")) - 1
            query = row - int(starts[r])
            position = int(lengths[r]) - int(starts[r + 1] - starts[r]) + query
            assert positions[row] == position, "positions and lengths disagree"
            seen: list[int] = []
            for group, (_, table) in zip(self.kv_groups, stored, strict=True):
                needed = slice(int(group.first_needed(position)), position + 1)
                history = self.cache[table[r]].reshape(-1)[needed]
                assert (history != _UNWRITTEN).all(), "unwritten cache is read"
                written_by = self.written_by[table[r]].reshape(-1)[needed]
                assert (written_by == self.weights).all(), "what other weights computed is read"
                seen += history.tolist()
            logits.append(self._logits_of(seen))
        stacked = np.array(logits, dtype=np.float32).reshape(len(logits), self.config.vocab_size)
        return StepOutput(
            logits=torch.from_numpy(stacked), request_slots=batch.request_slots,
            request_generations=batch.request_generations,
        )  # fmt: skip

    @property
    def num_weight_updates(self) -> int:
        """How often the weights were changed."""
        return self.weights

    def weights_digest(self) -> str:
        """Return what names the weights."""
        return f"weights {self.weights}"

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of a block: what it holds, and which weights wrote it."""
        return 2 * self.cache[0].nbytes

    @property
    def kv_layout(self) -> str:
        """What these bytes are."""
        return f"fake {self.block_size} {self.kv_groups}"

    def read_kv_blocks(self, blocks: Sequence[int]) -> np.ndarray:
        """Return the bytes of blocks, (n, kv_block_bytes) uint8."""
        return np.concatenate([self.cache[[*blocks]], self.written_by[[*blocks]]], axis=1).view(np.uint8)

    def write_kv_blocks(self, blocks: Sequence[int], data: np.ndarray) -> None:
        """Write what read_kv_blocks gave."""
        self.cache[[*blocks]], self.written_by[[*blocks]] = np.split(data.view(np.int64), 2, axis=1)

    def check_adapter(self, adapter: Adapter) -> None:
        """Take any adapter: its digest is all that is used of it."""

    def set_adapter(self, slot: int, adapter: Adapter | None) -> None:
        """Put an adapter into a slot, or empty it."""
        assert slot in self.adapters
        self.adapters[slot] = "" if adapter is None else adapter.digest

    def _adapted(self, batch: StepInput, counts: np.ndarray) -> np.ndarray:
        """Return what an adapter makes of its rows' tokens: other ones, told apart by its digest."""
        if batch.adapter_slots is None:
            return np.zeros(int(counts.sum()), dtype=np.int64)
        digests = [self.adapters[slot] if slot else "" for slot in batch.adapter_slots.tolist()]
        assert all(d or not s for d, s in zip(digests, batch.adapter_slots.tolist(), strict=True)), "the slot is empty"
        return np.repeat([adapted(digest) for digest in digests], counts)

    def logits_after(self, history: list[int]) -> np.ndarray:
        """Return the logits after a history, of which each group sees a part: what all machinery must come down to."""
        position = len(history) - 1
        return self._logits_of([t for g in self.kv_groups for t in history[int(g.first_needed(position)) :]])

    def _logits_of(self, seen: list[int]) -> np.ndarray:
        state = 1469598103934665603
        for token in seen:
            state = (state ^ (token + 1)) * 1099511628211 % (1 << 64)
        return np.random.Generator(np.random.Philox(state)).standard_normal(self.config.vocab_size) * self.sharpness
