"""Stages of a step in processes of their own: as many steps under way as there are, and the tokens of one process."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_families import MOE
from tiny_models import save_tiny

from seamwise import LLM, ModelRunner, SamplingParams
from seamwise.runtime.build.step import StepInput, StepOutput, ragged_step
from seamwise.runtime.engine.engine import Engine
from seamwise.runtime.engine.executor_processes import RankProcesses
from seamwise.runtime.scheduler.config import SchedulerConfig
from seamwise.testing import FakeRunner

SHORT: dict[str, Any] = {"device": "cpu", "dtype": "float32", "max_model_len": 96}


class FakeStages(FakeRunner):
    """Steps that are begun when they come and finished later, so that none can have a token of one under way."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.begun: deque[StepOutput] = deque()
        self.finish_s = 0.0
        self.most = 0
        self.sizes: list[int] = []

    def begin(self, batch: StepInput) -> None:
        self.sizes.append(batch.num_requests)
        self.begun.append(StepOutput(logits=self.step(batch).logits.clone()))
        self.most = max(self.most, len(self.begun))

    def finish(self) -> StepOutput:
        time.sleep(self.finish_s)
        return self.begun.popleft()


def outputs(
    runner: FakeRunner, requests: list[tuple[list[int], int, int]], config: SchedulerConfig
) -> dict[str, list[int]]:
    """Run requests (prompt, tokens, step of an abort); return what each gave, of an aborted one what it had by then."""
    engine, found = Engine(runner, None, config, enable_prefix_caching=True), dict[str, list[int]]()
    for i, (prompt, count, _) in enumerate(requests):
        params = SamplingParams(temperature=i % 2 * 0.9, seed=i, max_tokens=count, detokenize=False)
        engine.add_request(str(i), prompt, params)
    for step in range(10_000):
        if not engine.has_unfinished_requests():
            break
        for i, (_, _, abort) in enumerate(requests):
            if abort == step:
                engine.abort_request(str(i))
        for output in engine.step():
            found[output.request_id] = output.outputs[0].token_ids
        engine.scheduler.check()
        flights = engine._loop.flights
        yielding = [s.id for f in flights for s, y in zip(f.step.sequences, f.step.yields, strict=True) if y]
        assert len(yielding) == len({*yielding}) or config.pipeline_parallel_size == 1
    engine.close()
    return found


REQUEST = st.tuples(
    st.lists(st.integers(3, 6), min_size=1, max_size=20), st.integers(1, 9), st.sampled_from([-1, -1, 3])
)


@settings(max_examples=40)
@given(
    requests=st.lists(REQUEST, min_size=1, max_size=7),
    stages=st.integers(2, 4), budget=st.sampled_from([5, 64]), blocks=st.sampled_from([16, 60]),
)  # fmt: skip
def test_requests_get_what_they_get_from_one_process(
    requests: list[tuple[list[int], int, int]], stages: int, budget: int, blocks: int
) -> None:
    """Whatever else is under way: prompts in chunks, preemptions, aborts of what a stage computes just then."""
    made = {"num_blocks": blocks, "block_size": 4}
    limits = {"max_num_batched_tokens": budget}
    staged = outputs(FakeStages(**made), requests, SchedulerConfig(**limits, pipeline_parallel_size=stages))
    alone = outputs(FakeRunner(**made), [(p, n, -1) for p, n, _ in requests], SchedulerConfig(**limits))
    for name, tokens in alone.items():
        if requests[int(name)][2] < 0:
            assert staged[name] == tokens
        else:
            assert tokens[: len(staged.get(name, []))] == staged.get(name, [])


def test_each_stage_has_its_part_of_the_requests() -> None:
    runner = FakeStages(num_blocks=99, block_size=4, eos_ids=())
    runner.finish_s = 0.01  # longer than the next step is planned for, so that it is begun before
    requests = [([3, 4, 5], 20, -1)] * 6
    outputs(runner, requests, SchedulerConfig(pipeline_parallel_size=3))
    assert runner.most == 3 and runner.sizes[0] == 6 and {*runner.sizes[4:30]} == {2}


def tokens(llm: LLM) -> list[list[int]]:
    prompts = [{"prompt_token_ids": list(range(3, 3 + n))} for n in (37, 2, 11, 60)]
    params = [
        SamplingParams(temperature=t, max_tokens=9, ignore_eos=True, detokenize=False, seed=5) for t in (0, 1, 0.7, 0)
    ]
    return [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]


def slowed(worker: Any, seconds: float) -> None:
    original = worker.model_runner.step_stage

    def step_stage(*given: Any) -> Any:
        time.sleep(seconds)
        return original(*given)

    worker.model_runner.step_stage = step_stage


