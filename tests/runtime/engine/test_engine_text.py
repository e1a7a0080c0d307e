"""The engine's text: where a tokenizer ends an answer, and how each logprob spells its token."""

from __future__ import annotations

import pytest
from tiny_tokenizers import unigram, write

from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.engine.outputs import RequestOutput
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.runtime.text.tokenizer import Tokenizer
from seamwise.testing import FakeRunner


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    config = {"tokenizer_config.json": {"eos_token": "▁Hello"}}  # one that no configuration of the model knows
    return Tokenizer(write(tmp_path_factory.mktemp("engine"), unigram(), config))


def run(tokenizer: Tokenizer, eos_ids: tuple[int, ...] = (), **params: object) -> RequestOutput:
    runner = FakeRunner(num_blocks=500, block_size=4, vocab_size=280, eos_ids=eos_ids, sharpness=8.0)
    engine = Engine(runner, tokenizer, SchedulerConfig())
    engine.add_request("x", tokenizer.encode("Hi 😀"), SamplingParams(**params))  # type: ignore[arg-type]
    output = None
    while engine.has_unfinished_requests():
        (output,) = engine.step()
    assert output is not None
    return output


def test_the_tokenizers_end_ends_an_answer_beside_the_models(tokenizer: Tokenizer) -> None:
    assert tokenizer.eos_id is not None
    bias = {tokenizer.eos_id: 1e5}
    for eos_ids in ((), (3,), (tokenizer.eos_id,), (9999,)):
        (completion,) = run(tokenizer, eos_ids, logit_bias=bias, temperature=0, max_tokens=5).outputs
        assert (completion.finish_reason, completion.token_ids) == ("stop", [tokenizer.eos_id])
    (completion,) = run(tokenizer, (7,), logit_bias={7: 1e5}, temperature=0, max_tokens=5).outputs
    assert (completion.finish_reason, completion.token_ids) == ("stop", [7])
    (completion,) = run(tokenizer, logit_bias=bias, temperature=0, max_tokens=5, ignore_eos=True).outputs
    assert (completion.finish_reason, len(completion.token_ids)) == ("length", 5)
    (completion,) = run(tokenizer, logit_bias=bias, temperature=0, max_tokens=5, min_tokens=3).outputs
    assert len(completion.token_ids) == 4 and completion.token_ids[-1] == tokenizer.eos_id


def test_logprobs_spell_tokens_as_the_text_does(tokenizer: Tokenizer) -> None:
    one = tokenizer.full.convert_tokens_to_ids
    wanted = {one("▁true"): " true", one("true"): "true", one("</s>"): "</s>", one("<0xF0>"): ""}
    bias = dict.fromkeys(wanted, 1e5)
    output = run(tokenizer, logit_bias=bias, seed=1, max_tokens=12, logprobs=279, ignore_eos=True)
    (completion,) = output.outputs
    assert completion.logprobs is not None
    chosen = [at[token].decoded_token for at, token in zip(completion.logprobs, completion.token_ids, strict=True)]
    assert chosen == [wanted[token] for token in completion.token_ids] and len({*chosen}) > 2
    for at in completion.logprobs:
        assert {token: at[token].decoded_token for token in wanted} == wanted


def test_without_text_there_is_no_spelling(tokenizer: Tokenizer) -> None:
    (completion,) = run(tokenizer, temperature=0, max_tokens=2, logprobs=2, detokenize=False).outputs
    assert completion.logprobs is not None and completion.text == ""
    assert {at.decoded_token for at in completion.logprobs[0].values()} == {None}
