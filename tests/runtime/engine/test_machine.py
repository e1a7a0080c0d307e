"""One machine for engine, scheduler and pool: whatever happens, every request gets what it gets alone.

Requests arrive, are aborted, blocked, paused; steps fail; the host is interrupted at any line; tiers behind the cache
work when they like and lose what they hold; policies, limits and asynchronous steps are drawn. After every rule the
invariants hold; in the end every request has ended.
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
from collections.abc import Callable
from collections.abc import Sequence as Series
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import pytest
from drawn_requests import Drawn, alone, drawn_requests
from drawn_tiers import FAULTS, ByHand, FaultyDisk, make_tiers
from fake_tokenizer import FakeTokenizer
from hypothesis import seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from seamwise.runtime.build.kv_groups import FULL, Groups, KVGroup
from seamwise.runtime.build.step import StepInput, StepOutput
from seamwise.runtime.engine import answer, drafting, loop
from seamwise.runtime.engine import engine as engine_module
from seamwise.runtime.engine.drafting import Drafting
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.engine.outputs import RequestOutput
from seamwise.runtime.kv import block_store, offload
from seamwise.runtime.sampling.params import RequestOutputKind
from seamwise.runtime.scheduler import commit, queue, scheduler, slots, waiting_for_tiers
from seamwise.runtime.scheduler.config import QueueFullError, SchedulerConfig
from seamwise.runtime.scheduler.plan import plan
from seamwise.runtime.scheduler.policies import OURS
from seamwise.runtime.scheduler.view import Plan, View
from seamwise.runtime.speculation.drafter import Known
from seamwise.runtime.speculation.watch import Watch
from seamwise.testing import FakeRunner

_INTERRUPTED = {
    m.__file__
    for m in (
        answer, block_store, drafting, loop, engine_module, commit, offload, queue, scheduler, slots, waiting_for_tiers
    )
}  # fmt: skip
GROUPS: list[Groups] = [
    (FULL,), (FULL,), (KVGroup(kind="sliding_window", size=5),), (FULL, KVGroup(kind="sliding_window", size=3)),
    (KVGroup(kind="sliding_window", size=1), FULL, KVGroup(kind="chunked_local", size=6)),
    (KVGroup(kind="chunked_local", size=4), KVGroup(kind="sliding_window", size=7)),
]  # fmt: skip
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


class Always(Watch):
    """Speculation is never switched off by how long steps take here."""

    def wants(self, sequences: int) -> bool:
        return True


class Guesses:
    """A drafter whose first `right` tokens are the most likely ones, and whose next ones are not.

    in_place  it has blocks for its guesses before it makes them
    """

    def __init__(self, runner: FakeRunner, right: int, in_place: bool = False) -> None:
        self.runner, self.right, self.in_place = runner, right, in_place

    def propose(self, known: Series[Known]) -> list[list[int]]:
        found = []
        for one in known:
            tokens, guess = one.tokens.tolist(), []
            reach = (len(tokens) + one.most - 1) // self.runner.block_size
            assert not self.in_place or one.tables[:, reach].all(), "a guess has no block"
            for place in range(one.most):
                order = self.runner.logits_after([*tokens, *guess]).argsort()
                guess.append(int(order[-1 if place < self.right else 0]))
            found.append(guess)
        return found


class Ahead(Guesses):
    """One that keeps something with each block that depends on the token after it: who shares one agrees on that."""

    names_ahead = 1

    def watching(self, steps: FakeRunner) -> Ahead:
        self.after: dict[int, int] = {}
        return self

    def step(self, batch: StepInput) -> StepOutput:
        for written, _ in batch.groups:
            for block in {slot // self.runner.block_size for slot in written.tolist()}:
                self.after.pop(block, None)
        return self.runner.step(batch)

    def propose(self, known: Series[Known]) -> list[list[int]]:
        for one in known:
            behind = one.tokens[self.runner.block_size :: self.runner.block_size].tolist()
            for table in one.tables.tolist():
                for block, token in zip(table, behind, strict=False):
                    if block:
                        assert self.after.setdefault(block, token) == token, "a block is shared before other tokens"
        return super().propose(known)


class EngineMachine(RuleBasedStateMachine):
    """The engine beside what each of its requests is to get.

    fixed      arguments of begin() that are not drawn
    num_steps  of all engines until now
    """

    fixed: ClassVar[dict[str, Any]] = {}
    num_steps: ClassVar[int] = 0

    @initialize(
        block_size=st.sampled_from([1, 2, 4]), blocks=st.integers(4, 16), budget=st.integers(1, 24),
        seats=st.integers(1, 5), caching=st.booleans(), asynchronous=st.booleans(), policy=st.sampled_from([*OURS]),
        threshold=st.sampled_from([0, 0, 3]), watermark=st.sampled_from([0.0, 0.2]), reserve=st.booleans(),
        fail_at=st.frozensets(st.integers(1, 40), max_size=4), queued=st.sampled_from([None, None, 3]),
        groups=st.sampled_from(GROUPS), calm=st.sampled_from([True, True, False]),
        guesses=st.sampled_from([None, None, 0, 1, 4]), tiers=st.sampled_from([None, None, "host", "disk", "both"]),
        ahead=st.integers(1, 12), room=st.integers(1, 20),
    )  # fmt: skip
    def begin(self, **drawn: Any) -> None:
        self.start(**(drawn | self.fixed))

    def start(
        self, *, block_size: int, blocks: int, budget: int, seats: int, caching: bool, asynchronous: bool, policy: str,
        threshold: int, watermark: float, reserve: bool, fail_at: frozenset[int], queued: int | None,
        groups: Groups, calm: bool, guesses: int | None, tiers: str | None, ahead: int, room: int,
    ) -> None:  # fmt: skip
        self.runner = FakeRunner(
            num_blocks=blocks * len(groups) + 1, block_size=block_size, max_tokens=budget, fail_at=fail_at,
            kv_groups=groups,
        )  # fmt: skip
        config = SchedulerConfig(
            max_num_batched_tokens=budget, max_num_seqs=seats, async_scheduling=asynchronous, scheduling_policy=policy,
            long_prefill_token_threshold=threshold, watermark=watermark, scheduler_reserve_full_isl=reserve,
            max_num_queued_reqs=queued,
        )  # fmt: skip
        self.tokenizer = FakeTokenizer()
        self.folder = tempfile.TemporaryDirectory(prefix="seamwise-test-")
        made = make_tiers(tiers or "disk", Path(self.folder.name), self.runner.kv_block_bytes, room)
        self.disk = made[-1]
        self.offload = ByHand(self.runner, made, ahead=ahead) if tiers and caching else None
        drafter = Ahead if guesses == 1 and self.offload is None else Guesses
        guessing = None if guesses is None else Drafting(
            drafter=drafter(self.runner, guesses, in_place=guesses == 1), most=4, watch=Always()
        )  # fmt: skip
        self.engine = Engine(
            self.runner, self.tokenizer, config, enable_prefix_caching=caching, drafting=guessing,  # type: ignore[arg-type]
            recorder=self.planned, offload=self.offload,
        )  # fmt: skip
        self.wanted: dict[str, Drawn] = {}
        self.got: dict[str, RequestOutput] = {}
        self.tokens: dict[str, list[list[int]]] = {}
        self.texts: dict[str, list[str]] = {}
        self.blocked: set[str] = set()
        self.paused, self.calm = False, calm

    @rule(
        request=drawn_requests(), priority=st.integers(0, 2), tenant=st.sampled_from("ab"),
        blocked=st.sampled_from([False, False, False, True]),
        twins=st.sampled_from([1, 1, 2]),
    )  # fmt: skip
    def add(self, request: Drawn, priority: int, tenant: str, blocked: bool, twins: int) -> None:
        for _ in range(twins):
            self.add_one(request, priority, tenant, blocked)

    def add_one(self, request: Drawn, priority: int, tenant: str, blocked: bool) -> None:
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

    @precondition(lambda self: self.offload)
    @rule(which=st.integers(0, 2), count=st.integers(1, 4))
    def work(self, which: int, count: int) -> None:
        """One of the threads copies, stores or loads."""
        self.offload.hands[which].run(count)

    @precondition(lambda self: self.offload and isinstance(self.disk, FaultyDisk))
    @rule(faults=st.lists(st.sampled_from([None, *FAULTS]), max_size=6))
    def damage(self, faults: list[str | None]) -> None:
        self.disk.faults.extend(faults)

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.one_step()

    @rule(count=st.integers(1, 900))
    def interrupted_step(self, count: int) -> None:
        EngineMachine.num_steps += 1
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

    @precondition(lambda self: not self.calm)  # else what stays for long is not seen often
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

    @precondition(lambda self: not self.calm)
    @rule(version=st.sampled_from("xyz"))
    def change_weights(self, version: str) -> None:
        try:
            self.engine.weights_changed(version)
        except RuntimeError as error:
            assert "as told" in str(error)
        else:
            self.runner.weights += 1  # what is in the cache by now must not be read again

    def one_step(self) -> None:
        EngineMachine.num_steps += 1
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
        wanted = alone(drawn, self.runner, self.engine.scheduler.longest)
        for w, g, tokens, text in zip(wanted.outputs, output.outputs, self.tokens[name], self.texts[name], strict=True):
            if g.finish_reason == "abort":
                shown = text[: len(w.text)].rstrip("\ufffd")  # it may have ended inside a character
                assert tokens == w.token_ids[: len(tokens)] and w.text.startswith(shown)
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
            assert output.prompt_logprobs == wanted.prompt_logprobs

    def planned(self, view: View, decided: Plan) -> None:
        """Check what is planned before it is carried out: pure, within the limits, no token that nobody needs."""
        scheduler, config = self.engine.scheduler, self.engine.scheduler.config
        assert plan(view, config, scheduler.policy) == decided, "the plan is no function of the view"
        counts = [count for _, count in decided.grants] + [a.count for a in decided.admissions]
        assert sum(counts) <= config.max_num_batched_tokens, "the step is over the token budget"
        running = len(view.running) - len(decided.preemptions) + len(decided.admissions)
        assert running <= config.max_num_seqs, "more run at once than may"
        assert not {slot for slot, _ in decided.grants} & {*decided.preemptions}
        for slot, count in decided.grants:
            s = scheduler.slots.sequences[slot]
            assert s is not None and s.blocked is None and count > 0
            needed = len(s.prompt) + s.max_tokens - 1
            assert scheduler.slots.scheduled[slot] + count <= needed, "a token is computed after the last"

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
            if self.offload:
                self.offload.work()
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
        for tier in self.offload.tiers if self.offload else ():
            assert tier.used_bytes <= tier.capacity_bytes, "a tier holds more than it may"
        self.folder.cleanup()


def drive(steps: int, first: int, examples: int, count: int) -> None:
    """Let the machine make so many steps of the engine, in rounds of examples whose seeds are first, first + 1, …"""
    EngineMachine.num_steps = 0
    for number in itertools.count(first):
        print(f"seed {number}: {EngineMachine.num_steps} steps until now", flush=True)
        if EngineMachine.num_steps >= steps:
            return
        machine = seed(number)(type("Machine", (EngineMachine,), {}))
        drawn = settings(max_examples=examples, stateful_step_count=count, deadline=None, database=None)
        run_state_machine_as_test(machine, settings=drawn)


def test_ten_thousand_steps() -> None:
    drive(10_000, first=0 if settings.default.derandomize else random.randrange(1 << 30), examples=60, count=25)


@pytest.mark.exhaustive
def test_a_million_steps() -> None:
    """Run with `pytest -s -m exhaustive -k million`: about half an hour of a processor."""
    drive(1_000_000, first=1_000_000, examples=400, count=60)
