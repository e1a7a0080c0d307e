"""Guesses by prompt lookup against a search that tries everything."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from seamwise.runtime.build.arguments import options_of
from seamwise.runtime.speculation.config import SpeculativeConfig
from seamwise.runtime.speculation.drafter import Known, find_drafter
from seamwise.runtime.speculation.ngram import NGram


@given(
    tokens=st.lists(st.integers(0, 2), min_size=1, max_size=24), shortest=st.integers(1, 3), more=st.integers(0, 3),
    most=st.integers(1, 5),
)  # fmt: skip
def test_the_longest_match_and_of_equal_ones_the_latest(tokens: list[int], shortest: int, more: int, most: int) -> None:
    longest, wanted = shortest + more, []
    for length in range(longest, shortest - 1, -1):
        ends = [e for e in range(length, len(tokens)) if tokens[e - length : e] == tokens[len(tokens) - length :]]
        if ends and len(tokens) > length:
            followed = [e for e in ends if len(tokens) - e >= most]
            wanted = tokens[(followed or [ends[0]])[-1] :][:most]
            break
    known = Known(owner=(0, 0), tokens=np.array(tokens, dtype=np.int32), most=most)
    assert NGram(shortest, longest).propose([known, known]) == [wanted, wanted]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"methods": "ngram"}, "no option of speculative_config: 'methods'; did you mean method"),
        ({"method": "crystal ball"}, "'crystal ball' is not known; wanted one of draft_model, first_layers, mtp,"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens=0, wanted a whole number above 0"),
        ({"prompt_lookup_min": 4, "prompt_lookup_max": 3}, "prompt_lookup_min=4 is above prompt_lookup_max=3"),
        ("ngram", "speculative_config='ngram', wanted a mapping with options of method, num_spec"),
    ],
)
def test_what_is_no_configuration_is_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_drafter(options_of(SpeculativeConfig, given, "speculative_config"), None)
