"""A grammar that takes long takes a tenth of others' time at most, by seconds that are said here and not measured."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

import pytest
from test_structured import EOS, VOCAB, Vocabulary, grammars

from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.engine.pace import SHARE, Pace
from seamwise.runtime.sampling.grammar import GrammarMask, Grammars
from seamwise.runtime.sampling.params import SamplingParams
from seamwise.runtime.sampling.structured import StructuredOutputsParams
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.testing import FakeRunner

STEP_S = 0.01  # without masks
LENGTH = 60
note = Pace.note


class Run:
    """An engine each of whose masks takes `mask_s` seconds; asked: how many each step waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mask_s: float, asynchronous: bool = True) -> None:
        self.asked, self.mask_s = list[int](), mask_s
        monkeypatch.setattr(GrammarMask, "take_s", self._take_s())
        monkeypatch.setattr(Pace, "note", self._note())
        self.runner = FakeRunner(num_blocks=200, block_size=4, vocab_size=VOCAB, eos_ids=(EOS,))
        config = SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=256, async_scheduling=asynchronous)
        self.engine = Engine(self.runner, Vocabulary(), config)  # type: ignore[arg-type]

    def _take_s(self) -> Callable[[GrammarMask], float]:
        def take_s(mask: GrammarMask) -> float:
            asked, mask.spent_s = mask.spent_s > 0, 0.0
            return self.mask_s * asked

        return take_s

    def _note(self) -> Callable[[Pace, float], None]:
        def noted(pace: Pace, measured_s: float) -> None:
            self.asked.append(sum(mask.spent_s > 0 for bound in pace._bound for mask in bound.masks))
            note(pace, STEP_S + self.mask_s * self.asked[-1])

        return noted

    def finish(self, *names: str) -> dict[str, list[int]]:
        """Add requests, those with a grammar begin with "g", let them begin together, and return the tokens of all."""
        self.engine.pause("keep")
        for name in names:
            form = StructuredOutputsParams(regex="(a|b)*") if name.startswith("g") else None
            self.engine.add_request(
                name, [3, 4, 5, len(name)],
                SamplingParams(
                    max_tokens=LENGTH, min_tokens=LENGTH, seed=3, temperature=1.0, detokenize=False,
                    structured_outputs=form,
                ),
            )  # fmt: skip
        while self.engine.grammars.pending:
            self.engine.step()
        self.engine.resume()
        found: dict[str, list[int]] = {}
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            found |= {o.request_id: list(o.outputs[0].token_ids) for o in outputs if o.finished}
            if "plain" in found and not hasattr(self, "beside"):
                self.beside = len(self.asked)  # steps until all without a grammar had ended
        self.engine.close()
        return found


@pytest.mark.parametrize("asynchronous", [True, False])
def test_others_are_slowed_by_a_tenth(monkeypatch: pytest.MonkeyPatch, asynchronous: bool) -> None:
    """Seven milliseconds a mask of four requests would make a step of ten take 38."""
    run, names = Run(monkeypatch, 0.007, asynchronous), ("g", "gg", "ggg", "gggg")
    together = run.finish("plain", *names)
    asked = run.asked[: run.beside]
    allowed = SHARE * STEP_S * len(asked) / run.mask_s
    assert allowed / 2 - 1 < sum(asked) <= allowed + len(names) + 1, asked  # what first ones take is not known before
    assert asked[0] == 4 and max(asked[1:]) == 1, "one at a time"
    assert len(run.asked) - run.beside < LENGTH + 5, "nobody else is there any more"
    for name in ("plain", *names):
        assert Run(monkeypatch, 0.007, asynchronous).finish(name) == {name: together[name]}


@pytest.mark.parametrize(("mask_s", "at_once"), [(0.0001, 5), (0.0004, 2)])
def test_as_many_go_on_as_there_is_time_for(monkeypatch: pytest.MonkeyPatch, mask_s: float, at_once: int) -> None:
    run = Run(monkeypatch, mask_s)
    run.finish("plain", "g", "gg", "ggg", "gggg", "ggggg")
    assert run.asked[0] == 5 and max(run.asked[1 : run.beside]) == at_once
    assert len(run.asked) <= LENGTH + 2 + LENGTH * (at_once < 5)


def test_processes_that_decide_alike_do_not_go_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each waits for a grammar that it is asked for, and no request sits out for what masks took."""
    compiled = Grammars.compile
    monkeypatch.setattr(Grammars, "compile", lambda *given: time.sleep(0.2) or compiled(*given))
    run = Run(monkeypatch, 0.007)
    run.engine.alike = True
    form = StructuredOutputsParams(regex="(a|b)*")
    for name in ("g", "gg"):
        params = SamplingParams(max_tokens=9, min_tokens=9, detokenize=False, structured_outputs=form)
        run.engine.add_request(name, [3, 4], params)
    run.engine.step()
    assert not run.engine.grammars.pending and run.asked == [2]
    run.finish("plain")
    assert run.asked[:9] == [2] * 9


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has a priority of its own on Linux alone")
def test_compiling_has_what_steps_leave() -> None:
    made = grammars()
    before = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    made.start("r", StructuredOutputsParams(regex="a"), 1)
    assert made._pool is not None
    there = made._pool.submit(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())).result()
    assert there == 19 and os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
    made.close()
