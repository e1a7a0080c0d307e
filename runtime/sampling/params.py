"""How to continue one prompt, with vLLM's names, defaults and meaning.

Source: https://docs.vllm.ai/en/latest/api/vllm/sampling_params.html
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from seamwise.runtime.build.arguments import named_arguments

from .check_params import check_params, whole
from .plain_numbers import make_plain
from .structured import StructuredOutputsParams

LogitsProcessor = Callable[..., Any]  # ([prompt_ids,] output_ids, logits (V,)) -> logits (V,)


class RequestOutputKind(IntEnum):
    """What an output holds: all until now, what is new since the last one, or all and only at the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RepetitionDetectionParams:
    """End an output whose last tokens are one pattern over and over, with finish_reason "repetition".

    A pattern of min_pattern_size (0: 1) to max_pattern_size tokens that stands min_count times in a row at the end.
    """

    max_pattern_size: int
    min_pattern_size: int = 0
    min_count: int = 2

    def __post_init__(self) -> None:
        whole("max_pattern_size", self.max_pattern_size, 1)
        whole("min_pattern_size", self.min_pattern_size, 0)
        whole("min_count", self.min_count, 2)
        if self.min_pattern_size > self.max_pattern_size:
            raise ValueError(
                f"min_pattern_size={self.min_pattern_size} is more than max_pattern_size={self.max_pattern_size}"
            )

    def found(self, tokens: Sequence[int]) -> bool:
        """Return whether the tokens end so. Looks at max_pattern_size · min_count tokens at most."""
        for size in range(max(self.min_pattern_size, 1), self.max_pattern_size + 1):
            length = size * self.min_count
            if length > len(tokens):
                return False
            tail = tokens[-length:]
            if tail[size:] == tail[:-size]:
                return True
        return False


@named_arguments(
    best_of="use n", do_sample="use temperature (0 is greedy)", max_new_tokens="use max_tokens",
    num_return_sequences="use n", truncate_prompt_tokens="cut the prompt's ids before",
)  # fmt: skip
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
    ignore_eos           go on after the model's end-of-sequence tokens; a form asked for ends the output in any case
    max_tokens           greatest number of output tokens; None: up to max_model_len
    min_tokens           so many output tokens come before EOS, a stop token or the end of a stop string; a form asked
                         for that is complete ends the output before
    logprobs             log probabilities of so many most likely tokens, and of the sampled one, at each position; -1:
                         of all tokens
    prompt_logprobs      the same of the prompt's tokens; its prefix is then computed, not read from the cache
    logprob_token_ids    log probabilities of these tokens at each position, instead of the most likely ones
    logit_bias           token id -> value added to its logit
    allowed_token_ids    only these can be sampled
    bad_words            words that are not produced: the last token of one is never sampled after its others
    logits_processors    functions of (output_ids, logits) or (prompt_ids, output_ids, logits), in order, that return
                         the logits (V,) to go on with; after penalties, before temperature
    repetition_detection ends an output that repeats itself
    structured_outputs   what the output must look like; a mapping of its fields is taken too
    detokenize, skip_special_tokens  whether there is text, and whether special tokens are left out of it
    output_kind          what outputs hold; stream_interval: they come every so many tokens, the first and last always
    skip_reading_prefix_cache  compute the whole prompt; None: only with prompt_logprobs
    extra_args           for logits processors and policies: "predicted_tokens" is the output length to expect
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
    prompt_logprobs: int | None = None
    logprob_token_ids: Sequence[int] | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = None
    repetition_detection: RepetitionDetectionParams | None = None
    structured_outputs: StructuredOutputsParams | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    stream_interval: int | None = None
    skip_reading_prefix_cache: bool | None = None
    extra_args: Mapping[str, Any] | None = field(default=None)

    def __post_init__(self) -> None:
        make_plain(self)
        if isinstance(self.structured_outputs, Mapping):
            object.__setattr__(self, "structured_outputs", StructuredOutputsParams(**self.structured_outputs))
        check_params(self)

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

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None or self.logprob_token_ids is not None

    @property
    def reads_prefix_cache(self) -> bool:
        skip = self.skip_reading_prefix_cache
        return not (self.prompt_logprobs is not None if skip is None else skip)

    def token_ids(self) -> list[tuple[str, int]]:
        """Return every token id that a field names, with the field's name, to be checked against a vocabulary."""
        named = {
            "logit_bias": self.biases, "stop_token_ids": self.stop_tokens,
            "allowed_token_ids": self.allowed_token_ids or (), "logprob_token_ids": self.logprob_token_ids or (),
        }  # fmt: skip
        return [(name, token) for name, tokens in named.items() for token in tokens]
