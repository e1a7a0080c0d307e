"""What is checked of a request before it is queued."""

from __future__ import annotations

from seamwise.runtime.sampling.params import SamplingParams


def check_request(
    prompt_token_ids: list[int], params: SamplingParams, *, limit: int, vocab: int, has_tokenizer: bool,
    pools: bool = False,
) -> int:  # fmt: skip
    """Return how many tokens each output may have; of a text that is pooled 1, which is none.

    Raises ValueError for a request that cannot be served.
    """
    if not prompt_token_ids:
        raise ValueError("the prompt has no tokens; wanted at least one")
    if min(prompt_token_ids) < 0 or max(prompt_token_ids) >= vocab:
        bad = next(t for t in prompt_token_ids if not 0 <= t < vocab)
        raise ValueError(f"the prompt has token id {bad}, wanted 0 to {vocab - 1} (the vocabulary)")
    if pools:
        if len(prompt_token_ids) > limit:
            raise ValueError(f"the text has {len(prompt_token_ids)} tokens, max_model_len is {limit}; shorten it")
        return 1
    if len(prompt_token_ids) >= limit:
        raise ValueError(
            f"the prompt has {len(prompt_token_ids)} tokens, max_model_len is {limit} with the output included;"
            " shorten the prompt or raise max_model_len"
        )
    for name, token in params.token_ids():
        if token >= vocab:
            raise ValueError(f"{name} has token id {token}, wanted 0 to {vocab - 1}")
    if params.detokenize and not has_tokenizer:
        raise ValueError("detokenize=True needs a tokenizer; this model directory has none: pass detokenize=False")
    if params.bad_words and not has_tokenizer:
        raise ValueError("bad_words need a tokenizer; this model directory has none")
    room = limit - len(prompt_token_ids)
    if params.min_tokens > room:
        raise ValueError(f"min_tokens={params.min_tokens}, but max_model_len={limit} leaves room for {room}; lower it")
    return min(room, params.max_tokens) if params.max_tokens is not None else room
