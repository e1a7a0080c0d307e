"""The engine over a runner whose logits are a hash of the history: no schedule may change what a request gets."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from fake_tokenizer import FakeTokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.engine.outputs import RequestOutput
from seamwise.runtime.sampling.params import RepetitionDetectionParams, RequestOutputKind, SamplingParams
from seamwise.runtime.sampling.stop import ended_by_token
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.testing import FakeRunner


@dataclass(frozen=True)
class Arrival:
    """A request, the step before which it arrives, and the one before which it is aborted (None: never)."""

    prompt: tuple[int, ...]
    params: SamplingParams
    at: int
    abort_at: int | None = None


@st.composite
def arrivals(draw: Any) -> list[Arrival]:
    """Draw requests whose prompts often share their starts, whole blocks of them too."""
    stem = draw(st.lists(st.integers(3, 6), min_size=1, max_size=24))
    found = []
    for _ in range(draw(st.integers(1, 6))):
        prompt = stem[: draw(st.integers(0, len(stem)))] + draw(st.lists(st.integers(3, 6), min_size=1, max_size=9))
        params = SamplingParams(
            n=draw(st.sampled_from([1, 1, 1, 2])),
            temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.5])),
            top_k=draw(st.sampled_from([0, 3])),
            top_p=draw(st.sampled_from([1.0, 0.8])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.3])),
            presence_penalty=draw(st.sampled_from([0.0, 0.5])),
            seed=draw(st.integers(0, 9)),
            max_tokens=draw(st.integers(1, 14)),
            ignore_eos=draw(st.booleans()),
            logprobs=draw(st.sampled_from([None, None, 2])),
            detokenize=False,
        )
        abort_at = draw(st.sampled_from([None, None, None, 4]))
        found.append(Arrival(tuple(prompt), params, at=draw(st.integers(0, 8)), abort_at=abort_at))
    return found


def alone(arrival: Arrival, index: int, block_size: int) -> RequestOutput:
    """Return what a request gets with an engine to itself, all of its prompt in one step."""
    runner = FakeRunner(num_blocks=200, block_size=block_size)
    engine = Engine(runner, None, SchedulerConfig(), enable_prefix_caching=False)
    engine.add_request("alone", list(arrival.prompt), arrival.params)
    output = None
    while engine.has_unfinished_requests():
        (output,) = engine.step()
    assert output is not None
    return output


def tokens_needed(arrival: Arrival) -> int:
    assert arrival.params.max_tokens is not None
    return len(arrival.prompt) + arrival.params.max_tokens - 1


@settings(max_examples=60, deadline=None)
@given(
    requests=arrivals(),
    block_size=st.sampled_from([1, 2, 4]),
    spare_blocks=st.integers(0, 6),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 5),
    caching=st.booleans(),
    fail_at=st.frozensets(st.integers(1, 12), max_size=3),
    asynchronous=st.booleans(),
)
def test_every_request_gets_what_it_gets_alone(
    requests: list[Arrival], block_size: int, spare_blocks: int, budget: int, max_num_seqs: int, caching: bool,
    fail_at: frozenset[int], asynchronous: bool,
) -> None:  # fmt: skip
    """Any arrivals, chunk budget, number of blocks down to the least, sharing, aborts and failing steps."""
    blocks = 1 + spare_blocks + max(-(-tokens_needed(a) // block_size) for a in requests)
    runner = FakeRunner(num_blocks=blocks, block_size=block_size, max_tokens=budget, fail_at=fail_at)
    config = SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=max_num_seqs, async_scheduling=asynchronous)
    engine = Engine(runner, None, config, enable_prefix_caching=caching)
    outputs: dict[str, RequestOutput] = {}
    step = 0
    while engine.has_unfinished_requests() or any(a.at >= step for a in requests):
        for i, arrival in enumerate(requests):
            if arrival.at == step:
                engine.add_request(str(i), list(arrival.prompt), arrival.params)
            if arrival.abort_at == step and (aborted := engine.abort_request(str(i))):
                outputs[str(i)] = aborted
        try:
            outputs |= {output.request_id: output for output in engine.step()}
        except RuntimeError as error:
            assert "as told" in str(error)
        engine.scheduler.check()
        step += 1
        assert step < 2000, "the engine makes no progress"
    with contextlib.suppress(RuntimeError):  # a step in which nobody is left may be the one that fails
        engine.drain()
    engine.scheduler.check()
    for i, arrival in enumerate(requests):
        wanted, got = alone(arrival, i, block_size), outputs[str(i)]
        assert got.finished
        for w, g in zip(wanted.outputs, got.outputs, strict=True):
            if g.finish_reason == "abort":
                assert g.token_ids == w.token_ids[: len(g.token_ids)]
            else:
                assert (g.token_ids, g.finish_reason, g.stop_reason) == (w.token_ids, w.finish_reason, w.stop_reason)
                assert g.logprobs == w.logprobs
    assert not engine.scheduler.pool.holders
    assert engine.scheduler.pool.num_available == blocks - 1


def run(engine: Engine) -> dict[str, RequestOutput]:
    outputs = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
    return outputs


def make_engine(**options: Any) -> Engine:
    settings = {"num_blocks": 64, "block_size": 4} | options
    return Engine(FakeRunner(**settings), None, SchedulerConfig())


GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, detokenize=False)


def test_greedy_tokens_are_the_argmax_of_the_history() -> None:
    engine = make_engine()
    engine.add_request("a", [5, 3, 4], GREEDY)
    history = [5, 3, 4]
    for token in run(engine)["a"].outputs[0].token_ids:
        assert token == int(engine.runner.logits_after(history).argmax())
        history.append(token)
    assert len(history) == 3 + 16


def test_a_shared_prefix_is_computed_once() -> None:
    engine = make_engine()
    prompt = list(range(3, 20))
    engine.add_request("first", prompt, replace(GREEDY, max_tokens=1))
    run(engine)
    engine.runner.num_computed = 0
    engine.add_request("second", prompt, replace(GREEDY, max_tokens=1))
    output = run(engine)["second"]
    assert output.metrics.num_cached_tokens == 16
    assert engine.runner.num_computed == 1


def test_a_wholly_cached_prompt_still_computes_its_last_token() -> None:
    engine = make_engine()
    for request_id in ("first", "second"):
        engine.add_request(request_id, list(range(3, 19)), replace(GREEDY, max_tokens=1))
        output = run(engine)[request_id]
    assert output.metrics.num_cached_tokens == 12


def test_requests_of_one_step_share_the_prefix_that_it_computes() -> None:
    engine = make_engine()
    for request_id in ("first", "second"):
        engine.add_request(request_id, list(range(3, 19)), replace(GREEDY, max_tokens=1))
    engine.step()
    assert engine.runner.num_computed == 16 + 4


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ([], GREEDY, "no tokens"),
        ([3, 24], GREEDY, "token id 24, wanted 0 to 23"),
        ([3] * 60, GREEDY, "60 tokens, max_model_len is 60"),
        ([3] * 9, replace(GREEDY, stop_token_ids=[99]), "token id 99"),
        ([3] * 9, replace(GREEDY, logit_bias={24: 1.0}), "token id 24"),
        ([3] * 9, SamplingParams(), "needs a tokenizer"),
        ([3] * 9, replace(GREEDY, max_tokens=None, min_tokens=52), "room for 51"),
        ([3] * 50, replace(GREEDY, max_tokens=2), "needs 13 KV cache blocks of 4 tokens, the cache has 12"),
    ],
)
def test_a_bad_request_is_refused_and_the_others_go_on(prompt: list[int], params: SamplingParams, words: str) -> None:
    engine = make_engine(max_model_len=60, num_blocks=13)
    engine.add_request("good", [3, 4], GREEDY)
    engine.step()
    with pytest.raises(ValueError, match=words):
        engine.add_request("bad", prompt, params)
    with pytest.raises(ValueError, match="'good' is in use"):
        engine.add_request("good", [3], GREEDY)
    outputs = run(engine)
    assert list(outputs) == ["good"]
    assert len(outputs["good"].outputs[0].token_ids) == 16


def test_max_tokens_none_goes_on_to_max_model_len() -> None:
    engine = make_engine(max_model_len=40)
    engine.add_request("a", [3] * 7, replace(GREEDY, max_tokens=None))
    output = run(engine)["a"].outputs[0]
    assert (len(output.token_ids), output.finish_reason) == (33, "length")


def biased(token: int, **options: Any) -> SamplingParams:
    """Return greedy parameters that always choose one token, where it is allowed."""
    return replace(GREEDY, logit_bias={token: 1e3}, **options)


@pytest.mark.parametrize(
    ("params", "count", "reason", "stop_reason"),
    [
        (biased(2, ignore_eos=False), 1, "stop", None),
        (biased(2, ignore_eos=True), 16, "length", None),
        (biased(7, stop_token_ids=[9, 7]), 1, "stop", 7),
        (biased(2, ignore_eos=False, min_tokens=5), 6, "stop", None),
        (biased(7, stop_token_ids=[7], min_tokens=5), 6, "stop", 7),
        (biased(2, ignore_eos=False, min_tokens=16), 16, "length", None),
    ],
)
def test_what_ends_an_output(params: SamplingParams, count: int, reason: str, stop_reason: int | None) -> None:
    engine = make_engine(eos_ids=(1, 2))
    engine.add_request("a", [3], params)
    output = run(engine)["a"].outputs[0]
    assert (len(output.token_ids), output.finish_reason, output.stop_reason) == (count, reason, stop_reason)


def test_n_outputs_differ_and_are_reproducible() -> None:
    params = SamplingParams(n=3, seed=1, temperature=2.0, ignore_eos=True, detokenize=False)
    found = []
    for _ in range(2):
        engine = make_engine()
        engine.add_request("a", [3, 4, 5], params)
        output = run(engine)["a"]
        assert [o.index for o in output.outputs] == [0, 1, 2]
        found.append([tuple(o.token_ids) for o in output.outputs])
    assert found[0] == found[1]
    assert len(set(found[0])) == 3


def test_requests_without_a_seed_differ_and_follow_the_engine_seed() -> None:
    params = SamplingParams(temperature=2.0, ignore_eos=True, detokenize=False)

    def outputs(seed: int) -> list[list[int]]:
        engine = Engine(FakeRunner(num_blocks=64, block_size=4), None, SchedulerConfig(), seed=seed)
        for request_id in "abc":
            engine.add_request(request_id, [3, 4, 5], params)
        return [o.outputs[0].token_ids for o in run(engine).values()]

    assert outputs(0) == outputs(0) != outputs(1)
    assert len({tuple(o) for o in outputs(0)}) == 3


def test_logprobs_are_of_the_raw_distribution_and_add_up() -> None:
    engine = make_engine()
    engine.add_request("a", [3, 4, 5], replace(GREEDY, logprobs=2, logit_bias={7: 1e3}, max_tokens=4))
    output = run(engine)["a"].outputs[0]
    assert output.token_ids == [7] * 4
    assert output.logprobs is not None
    assert all({1, 2} <= {lp.rank for lp in position.values()} for position in output.logprobs)
    assert output.cumulative_logprob == pytest.approx(sum(position[7].logprob for position in output.logprobs))
    assert output.cumulative_logprob < -1


def test_abort_of_one_of_many() -> None:
    engine = make_engine()
    for request_id in "ab":
        engine.add_request(request_id, [3, 4], GREEDY)
    engine.step()
    aborted = engine.abort_request("a")
    assert aborted is not None and aborted.finished
    assert (aborted.outputs[0].finish_reason, len(aborted.outputs[0].token_ids)) == ("abort", 1)
    assert engine.abort_request("a") is None
    assert list(run(engine)) == ["b"]


def test_a_failing_step_loses_no_token() -> None:
    engine = make_engine(fail_at=frozenset({3}))
    engine.add_request("a", [3, 4, 5, 6, 3], GREEDY)
    engine.step()
    engine.step()
    with pytest.raises(RuntimeError, match="as told"):
        engine.step()
    got = run(engine)["a"].outputs[0].token_ids
    clean = make_engine()
    clean.add_request("a", [3, 4, 5, 6, 3], GREEDY)
    assert got == run(clean)["a"].outputs[0].token_ids


def test_aborting_ten_thousand_waiting_requests_takes_no_time_each() -> None:
    engine = make_engine(num_blocks=8)
    for i in range(10_000):
        engine.add_request(str(i), [3, 4, 5], GREEDY)
    began = time.process_time()  # of a processor, which others may share
    for i in range(10_000):
        engine.abort_request(str(i))
    took_ms = 1000 * (time.process_time() - began)
    assert took_ms < 150, f"{took_ms:.0f} ms"  # 48-54 with both cores taken by others; walking a queue takes seconds
    assert not engine.has_unfinished_requests()
    engine.scheduler.check()


def test_what_fails_in_one_text_ends_that_request_alone() -> None:
    runner = FakeRunner(num_blocks=64, block_size=4)
    engine = Engine(runner, FakeTokenizer(broken=9), SchedulerConfig())  # type: ignore[arg-type]
    engine.add_request("good", [3, 4], SamplingParams(temperature=0, ignore_eos=True, logit_bias={5: 1e3}))
    engine.add_request("bad", [3, 4], SamplingParams(temperature=0, ignore_eos=True, logit_bias={9: 1e3}))
    outputs = run(engine)
    assert outputs["good"].outputs[0].finish_reason == "length" and len(outputs["good"].outputs[0].token_ids) == 16
    failed = outputs["bad"].outputs[0]
    assert failed.finish_reason == "error" and "request bad: KeyError: 'token 9 is not" in str(failed.stop_reason)


def test_a_logits_processor_that_raises_ends_its_request_alone() -> None:
    def broken(output: list[int], logits: Any) -> Any:
        if len(output) == 2:
            raise ZeroDivisionError("by its author")
        return logits

    engine = make_engine()
    engine.add_request("good", [3, 4], GREEDY)
    engine.add_request("bad", [3, 4], replace(GREEDY, logits_processors=[broken]))
    outputs = run(engine)
    assert len(outputs["good"].outputs[0].token_ids) == 16
    failed = outputs["bad"].outputs[0]
    assert (len(failed.token_ids), failed.finish_reason) == (2, "error")
    assert "ZeroDivisionError: by its author" in str(failed.stop_reason)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_max_tokens_beyond_the_cache_ends_by_length_where_the_cache_does(asynchronous: bool) -> None:
    runner = FakeRunner(num_blocks=5, block_size=4)
    engine = Engine(runner, None, SchedulerConfig(async_scheduling=asynchronous))
    for name in "ab":
        engine.add_request(name, [3] * 7, replace(GREEDY, max_tokens=100))
    for output in run(engine).values():  # 16 tokens fit, and one more is sampled
        assert (len(output.outputs[0].token_ids), output.outputs[0].finish_reason) == (10, "length")


def test_kinds_of_output_and_their_interval() -> None:
    engine = make_engine()
    for name, kind in zip("cdf", RequestOutputKind, strict=True):
        engine.add_request(name, [3, 4], replace(GREEDY, max_tokens=8, output_kind=kind, stream_interval=3))
    seen: dict[str, list[int]] = {"c": [], "d": [], "f": []}
    while engine.has_unfinished_requests():
        for output in engine.step():
            seen[output.request_id].append(len(output.outputs[0].token_ids))
    assert seen == {"c": [1, 4, 7, 8], "d": [1, 3, 3, 1], "f": [8]}


def test_prompt_logprobs_are_given_once_and_computed_whole() -> None:
    engine = make_engine()
    prompt = [3, 4, 5, 6, 3, 4, 5, 6, 5]
    engine.add_request("first", prompt, GREEDY)
    run(engine)
    engine.add_request("a", prompt, replace(GREEDY, prompt_logprobs=2, max_tokens=2))
    found = run(engine)["a"]
    assert found.metrics.num_cached_tokens == 0 and found.prompt_logprobs is not None
    assert found.prompt_logprobs[0] is None and len(found.prompt_logprobs) == len(prompt)
    for place, entries in enumerate(found.prompt_logprobs[1:], start=1):
        exact = torch.from_numpy(engine.runner.logits_after(prompt[:place])).log_softmax(-1)
        assert entries is not None and {*exact.topk(2).indices.tolist(), prompt[place]} == {*entries}
        assert entries[prompt[place]].logprob == pytest.approx(float(exact[prompt[place]]), abs=1e-5)


@pytest.mark.parametrize(
    ("tokens", "wanted"), [([5, 5, 5], 3), ([4, 5, 4, 5], None), ([5, 6, 5, 6, 5, 6], 6), ([3, 5, 5, 5, 5], 4)]
)
def test_a_repetition_ends_an_output(tokens: list[int], wanted: int | None) -> None:
    detection = RepetitionDetectionParams(max_pattern_size=2, min_count=3)
    params = replace(GREEDY, repetition_detection=detection)
    ends = [ended_by_token(tokens[:i], t, params, (), 99) for i, t in enumerate(tokens)]
    assert next((i + 1 for i, end in enumerate(ends) if end), None) == wanted
    assert all(end in (None, ("repetition", None)) for end in ends)
    assert ended_by_token(tokens[:-1], tokens[-1], replace(params, min_tokens=9), (), 99) is None


def test_the_order_of_stops() -> None:
    """EOS before stop tokens before length before repetition, whatever else holds at the same token."""
    detection = RepetitionDetectionParams(max_pattern_size=1, min_count=2)
    params = replace(GREEDY, stop_token_ids=[7], repetition_detection=detection)
    ending = {"eos": (7,), "none": ()}
    assert ended_by_token([7], 7, params, ending["eos"], 2) == ("stop", None)
    assert ended_by_token([7], 7, params, ending["none"], 2) == ("stop", 7)
    assert ended_by_token([6], 6, params, ending["eos"], 2) == ("length", None)
    assert ended_by_token([6], 6, params, ending["eos"], 3) == ("repetition", None)
    assert ended_by_token([5], 6, params, ending["eos"], 3) is None


def test_a_step_waits_where_every_request_waits_for_something_else() -> None:
    """A loop around step() does not spin, and goes on as soon as somebody says that there is something new."""
    engine = make_engine()
    engine.add_request("a", [3] * 9, GREEDY, blocked="adapter")
    began = time.perf_counter()
    assert engine.has_unfinished_requests() and engine.step(wait_s=0.1) == []
    assert time.perf_counter() - began >= 0.1
    assert engine.step(wait_s=0.0) == []
    threading.Timer(0.05, engine.wake).start()
    began = time.perf_counter()
    assert engine.step(wait_s=90) == [] and time.perf_counter() - began < 60
    engine.add_request("b", [3] * 9, GREEDY)  # beside one that can be computed, nobody waits
    began = time.perf_counter()
    while "b" in engine._requests:
        engine.step(wait_s=90)
    engine.unblock("a")
    assert {*run(engine)} == {"a"} and time.perf_counter() - began < 60
    engine.pause("keep")
    engine.add_request("c", [3] * 9, GREEDY)
    began = time.perf_counter()
    assert engine.step(wait_s=0.1) == [] and time.perf_counter() - began >= 0.1
    engine.close()


def test_pausing_in_each_way() -> None:
    engine = make_engine()
    engine.add_request("a", [3] * 9, GREEDY)
    engine.step()
    engine.pause("keep")
    assert engine.is_paused and not engine.scheduler.running and not engine.scheduler.pool.names
    engine.add_request("b", [3] * 9, GREEDY)
    for _ in range(3):
        engine.step()
    assert engine.runner.num_steps <= 3 and engine.scheduler.reasons()["paused"] == 1
    engine.resume()
    assert {*run(engine)} == {"a", "b"}
    engine.add_request("c", [3] * 9, GREEDY)
    engine.step()
    engine.pause("wait")
    engine.add_request("d", [3] * 9, GREEDY)
    assert not engine.is_paused
    done = set()
    while not engine.is_paused:
        done |= {output.request_id for output in engine.step() if output.finished}
    assert done == {"c"} and engine.has_unfinished_requests()
    engine.resume()
    engine.step()
    aborted = engine.pause("abort")
    assert [(o.request_id, o.outputs[0].finish_reason) for o in aborted] == [("d", "abort")]
    with pytest.raises(ValueError, match="mode='stop', wanted 'abort', 'wait' or 'keep'"):
        engine.pause("stop")


def test_other_weights_and_other_salts_find_nothing() -> None:
    engine = make_engine()
    prompt = list(range(3, 20))

    def cached(name: str, **options: Any) -> int:
        engine.add_request(name, prompt, replace(GREEDY, max_tokens=1), **options)
        return run(engine)[name].metrics.num_cached_tokens

    assert [cached("a"), cached("b"), cached("c", cache_salt="x"), cached("d", cache_salt="x")] == [0, 16, 0, 16]
    engine.weights_changed("step 1")
    assert [cached("e"), cached("f")] == [0, 16]
