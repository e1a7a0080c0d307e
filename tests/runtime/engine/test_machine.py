"""One machine for engine, scheduler and pool: whatever happens, every request gets what it gets alone.

Requests arrive, are aborted, blocked, paused; steps fail; the host is interrupted at any line; policies, limits and
asynchronous steps are drawn. After every rule the invariants hold; in the end every request has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import pytest
from drawn_requests import Drawn, alone, drawn_requests
from fake_tokenizer import FakeTokenizer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from seamwise.runtime.engine import answer, loop
from seamwise.runtime.engine import engine as engine_module
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.engine.outputs import RequestOutput
from seamwise.runtime.sampling.params import RequestOutputKind
from seamwise.runtime.scheduler import commit, queue, scheduler, slots
from seamwise.runtime.scheduler.config import QueueFullError, SchedulerConfig
from seamwise.runtime.scheduler.policies import OURS
from seamwise.testing import FakeRunner

_INTERRUPTED = {m.__file__ for m in (answer, loop, engine_module, commit, queue, scheduler, slots)}
_PATIENCE = 4000  # steps in which everything must have ended


class Interrupted(BaseException):
    """What a Ctrl-C is, at a line of our choice."""


def interrupt_at(count: int, call: Callable[[], Any]) -> Any:
    """Call, and raise Interrupted before the count-th line that is run of the code that changes state."""
    left = count

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename not in _INTERRUPTED or frame.f_code.co_name in ("__exit__", "_hand_over"):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                raise Interrupted
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(before)


class EngineMachine(RuleBasedStateMachine):
    """The engine beside what each of its requests would get from an engine of its own."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]), blocks=st.integers(4, 16), budget=st.integers(1, 24),
        seats=st.integers(1, 5), caching=st.booleans(), asynchronous=st.booleans(), policy=st.sampled_from([*OURS]),
        threshold=st.sampled_from([0, 0, 3]), watermark=st.sampled_from([0.0, 0.2]), reserve=st.booleans(),
        fail_at=st.frozensets(st.integers(1, 40), max_size=4), queued=st.sampled_from([None, None, 3]),
    )  # fmt: skip
    def begin(
        self, block_size: int, blocks: int, budget: int, seats: int, caching: bool, asynchronous: bool, policy: str,
        threshold: int, watermark: float, reserve: bool, fail_at: frozenset[int], queued: int | None,
    ) -> None:  # fmt: skip
        self.runner = FakeRunner(num_blocks=blocks + 1, block_size=block_size, max_tokens=budget, fail_at=fail_at)
        config = SchedulerConfig(
            max_num_batched_tokens=budget, max_num_seqs=seats, async_scheduling=asynchronous, scheduling_policy=policy,
            long_prefill_token_threshold=threshold, watermark=watermark, scheduler_reserve_full_isl=reserve,
            max_num_queued_reqs=queued,
        )  # fmt: skip
        self.tokenizer = FakeTokenizer()
        self.engine = Engine(self.runner, self.tokenizer, config, enable_prefix_caching=caching)  # type: ignore[arg-type]
        self.wanted: dict[str, Drawn] = {}
        self.got: dict[str, RequestOutput] = {}
        self.tokens: dict[str, list[list[int]]] = {}
        self.texts: dict[str, list[str]] = {}
        self.blocked: set[str] = set()
        self.paused = False

    @rule(request=drawn_requests(), priority=st.integers(0, 2), tenant=st.sampled_from("ab"), blocked=st.booleans())
    def add(self, request: Drawn, priority: int, tenant: str, blocked: bool) -> None:
        name = str(len(self.wanted))
        try:
            self.engine.add_request(
                name, list(request.prompt), request.params, priority=priority, tenant=tenant,
                blocked="grammar" if blocked else None, cache_salt=request.salt,
            )  # fmt: skip
        except QueueFullError as error:
            assert "max_num_queued_reqs=3" in str(error)
            return
        except ValueError as error:
            assert "KV cache blocks" in str(error)
            return
        self.wanted[name] = request
        if blocked:
            self.blocked.add(name)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.one_step()

    @rule(count=st.integers(1, 900))
    def interrupted_step(self, count: int) -> None:
        try:
            outputs = interrupt_at(count, partial(self.engine.step, wait_s=0))
        except Interrupted:
            return
        except RuntimeError as error:
            assert "as told" in str(error) or "before this one" in str(error)
            return
        self.take(outputs)

    @precondition(lambda self: self.engine.has_unfinished_requests())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from([*self.wanted]))
        output = self.engine.abort_request(name)
        if output is not None:
            assert output.finished and name not in self.got
            self.take([output])

    @precondition(lambda self: self.blocked)
    @rule()
    def unblock(self) -> None:
        name = self.blocked.pop()
        if name not in self.got:
            self.engine.unblock(name)

    @rule(mode=st.sampled_from(["wait", "keep", "abort"]), clear=st.booleans())
    def pause(self, mode: str, clear: bool) -> None:
        try:
            self.take(self.engine.pause(mode, clear_cache=clear))
        except RuntimeError as error:
            assert "as told" in str(error) or "before this one" in str(error)
        self.paused = True

    @precondition(lambda self: self.paused)
    @rule()
    def resume(self) -> None:
        try:
            self.engine.resume()
        except RuntimeError as error:
            assert "as told" in str(error)
            self.engine.resume()
        self.paused = False

    @rule(version=st.sampled_from("xyz"))
    def change_weights(self, version: str) -> None:
        try:
            self.engine.weights_changed(version)
        except RuntimeError as error:
            assert "as told" in str(error)

    def one_step(self) -> None:
        try:
            outputs = self.engine.step(wait_s=0)
        except RuntimeError as error:
            assert "as told" in str(error)
            return
        self.take(outputs)

    def take(self, outputs: list[RequestOutput]) -> None:
        """Put outputs together, and check that each holds what its kind says."""
        for output in outputs:
            name = output.request_id
            assert name not in self.got, "an output comes after the last one"
            drawn = self.wanted[name]
            tokens = self.tokens.setdefault(name, [[] for _ in output.outputs])
            texts = self.texts.setdefault(name, ["" for _ in output.outputs])
            kind = drawn.params.output_kind
            assert kind is not RequestOutputKind.FINAL_ONLY or output.finished
            for i, completion in enumerate(output.outputs):
                if kind is RequestOutputKind.DELTA:
                    tokens[i] += completion.token_ids
                    texts[i] += completion.text
                else:
                    assert completion.token_ids[: len(tokens[i])] == tokens[i]
                    assert completion.text.startswith(texts[i])
                    tokens[i], texts[i] = completion.token_ids, completion.text
            if output.finished:
                self.got[name] = output
                self.compare(name)

    def compare(self, name: str) -> None:
        drawn, output = self.wanted[name], self.got[name]
        wanted = alone(drawn, self.runner)
        for w, g, tokens, text in zip(wanted, output.outputs, self.tokens[name], self.texts[name], strict=True):
            if g.finish_reason == "abort":
                assert tokens == w.token_ids[: len(tokens)] and w.text.startswith(text[: len(w.text)])
                continue
            assert (tokens, text, g.finish_reason, g.stop_reason) == (
                w.token_ids,
                w.text,
                w.finish_reason,
                w.stop_reason,
            )
            if g.logprobs is not None and drawn.params.output_kind is not RequestOutputKind.DELTA:
                assert g.logprobs == w.logprobs and g.cumulative_logprob == w.cumulative_logprob
        whole = drawn.params.output_kind is not RequestOutputKind.DELTA and any(self.tokens[name])
        if whole and drawn.params.prompt_logprobs is not None and output.outputs[0].finish_reason != "abort":
            assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(drawn.prompt)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "engine") and not self.engine._change.torn:
            self.engine.scheduler.check()
            waiting = len(self.engine.scheduler.queue)
            assert sum(self.engine.scheduler.reasons().values()) == waiting, "a request waits without a reason"

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for name in self.blocked - self.got.keys():
            self.engine.unblock(name)
        while self.paused:
            self.resume()
        steps = 0
        while self.engine.has_unfinished_requests():
            self.one_step()
            steps += 1
            assert steps < _PATIENCE, "the engine makes no progress"
        assert self.got.keys() == self.wanted.keys(), "a request has no end"
        try:
            self.engine.drain()
        except RuntimeError:
            self.engine.drain()
        self.engine.scheduler.check()
        pool = self.engine.scheduler.pool
        assert not pool.holders and pool.num_available == pool.num_blocks - 1, "blocks are lost"
        self.engine.close()


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.exhaustive
def test_a_million_steps() -> None:
    """Run with `pytest -m exhaustive`; steps are counted over all examples."""
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        EngineMachine, settings=settings(max_examples=10_000, stateful_step_count=60, deadline=None)
    )
