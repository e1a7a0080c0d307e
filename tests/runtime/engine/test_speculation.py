"""Guesses change how many steps an output takes, and nothing else. test_machine.py has them beside everything else."""

from __future__ import annotations

from collections.abc import Sequence as Series
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_machine import Always, Guesses

from seamwise.runtime.engine.drafting import Drafting
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.engine.outputs import RequestOutput
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.runtime.speculation.drafter import Known
from seamwise.testing import FakeRunner

MOST = 3


class Deaf:
    """A drafter that fails the test when it is asked."""

    def propose(self, known: Series[Known]) -> list[list[int]]:
        raise AssertionError("nothing was to be guessed")


def engine_of(guesses: int | None, *, drafter: Any = None, tokenizer: Any = None, **runner: Any) -> Engine:
    made = FakeRunner(**({"num_blocks": 33, "block_size": 4, "eos_ids": ()} | runner))
    drafting = None
    if guesses is not None or drafter is not None:
        drafting = Drafting(drafter=drafter or Guesses(made, guesses or 0), most=MOST, watch=Always())
    return Engine(made, tokenizer, SchedulerConfig(max_num_seqs=4), drafting=drafting)  # type: ignore[arg-type]


def run(engine: Engine, requests: Series[SamplingParams], prompt: Series[int] = (3, 4, 5)) -> list[RequestOutput]:
    for i, params in enumerate(requests):
        engine.add_request(str(i), [*prompt], params)
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        done |= {o.request_id: o for o in engine.step() if o.finished}
        engine.scheduler.check()
    engine.close()
    return [done[str(i)] for i in range(len(requests))]


def shown(outputs: Series[RequestOutput]) -> list[Any]:
    return [(c.token_ids, c.logprobs, c.finish_reason, c.stop_reason) for o in outputs for c in o.outputs]


def test_guesses_that_stand_save_steps() -> None:
    params = [SamplingParams(temperature=0, max_tokens=13, detokenize=False)]
    plain = run(plain_engine := engine_of(None), params)
    guessing = run(engine := engine_of(MOST), params)
    assert shown(guessing) == shown(plain)
    assert (
        plain_engine.runner.num_steps == 13 and engine.runner.num_steps == 4
    )  # 1, then 4 times 3 guesses and one more
    stats = engine.drafting.stats
    assert (stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens) == (3, 9, 9)
    assert stats.num_accepted_tokens_per_pos == [3, 3, 3]


def test_guesses_that_fall_cost_no_step_and_are_counted() -> None:
    params = [SamplingParams(temperature=0, max_tokens=9, detokenize=False)]
    engine = engine_of(1)
    assert shown(run(engine, params)) == shown(run(engine_of(None), params))
    stats = engine.drafting.stats
    assert engine.runner.num_steps == 5 and stats.num_accepted_tokens == stats.num_drafts == 4
    assert stats.num_accepted_tokens_per_pos == [4, 0, 0] and stats.num_draft_tokens == 3 * 3 + 1


@settings(max_examples=60, deadline=None)
@given(
    right=st.integers(0, MOST), temperature=st.sampled_from([0.0, 0.7, 1.5]), top_p=st.sampled_from([1.0, 0.8]),
    penalty=st.sampled_from([1.0, 1.3]), min_tokens=st.integers(0, 4), stop=st.lists(st.integers(0, 23), max_size=6),
    logprobs=st.sampled_from([None, 0, 2]), n=st.integers(1, 2), seed=st.integers(0, 9), bias=st.booleans(),
)  # fmt: skip
def test_every_option_of_sampling_gives_what_it_gives_without(
    right: int, temperature: float, top_p: float, penalty: float, min_tokens: int, stop: list[int],
    logprobs: int | None, n: int, seed: int, bias: bool,
) -> None:  # fmt: skip
    params = SamplingParams(
        temperature=temperature, top_p=top_p, repetition_penalty=penalty, frequency_penalty=penalty - 1, seed=seed,
        min_tokens=min_tokens, stop_token_ids=stop, logprobs=logprobs, n=n, max_tokens=11, detokenize=False,
        logit_bias={7: 2.0} if bias else None,
    )  # fmt: skip
    requests = [params, SamplingParams(temperature=0, max_tokens=7, detokenize=False)]
    assert shown(run(engine_of(right), requests)) == shown(run(engine_of(None), requests))


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(max_tokens=6, detokenize=False, extra_args={"num_speculative_tokens": 0}),
        SamplingParams(max_tokens=6, detokenize=False, logits_processors=[lambda ids, logits: logits]),
    ],
)
def test_requests_that_are_not_guessed_on(params: SamplingParams) -> None:
    (output,) = run(engine_of(None, drafter=Deaf()), [params])
    assert len(output.outputs[0].token_ids) == 6


