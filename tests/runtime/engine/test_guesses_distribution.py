"""The distribution of sampled outputs is what it is without guesses, exactly: by counting over seeds.

A guess is verified by drawing the token itself with the noise of its seed and position, so that for each seed the
output is the same, and with that the distribution, whatever temperature, top-p, penalties and grammar make of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence as Series
from typing import Any

import numpy as np
import pytest
from test_machine import Always, Guesses

from seamwise.runtime.engine.drafting import Drafting
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.testing import FakeRunner

VOCAB, LENGTH, SEEDS, PROMPT = 6, 3, 1500, [1, 4, 2]


class NoEcho:
    """A grammar: no token comes twice in a row, and 0 never."""

    def allowed(self, output: Series[int]) -> list[int]:
        return [t for t in range(1, VOCAB) if [t] != [*output[-1:]]]

    def allowed_words(self, output_ids: list[int]) -> np.ndarray:
        return np.array([sum(1 << t for t in self.allowed(output_ids))], dtype=np.int32)

    def forced(self, output_ids: list[int]) -> list[int]:
        return []

    def follows(self, output_ids: list[int], guess: list[int]) -> int:
        fits = [t in self.allowed([*output_ids, *guess[:i]]) for i, t in enumerate(guess)]
        return (*fits, False).index(False)


def runner() -> FakeRunner:
    return FakeRunner(num_blocks=300, block_size=4, vocab_size=VOCAB, eos_ids=(), sharpness=1.0)


def counted(guesses: int | None, options: dict[str, Any], grammar: bool) -> tuple[Counter[tuple[int, ...]], Engine]:
    """Return how often each output comes over all seeds, of `guesses` right ones of 2; None: without any."""
    made = runner()
    drafting = None if guesses is None else Drafting(drafter=Guesses(made, guesses), most=2, watch=Always())
    engine = Engine(made, None, SchedulerConfig(max_num_seqs=64), drafting=drafting)  # type: ignore[arg-type]
    for seed in range(SEEDS):
        params = SamplingParams(max_tokens=LENGTH, seed=seed, detokenize=False, **options)
        engine.add_request(str(seed), PROMPT, params, mask_providers=[NoEcho()] if grammar else ())  # type: ignore[list-item]
    found: Counter[tuple[int, ...]] = Counter()
    while engine.has_unfinished_requests():
        found.update(tuple(o.outputs[0].token_ids) for o in engine.step() if o.finished)
    engine.close()
    return found, engine


def exact(
    temperature: float, top_p: float, penalty: float, presence: float, grammar: bool
) -> dict[tuple[int, ...], float]:
    """Return the probability of each output, by going through all of them: numpy in float64, nothing of ours."""
    made = runner()

    def after(output: tuple[int, ...]) -> np.ndarray:
        logits = made.logits_after([*PROMPT, *output]).astype(np.float64)
        if grammar:
            logits[[t for t in range(VOCAB) if t not in NoEcho().allowed(output)]] = -np.inf
        seen = sorted({*PROMPT, *output})
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
        logits[sorted({*output})] -= presence
        p = np.exp((logits - logits.max()) / temperature)
        p /= p.sum()
        order = np.argsort(-p)
        kept = order[: int((p[order].cumsum() - p[order] < top_p).sum())]
        cut = np.zeros(VOCAB)
        cut[kept] = p[kept]
        return cut / cut.sum()

    found = {(): 1.0}
    for _ in range(LENGTH):
        found = {(*o, t): p * q for o, p in found.items() for t, q in enumerate(after(o)) if q}  # type: ignore[misc]
    return found  # type: ignore[return-value]


CASES = [
    ({"temperature": 1.0}, False),
    ({"temperature": 0.8, "top_p": 0.8, "repetition_penalty": 1.3, "presence_penalty": 0.4}, False),
    ({"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.2}, True),
]


@pytest.mark.parametrize(("options", "grammar"), CASES, ids=["plain", "top-p and penalties", "grammar"])
def test_counts_over_seeds_are_equal_and_of_the_exact_distribution(options: dict[str, Any], grammar: bool) -> None:
    plain, _ = counted(None, options, grammar)
    assert plain.total() == SEEDS
    for right in (0, 2):
        found, engine = counted(right, options, grammar)
        assert found == plain
        stats = engine.drafting.stats
        assert not right or SEEDS / 8 < stats.num_accepted_tokens < stats.num_draft_tokens, "guesses stood and fell"
    wanted = exact(
        options["temperature"], options.get("top_p", 1.0), options.get("repetition_penalty", 1.0),
        options.get("presence_penalty", 0.0), grammar,
    )  # fmt: skip
    assert plain.keys() <= wanted.keys(), "an output comes that has no probability"
    chi2 = sum((plain[o] - SEEDS * p) ** 2 / (SEEDS * p) for o, p in wanted.items() if SEEDS * p >= 5)
    freedom = sum(SEEDS * p >= 5 for p in wanted.values())
    assert freedom >= 8 and chi2 <= freedom + 5 * math.sqrt(2 * freedom), f"chi2 {chi2:.0f} of {freedom}"
