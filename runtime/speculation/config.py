"""The options of speculation, by vLLM's names.

Source: https://docs.vllm.ai/en/latest/features/spec_decode.html.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """How tokens are guessed.

    method                  "ngram", or the name that another package's drafter has
    num_speculative_tokens  guesses of a sequence that one step verifies, at most; a request may ask for fewer by
                            SamplingParams(extra_args={"num_speculative_tokens": 2}), 0: none
    prompt_lookup_min, prompt_lookup_max  "ngram": the last so many tokens are looked for among the earlier ones
    """

    method: str = "ngram"
    num_speculative_tokens: int = 4
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 5

    def __post_init__(self) -> None:
        for name in ("num_speculative_tokens", "prompt_lookup_min", "prompt_lookup_max"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"speculative_config: {name}={value!r}, wanted a whole number above 0")
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"speculative_config: prompt_lookup_min={self.prompt_lookup_min} is above"
                f" prompt_lookup_max={self.prompt_lookup_max}"
            )

    @classmethod
    def of(cls, given: Mapping[str, Any] | SpeculativeConfig) -> SpeculativeConfig:
        """Return the configuration of a mapping, as vLLM takes it. Raises ValueError for what it does not have."""
        if isinstance(given, SpeculativeConfig):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(f"speculative_config={given!r}, wanted a mapping like {{'method': 'ngram'}}")
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                near = get_close_matches(str(name), names, 1) or [", ".join(names)]
                raise ValueError(f"speculative_config: {name!r} is no option of it; wanted {near[0]}")
        return cls(**given)
