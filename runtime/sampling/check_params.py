"""The checks of SamplingParams: each names the field, its value and what was wanted."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .structured import StructuredOutputsParams

if TYPE_CHECKING:
    from .params import SamplingParams

_WORDS: dict[type, str] = {Sequence: "sequence", Mapping: "mapping"}
_GREATEST = 1e6  # an infinite divisor turns -inf into NaN


def check_params(p: SamplingParams) -> None:
    """Raise ValueError for the first field that is wrong."""
    whole("n", p.n, 1)
    _real("temperature", p.temperature, 0.0, _GREATEST)
    whole("top_k", p.top_k, -1)
    _real("top_p", p.top_p, 0.0, 1.0, open_low=True)
    _real("min_p", p.min_p, 0.0, 1.0)
    _real("presence_penalty", p.presence_penalty, -2.0, 2.0)
    _real("frequency_penalty", p.frequency_penalty, -2.0, 2.0)
    _real("repetition_penalty", p.repetition_penalty, 0.0, _GREATEST, open_low=True)
    for name, low in (("seed", None), ("max_tokens", 1), ("logprobs", -1), ("prompt_logprobs", -1)):
        if getattr(p, name) is not None:
            whole(name, getattr(p, name), low)
    if p.stream_interval is not None:
        whole("stream_interval", p.stream_interval, 1)
    whole("min_tokens", p.min_tokens, 0)
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise ValueError(f"min_tokens={p.min_tokens} is more than max_tokens={p.max_tokens}; wanted at most it")
    for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
        _flag(name, getattr(p, name))
    if p.skip_reading_prefix_cache is not None:
        _flag("skip_reading_prefix_cache", p.skip_reading_prefix_cache)
    _kinds(p)
    _tokens(p)
    _texts(p)


def _kinds(p: SamplingParams) -> None:
    from .params import RepetitionDetectionParams, RequestOutputKind

    kinds: tuple[tuple[str, tuple[type, ...]], ...] = (
        ("stop", (str, Sequence)), ("stop_token_ids", (Sequence,)), ("logit_bias", (Mapping,)),
        ("allowed_token_ids", (Sequence,)), ("bad_words", (Sequence,)), ("logprob_token_ids", (Sequence,)),
        ("logits_processors", (Sequence,)), ("repetition_detection", (RepetitionDetectionParams,)),
        ("extra_args", (Mapping,)), ("structured_outputs", (StructuredOutputsParams,)),
    )  # fmt: skip
    for name, wanted in kinds:
        got = getattr(p, name)
        if got is not None and (not isinstance(got, wanted) or (isinstance(got, str) and str not in wanted)):
            listed = " or ".join(_WORDS.get(kind, kind.__name__) for kind in wanted)
            raise ValueError(f"{name}: got {got!r}, wanted None or a {listed}")
    if not isinstance(p.output_kind, RequestOutputKind):
        raise ValueError(f"output_kind: got {p.output_kind!r}, wanted a RequestOutputKind")
    for processor in p.logits_processors or ():
        if not callable(processor):
            raise ValueError(f"logits_processors: got {processor!r}, wanted functions")


def _tokens(p: SamplingParams) -> None:
    for token in p.stop_tokens:
        whole("stop_token_ids", token, 0)
    for token, bias in p.biases.items():
        whole("logit_bias key", token, 0)
        _real(f"logit_bias[{token}]", bias, -_GREATEST, _GREATEST)
    for name in ("allowed_token_ids", "logprob_token_ids"):
        tokens = getattr(p, name)
        for token in tokens or ():
            whole(name, token, 0)
        if tokens is not None and not tokens:
            raise ValueError(f"{name}: got no tokens, wanted at least one, or None")
    if p.logprob_token_ids is not None and p.logprobs not in (None, 0):
        raise ValueError(
            f"logprob_token_ids and logprobs={p.logprobs}: wanted one of them; the given tokens take the place of the"
            " most likely ones"
        )
    predicted = (p.extra_args or {}).get("predicted_tokens")
    if predicted is not None:
        _real("extra_args['predicted_tokens']", predicted, 0, 1e9)
    guesses = (p.extra_args or {}).get("num_speculative_tokens")
    if guesses is not None and (type(guesses) is not int or guesses < 0):
        raise ValueError(f"extra_args['num_speculative_tokens']={guesses!r}: wanted 0 (none) or more")


def _texts(p: SamplingParams) -> None:
    for name, texts in (("stop", p.stop_strings), ("bad_words", p.bad_words or ())):
        for text in texts:
            if not isinstance(text, str) or not text:
                raise ValueError(f"{name}: got {text!r}, wanted non-empty strings")
    if p.stop_strings and not p.detokenize:
        raise ValueError("stop: strings cannot be found with detokenize=False; use stop_token_ids or detokenize=True")


def _flag(name: str, got: object) -> None:
    if not isinstance(got, bool):
        raise ValueError(f"{name}: got {got!r}, wanted True or False")


def whole(name: str, got: object, low: int | None) -> None:
    """Raise ValueError when `got` is no whole number of at least `low` (None: any)."""
    if not isinstance(got, int) or isinstance(got, bool) or (low is not None and got < low):
        raise ValueError(
            f"{name}: got {got!r}, wanted a whole number" + (f" of at least {low}" if low is not None else "")
        )


def _real(name: str, got: object, low: float, high: float, *, open_low: bool = False) -> None:
    fits = isinstance(got, (int, float)) and not isinstance(got, bool) and not math.isnan(got) and low <= got <= high
    if not fits or (open_low and got == low):
        raise ValueError(f"{name}: got {got!r}, wanted a number {'above' if open_low else 'from'} {low:g} to {high:g}")
