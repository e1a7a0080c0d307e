"""Turn a committed plan into a step's ragged tensors, with no Python work in proportion to tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from seamwise.runtime.build.step import StepInput, ragged_step
from seamwise.runtime.sampling.rows import SamplingRows, SamplingSlots
from seamwise.runtime.scheduler.commit import Step
from seamwise.runtime.scheduler.slots import Slots

from .pooled_states import Pooling


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRows:
    """Rows of logits that tell a prompt's log probabilities: those after its tokens start : start + len(following)."""

    sequence: int  # index in the step
    start: int
    following: np.ndarray
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A step and what is done with its logits. Token ids are read when it runs: the step before may sample some.

    owner, positions  (T,) slot and position of each token
    sampling          the rows that yield a token; prompts: those after them
    step              whose rows these are
    """

    inputs: StepInput
    owner: np.ndarray
    positions: np.ndarray
    sampling: SamplingRows
    prompts: list[PromptRows]
    step: Step

    def fill_tokens(self, history: np.ndarray) -> None:
        """Write the token ids, known by now, into the step."""
        self.inputs.token_ids.numpy()[:] = history[self.owner, self.positions]


def build_batch(
    step: Step, slots: Slots, sampling: SamplingSlots, adapters: np.ndarray | None = None,
    pooling: Pooling | None = None,
) -> Batch:  # fmt: skip
    """Return the batch of a step; its logits' rows are those that yield, then those of prompts.

    adapters  (S,) int32 by slot, where the runner has any
    pooling   of a model that pools: says the rows, whose hidden states are wanted
    """
    size = slots.block_size
    counts, yields = step.counts, step.yields
    ends = counts.cumsum()
    owner = np.repeat(step.slots, counts)
    positions = np.arange(ends[-1]) + np.repeat(step.firsts - (ends - counts), counts)
    width = -(-int((step.firsts + counts).max()) // size)
    each = 1 + step.drafts[yields]  # rows of a sequence: after its last known token, and after each guess
    last = np.repeat(each.cumsum() - 1, each)
    sampled_rows = np.repeat(ends[yields] - 1, each) - (last - np.arange(len(last)))
    rows = [sampled_rows]
    prompts = _prompt_rows(step, sampling)
    for p in prompts:
        begin = int(ends[p.sequence] - counts[p.sequence] - step.firsts[p.sequence])
        rows.append(np.arange(begin + p.start, begin + p.start + len(p.following)))
    if pooling is not None:
        rows = [pooling.rows(step)]
    inputs = ragged_step(
        np.empty(ends[-1], dtype=np.int64), np.ascontiguousarray(slots.tables[:, step.slots, :width]),
        step.firsts.astype(np.int32), counts.astype(np.int32), size, np.concatenate(rows),
        adapter_slots=None if adapters is None else torch.from_numpy(adapters[step.slots]),
        hidden_states=pooling is not None,
    )  # fmt: skip
    sampled = sampling.rows(np.repeat(step.slots[yields], each), positions[sampled_rows] + 1, slots.tokens)
    return Batch(inputs=inputs, owner=owner, positions=positions, sampling=sampled, prompts=prompts, step=step)


def _prompt_rows(step: Step, sampling: SamplingSlots) -> list[PromptRows]:
    found = []
    for i in sampling.flags[step.slots, 2].nonzero()[0].tolist():
        s, first, count = step.sequences[i], int(step.firsts[i]), int(step.counts[i])
        wanted = sampling.options[s.slot].params.prompt_logprobs
        end = min(first + count, len(s.prompt) - 1)  # what follows the prompt's last token is sampled
        if wanted is not None and first < end:
            following = s.prompt[first + 1 : end + 1]
            found.append(PromptRows(sequence=i, start=first, following=following, count=wanted))
    return found