def test_a_request_may_have_fewer_guesses() -> None:
    params = SamplingParams(temperature=0, max_tokens=9, detokenize=False, extra_args={"num_speculative_tokens": 1})
    run(engine := engine_of(MOST), [params])
    assert engine.drafting.stats.num_accepted_tokens_per_pos == [4, 0, 0]


class Silent:
    """A drafter that finds nothing."""

    def propose(self, known: Series[Known]) -> list[list[int]]:
        return [[] for _ in known]


def test_a_search_that_finds_nothing_is_timed_as_guessing() -> None:
    made = FakeRunner(num_blocks=200, block_size=4, eos_ids=(), max_model_len=800)
    drafting = Drafting(drafter=Silent(), most=MOST)
    engine = Engine(made, None, SchedulerConfig(max_num_seqs=4), drafting=drafting)
    run(engine, [SamplingParams(temperature=0, max_tokens=40, detokenize=False)])
    measured = drafting.watch.of(1)
    assert len(measured.with_s) >= 3 and len(measured.without_s) >= 3 and set(measured.tokens) == {1.0}
    assert drafting.stats.num_drafts == 0


def test_a_step_is_not_planned_beside_guesses() -> None:
    """However the watch decides meanwhile: requests that arrive change the size of steps that it looks at."""

    class Changing(Always):
        def wants(self, sequences: int) -> bool:
            return sequences < 2

    made = FakeRunner(num_blocks=65, block_size=4, eos_ids=())
    drafting = Drafting(drafter=Guesses(made, 1), most=MOST, watch=Changing())
    engine = Engine(made, None, SchedulerConfig(max_num_seqs=4), drafting=drafting)
    params = [SamplingParams(temperature=0, max_tokens=20, detokenize=False) for _ in range(4)]
    done: dict[str, RequestOutput] = {}
    engine.add_request("0", [3, 4, 5], params[0])
    for i in range(1, 4):
        for _ in range(2):
            done |= {o.request_id: o for o in engine.step() if o.finished}
            engine.scheduler.check()
        engine.add_request(str(i), [3, 4, 5], params[i])
    while engine.has_unfinished_requests():
        done |= {o.request_id: o for o in engine.step() if o.finished}
        engine.scheduler.check()
    engine.close()
    assert shown([done[str(i)] for i in range(4)]) == shown(run(engine_of(None), params))
    assert drafting.stats.num_accepted_tokens


@pytest.mark.parametrize("value", [-1, "2", 1.5, True])
def test_a_number_of_guesses_that_is_none_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"extra_args\['num_speculative_tokens'\]"):
        SamplingParams(extra_args={"num_speculative_tokens": value})


@pytest.mark.parametrize("token", [-1, 24])
def test_a_token_beyond_the_vocabulary_is_not_read(token: int) -> None:
    class Beyond:
        def propose(self, known: Series[Known]) -> list[list[int]]:
            return [[5, token] for _ in known]

    with pytest.raises(RuntimeError, match=f"Beyond guessed token {token}, wanted 0 to 23"):
        run(engine_of(None, drafter=Beyond()), [SamplingParams(max_tokens=6, detokenize=False)])
