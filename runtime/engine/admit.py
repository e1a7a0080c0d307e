"""What is asked of an engine: checked before it is queued, and made a request with its sequences."""

from __future__ import annotations

from collections.abc import Sequence as Series
from functools import partial

import numpy as np

from seamwise.runtime.build.pooler import Pooler
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.sampling.bad_words import tokens_of_words
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.sampling.pooling_params import PoolingParams
from seamwise.runtime.sampling.rows import MaskProvider, RowOptions
from seamwise.runtime.scheduler.sequence import NO_LIMIT, Sequence
from seamwise.runtime.text.detokenize import Detokenizer
from seamwise.runtime.text.tokenizer import Tokenizer

from .request import Completion, Request

_PROMPT_ROWS = 256  # prompt tokens of a step whose log probabilities are wanted: logits of so many rows are kept


class Intake:
    """What an engine asks of requests, and makes of them.

    eos_ids  the ids that end outputs: the model's, and the one that its tokenizer names (fine-tunes rename it)
    """

    def __init__(self, runner: ModelRunner, tokenizer: Tokenizer | None, pooler: Pooler | None, seed: int) -> None:
        self._runner, self._tokenizer, self._pooler, self._seed = runner, tokenizer, pooler, seed
        self._arrivals = 0
        self.ends_with(runner.config.eos_ids)

    def ends_with(self, ids: Series[int]) -> None:
        """Let these ids of the model end outputs, and the tokenizer's."""
        named = [] if self._tokenizer is None or self._tokenizer.eos_id is None else [self._tokenizer.eos_id]
        self.eos_ids = tuple(dict.fromkeys(i for i in (*ids, *named) if i < self._runner.config.vocab_size))

    def room(self, prompt_token_ids: list[int], params: SamplingParams, pooling: PoolingParams | None) -> int:
        """Return how many tokens each output may have. Raises ValueError for what this model does not serve."""
        if self._pooler is None and pooling is not None:
            raise ValueError("this model generates text and has no embeddings; load it with runner='pooling'")
        if self._pooler is not None:
            if pooling is None:
                raise ValueError("this model pools (runner='pooling') and generates nothing; ask for embeddings")
            self._pooler.check_dimensions(pooling.dimensions)
        return check_request(
            prompt_token_ids, params, limit=self._runner.options.max_model_len, vocab=self._runner.config.vocab_size,
            has_tokenizer=self._tokenizer is not None, pools=pooling is not None,
        )  # fmt: skip

    def completion(
        self, request: Request, index: int, provider: MaskProvider | None, detokenizer: Detokenizer | None, *,
        root: bytes, max_tokens: int, predicted: float, names_ahead: int,
    ) -> Completion:  # fmt: skip
        """Return one of a request's outputs, with a sequence of its own that begins with the prompt.

        root         what its blocks' names begin with; names_ahead: see Drafting
        predicted    tokens that it is thought to produce, where the request does not say it
        """
        params, prompt = request.params, request.prompt_token_ids
        self._arrivals += 1
        s = Sequence(
            id=f"{request.request_id}/{index}", prompt=np.array(prompt, dtype=np.int32), max_tokens=max_tokens,
            arrival=self._arrivals, root=root, names_ahead=names_ahead,
            predicted=(params.extra_args or {}).get("predicted_tokens", predicted),
            reads_cache=params.reads_prefix_cache and (self._pooler is None or self._pooler.reads_cache),
            max_chunk=NO_LIMIT if params.prompt_logprobs is None else _PROMPT_ROWS,
        )  # fmt: skip
        seed = params.seed if params.seed not in (None, -1) else (self._seed << 32) + self._arrivals - 1 - index
        assert seed is not None
        encode = None if self._tokenizer is None else partial(self._tokenizer.encode, add_special_tokens=False)
        options = RowOptions(
            params=params, seed=seed + (index << 48), num_prompt=len(prompt), mask_provider=provider,
            stop_ids=() if params.ignore_eos and params.structured_outputs is None else self.eos_ids,
            bad_words=tokens_of_words(params.bad_words or (), encode) if encode else (),
        )  # fmt: skip
        return Completion(sequence=s, options=options, detokenizer=detokenizer)


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
