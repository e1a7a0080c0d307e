"""Every bad field is an error that names it."""

from __future__ import annotations

from typing import Any

import pytest

from seamwise import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_k", -2), ("top_k", 1.5), ("top_p", 0.0),
        ("top_p", 1.1), ("min_p", -0.1), ("presence_penalty", 3.0), ("frequency_penalty", -2.5),
        ("repetition_penalty", 0.0), ("seed", 1.5), ("max_tokens", 0), ("max_tokens", -1), ("max_tokens", 2.0),
        ("min_tokens", -1), ("logprobs", -2), ("prompt_logprobs", -2),
        ("logprob_token_ids", [-1]), ("allowed_token_ids", []), ("bad_words", "no"), ("bad_words", [""]),
        ("logits_processors", [3]), ("repetition_detection", 3), ("output_kind", 1), ("stream_interval", 0),
        ("skip_reading_prefix_cache", 1), ("extra_args", [1]), ("extra_args", {"predicted_tokens": -1}),
        ("stop", [""]), ("stop", [3]), ("stop_token_ids", [-1]),
        ("logit_bias", {-1: 0.0}), ("logit_bias", {3: "much"}),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


def test_fields_that_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="min_tokens=5 is more than max_tokens=3"):
        SamplingParams(min_tokens=5, max_tokens=3)
    with pytest.raises(ValueError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens, params.n) == (1.0, 1.0, 0, 16, 1)
