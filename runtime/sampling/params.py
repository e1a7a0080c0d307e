"""How to continue one prompt, with vLLM's names, defaults and meaning.

Source: https://docs.vllm.ai/en/latest/api/vllm/sampling_params.html
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_GREATEST = 1e6  # an infinite divisor turns -inf into NaN


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling options of one request; every field is checked here and in effect.

    n                    outputs for the prompt, sampled independently
    temperature          0 is greedy
    top_k, top_p, min_p  keep the k most likely tokens (0 or -1: all); the smallest set of probability top_p; tokens
                         of at least min_p times the greatest probability
    presence_penalty, frequency_penalty  subtracted once, or once for each occurrence, of a token in the output
    repetition_penalty   divides positive and multiplies negative logits of tokens in prompt or output
    seed                 makes the request's draws depend on (seed, position) alone; None or -1 takes the engine's seed
    stop, stop_token_ids end the output; the text of either is left out unless include_stop_str_in_output
    ignore_eos           go on after the model's end-of-sequence tokens
    max_tokens           greatest number of output tokens; None: up to max_model_len
    min_tokens           so many output tokens come before EOS, a stop token or the end of a stop string
    logprobs             log probabilities of so many most likely tokens, and of the sampled one, at each position
    logit_bias           token id -> value added to its logit
    detokenize, skip_special_tokens  whether there is text, and whether special tokens are left out of it
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        _whole("n", self.n, 1)
        _real("temperature", self.temperature, 0.0, _GREATEST)
        _whole("top_k", self.top_k, -1)
        _real("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _real("min_p", self.min_p, 0.0, 1.0)
        _real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _real("repetition_penalty", self.repetition_penalty, 0.0, _GREATEST, open_low=True)
        if self.seed is not None:
            _whole("seed", self.seed, None)
        if self.max_tokens is not None:
            _whole("max_tokens", self.max_tokens, 1)
        _whole("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}; wanted at most it"
            )
        if self.logprobs is not None:
            _whole("logprobs", self.logprobs, 0)
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted True or False")
        self._check_stops()

    def _check_stops(self) -> None:
        for name, wanted in (("stop", (str, Sequence)), ("stop_token_ids", (Sequence,)), ("logit_bias", (Mapping,))):
            got = getattr(self, name)
            if got is not None and not isinstance(got, wanted):
                listed = " or ".join(kind.__name__.lower() for kind in wanted)
                raise ValueError(f"{name}: got {got!r}, wanted None or a {listed}")
        for text in self.stop_strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop: got {text!r}, wanted non-empty strings")
        if self.stop_strings and not self.detokenize:
            raise ValueError(
                "stop: strings cannot be found with detokenize=False; use stop_token_ids or detokenize=True"
            )
        for token in self.stop_tokens:
            _whole("stop_token_ids", token, 0)
        for token, bias in self.biases.items():
            _whole("logit_bias key", token, 0)
            _real(f"logit_bias[{token}]", bias, -_GREATEST, _GREATEST)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def stop_tokens(self) -> Sequence[int]:
        return self.stop_token_ids or ()

    @property
    def biases(self) -> Mapping[int, float]:
        return self.logit_bias or {}

    @property
    def greedy(self) -> bool:
        return self.temperature < 1e-5

    @property
    def has_penalties(self) -> bool:
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


def _whole(name: str, got: object, low: int | None) -> None:
    if not isinstance(got, int) or isinstance(got, bool) or (low is not None and got < low):
        raise ValueError(
            f"{name}: got {got!r}, wanted a whole number" + (f" of at least {low}" if low is not None else "")
        )


def _real(name: str, got: object, low: float, high: float, *, open_low: bool = False) -> None:
    fits = isinstance(got, (int, float)) and not isinstance(got, bool) and not math.isnan(got) and low <= got <= high
    if not fits or (open_low and got == low):
        raise ValueError(f"{name}: got {got!r}, wanted a number {'above' if open_low else 'from'} {low:g} to {high:g}")
