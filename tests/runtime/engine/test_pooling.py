"""What is pooled over steps: the same in bits however texts are cut, whoever is beside them, and after a restart."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seamwise.runtime.engine.pooled_states import Pooling


def a_step(*parts: tuple[int, int, int, int]) -> Any:
    """Return a step of (slot, first, count, length of the text) each."""
    slots, firsts, counts, lengths = (np.array(column, dtype=np.int64) for column in zip(*parts, strict=True))
    return SimpleNamespace(slots=slots, firsts=firsts, counts=counts, yields=firsts + counts >= lengths)


@pytest.mark.parametrize("kind", ["LAST", "MEAN", "CLS"])
@settings(max_examples=30)
@given(data=st.data())
def test_a_text_is_pooled_as_alone_and_whole(kind: str, data: st.DataObject) -> None:
    """Texts in drawn chunks beside each other; some start over in the middle, in whatever slot."""
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    drawn = [rng.standard_normal((n, 3)) * 10.0 ** rng.integers(-9, 9, (n, 1)) for n in lengths]  # sums that round
    texts = [torch.from_numpy(rows).to(dtype) for rows in drawn]
    pooling, done = Pooling(kind, 6, 3), {}
    firsts, slots = dict.fromkeys(range(len(texts)), 0), dict(enumerate(rng.permutation(6).tolist()))
    while len(done) < len(texts):
        there = [t for t in firsts if t not in done]
        chosen = data.draw(st.lists(st.sampled_from(there), min_size=1, unique=True))
        counts = {t: data.draw(st.integers(1, len(texts[t]) - firsts[t])) for t in chosen}
        step = a_step(*((slots[t], firsts[t], counts[t], len(texts[t])) for t in chosen))
        rows = torch.cat([texts[t][firsts[t] : firsts[t] + counts[t]].float() for t in chosen])
        ended = [t for t in chosen if firsts[t] + counts[t] == len(texts[t])]
        done |= dict(zip(ended, pooling.take(rows[pooling.rows(step)], step), strict=True))
        firsts = {t: first + counts.get(t, 0) for t, first in firsts.items()}
        if (left := [t for t in chosen if t not in done]) and data.draw(st.booleans()):
            firsts[left[0]] = 0  # preempted
    for t, text in enumerate(texts):
        alone, whole = Pooling(kind, 1, 3), a_step((0, 0, len(text), len(text)))
        (want,) = alone.take(text[alone.rows(whole)], whole)
        assert done[t].tobytes() == want.tobytes()
        exact = {"LAST": text[-1], "CLS": text[0], "MEAN": text.double().mean(0)}[kind]
        np.testing.assert_allclose(want, exact.double().numpy(), rtol=1e-9, atol=1e-6)