def cleared(worker: Any) -> None:
    worker.trace.clear()


def trace_of(worker: Any) -> list[tuple[float, float]]:
    return list(worker.trace)


def stage_of(worker: Any) -> tuple[int, int, int]:
    runner = worker.model_runner
    return len(runner.kv_caches), len(runner.executable.weights), len(runner.program.carried)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_two_stages_give_what_one_process_gives(tmp_path: Path) -> None:
    """A Llama of two layers and a mixture of experts of three; then steps that take 0.2 s in each stage, of which the
    trace shows the bubbles of the formula; then a stage is killed."""
    save_tiny(tmp_path / "llama", "LlamaForCausalLM")
    architecture, changes = MOE["qwen3_moe"]
    save_tiny(tmp_path / "moe", architecture, **changes, num_hidden_layers=3)
    for name, layers in (("llama", [1, 1]), ("moe", [1, 2])):
        llm = LLM(tmp_path / name, pipeline_parallel_size=2, pack_dir=None, max_num_batched_tokens=32, **SHORT)
        try:
            assert tokens(llm) == tokens(LLM(tmp_path / name, pack_dir=None, max_num_batched_tokens=32, **SHORT))
            found = llm.collective_rpc(stage_of)
            assert [caches for caches, _, _ in found] == layers and [taken for _, _, taken in found] == [0, 2]
            if name == "moe":
                bubbles_are_those_of_the_formula(llm.executor)
                os.kill(llm.executor._processes[0].pid, signal.SIGKILL)  # type: ignore[attr-defined]
                with pytest.raises(RuntimeError, match=r"rank 0 \(process \d+\) died: SIGKILL"):
                    tokens(llm)
        finally:
            llm.executor.shutdown()


def bubbles_are_those_of_the_formula(ranks: Any) -> None:
    """m steps through p stages leave each stage idle (p - 1) / (m + p - 1) of the time; a busy machine only adds."""
    assert isinstance(ranks, RankProcesses)
    seconds, stages, batches = 0.2, 2, list[StepInput]()
    for i in range(6):
        tokens, table = np.array([3 + i, 4]), np.array([[i + 1]], dtype=np.int32)
        slots = torch.tensor([i], dtype=torch.int32)
        batches.append(ragged_step(tokens, table, np.array([0]), np.array([2]), ranks.block_size, request_slots=slots))
    alone = [ranks.step(batch).logits.clone() for batch in batches]
    ranks.collective_rpc(slowed, None, (seconds,))
    formula = (stages - 1) / (len(batches) + stages - 1)
    for _ in range(5):
        bubbles, whole = bubbles_of(ranks, stages, batches, alone)
        assert whole >= (len(batches) + stages - 1) * seconds
        if formula - 0.04 <= bubbles <= formula + 0.12:
            return
    raise AssertionError(f"bubbles {bubbles:.3f} in the last of five runs, the formula says {formula:.3f}")


def bubbles_of(
    ranks: RankProcesses, stages: int, batches: list[StepInput], alone: list[torch.Tensor]
) -> tuple[float, float]:
    """Return the part of the time that stages were idle, and the time in seconds."""
    ranks.collective_rpc(cleared)
    for batch in batches:
        ranks.begin(batch)
    outputs = list[StepOutput]()
    for i, batch in enumerate(batches):
        outputs.append(ranks.finish())
        assert outputs[i].request_slots is batch.request_slots, "a step's logits are said to be another's"
        for at in range(max(0, i + 1 - stages), i + 1):  # they stay while other stages' steps end
            assert torch.equal(outputs[at].logits, alone[at])
    steps = len(batches)
    traces = ranks.collective_rpc(trace_of)
    assert [len(trace) for trace in traces] == [steps, steps]
    whole = max(end for trace in traces for _, end in trace) - min(begin for trace in traces for begin, _ in trace)
    busy = sum(end - begin for trace in traces for begin, end in trace)
    return 1 - busy / (stages * whole), whole


def test_what_does_not_go_together_is_refused(tiny_llama_dir: Path) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=match):
            ModelRunner.load(tiny_llama_dir, device="cpu", **options)

    refused("ranks share a model in one way", pipeline_parallel_size=2, tensor_parallel_size=2)
    refused("pipeline_parallel_size=2 needs 2 processes", pipeline_parallel_size=2)
    with pytest.raises(ValueError, match="stages are processes that this one starts"):
        LLM(tiny_llama_dir, pipeline_parallel_size=2, distributed_executor_backend="external_launcher")
