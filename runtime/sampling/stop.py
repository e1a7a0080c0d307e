"""What ends an output, in vLLM's order: EOS, stop tokens, length, and from min_tokens on repetition."""

from __future__ import annotations

from collections.abc import Sequence

from .params import SamplingParams

Reason = tuple[str, str | int | None]  # finish_reason, stop_reason


def ended_by_token(
    output: Sequence[int], token: int, params: SamplingParams, stop_ids: Sequence[int], max_tokens: int
) -> Reason | None:
    """Return why an output ends with one more token; None: it goes on.

    A token that ends it comes before the length, so the last token allowed may still be a stop. That min_tokens come
    first is the sampler's work, which cannot choose such a token before; a repetition is no choice, so it is held back
    here.
    """
    produced = len(output) + 1
    if token in stop_ids:
        return "stop", None
    if token in params.stop_tokens:
        return "stop", token
    if produced >= max_tokens:
        return "length", None
    detection = params.repetition_detection
    if detection is not None and produced >= params.min_tokens:
        reach = detection.max_pattern_size * detection.min_count - 1
        if detection.found([*output[max(0, produced - 1 - reach) :], token]):
            return "repetition", None
    return None
