"""The step as it is declared: who takes it, what is refused, and what a runner answers to its optional fields."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import draw_tokens
from step_inputs import Steps
from torch import Tensor

from seamwise import ModelRunner, StepInput
from seamwise.compile.startup_times import Ledger
from seamwise.model_defs.blocks import CausalLM
from seamwise.model_defs.hf import HuggingFaceDecoder
from seamwise.runtime.build.step import FIELDS, STEP_ARGUMENTS, empty_step, ragged_step


def a_step(groups: int = 1, **more: Any) -> StepInput:
    """Return 5 tokens of 2 requests: a prefill of 4, and a decode after 9; each group has blocks of its own."""
    table = np.array([[1, 0, 0], [2, 3, 4]], dtype=np.int32) + 5 * np.arange(groups, dtype=np.int32).reshape(-1, 1, 1)
    return ragged_step(np.arange(3, 8), table, np.array([0, 9]), np.array([4, 1]), 4, **more)


GROUPED = [name for name, declared in FIELDS.items() if declared.grouped]


@pytest.mark.parametrize("model", [CausalLM, HuggingFaceDecoder])
def test_a_models_forward_takes_what_is_declared(model: type) -> None:
    assert tuple(inspect.signature(model.forward).parameters)[1:] == STEP_ARGUMENTS
    assert set(STEP_ARGUMENTS) == {"kv_caches"} | {name for name, f in FIELDS.items() if f.in_forward}


@pytest.mark.parametrize("name", FIELDS)
def test_each_field_is_checked(name: str) -> None:
    given = {"adapter_slots": torch.zeros(2).int(), "request_slots": torch.tensor([4, 1]).int()}
    step = a_step(**given, request_generations=torch.zeros(2).long(), token_adapters=torch.zeros(5).int())
    step.check()
    fine: Tensor = getattr(step, name)
    for wrong in (fine.double(), fine.unsqueeze(-1).unsqueeze(-1), fine.repeat_interleave(2, -1)[..., ::2]):
        with pytest.raises(ValueError, match=rf"StepInput\.{name} (is|has strides) "):
            replace(step, **{name: wrong}).check()
    if name not in ("logit_rows", "block_table", "token_ids", "seq_lens"):  # which say how many there are
        with pytest.raises(ValueError, match=rf"StepInput\.{name} is .* wanted .*5 tokens of 2 requests"):
            replace(step, **{name: fine[:-1].clone()}).check()


def test_what_has_several_forms() -> None:
    step = a_step(groups=2)
    assert step.slot_mapping.tolist() == [[4, 5, 6, 7, 17], [24, 25, 26, 27, 37]]
    assert [table.tolist()[1] for _, table in step.groups] == [[2, 3, 4], [7, 8, 9]]
    replace(step, positions=torch.zeros(3, 5).long()).check()
    with pytest.raises(ValueError, match=r"positions is .* wanted torch.int64 \(5,\) or \(3, 5\)"):
        replace(step, positions=torch.zeros(2, 5).long()).check()
    for other in (a_step().block_table, a_step(groups=3).block_table):
        with pytest.raises(ValueError, match=r"block_table is torch.int32 \(.*, wanted torch.int32 \(2, 2, 3\)"):
            replace(step, block_table=other).check()
    with pytest.raises(ValueError, match=r"slot_mapping is torch.int64 \(1, 5\), wanted torch.int64 \(5,\)"):
        replace(a_step(), slot_mapping=torch.zeros(1, 5).long()).check()
    with pytest.raises(ValueError, match="names slot 4 twice"):
        a_step(request_slots=torch.tensor([4, 4]).int()).check()


@pytest.fixture(scope="module")
def runner(tiny_llama_dir: Path, pack_dir: Path) -> ModelRunner:
    runner = ModelRunner.load(
        tiny_llama_dir, device="cpu", max_model_len=64, block_size=4, pack_dir=pack_dir, return_hidden_states=True,
        num_speculative_tokens=2,
    )  # fmt: skip
    runner.allocate_kv(64)
    return runner


def test_hidden_states_are_what_the_logits_are_of(runner: ModelRunner, tiny_llama_dir: Path) -> None:
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM.from_pretrained(tiny_llama_dir)
    requests = draw_tokens(4, 9, 12)
    steps = Steps(requests)
    # Eagerly, and as recordings are made and replayed.
    for counts in ({0: 7, 1: 4}, {0: 1, 1: 1}, {0: 1, 1: 1}, {1: 3}, {1: 3}):
        before = list(steps.computed)
        out = runner.step(StepInput(**steps.next(counts), hidden_states=True))
        assert out.hidden_states is not None
        rows = out.hidden_states.split(list(counts.values()))
        for (r, count), got in zip(counts.items(), rows, strict=True):
            with torch.no_grad():
                want = theirs.model(torch.tensor([requests[r]])).last_hidden_state[0]
            torch.testing.assert_close(got, want[before[r] : before[r] + count], atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(
            out.logits, out.hidden_states @ theirs.lm_head.weight.detach().T, atol=2e-5, rtol=2e-5
        )
    assert runner.recording_stats.steps == {"eager": 1, "full": 4}
    assert runner.step(replace(a_step(), hidden_states=False)).hidden_states is None


def test_an_empty_step_gives_no_rows(runner: ModelRunner) -> None:
    out = runner.step(replace(empty_step(), hidden_states=True))
    assert out.logits.shape == (0, 512) and out.hidden_states is not None and out.hidden_states.shape == (0, 64)
    assert runner.recording_stats.steps["empty"] == 1


def test_whom_a_step_is_for_comes_back(runner: ModelRunner) -> None:
    slots, generations = torch.tensor([7, 2]).int(), torch.tensor([1, 9])
    out = runner.step(a_step(request_slots=slots, request_generations=generations))
    assert out.request_slots is slots and out.request_generations is generations


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"adapter_slots": torch.tensor([0, 3]).int()}, r"adapter_slots is \[0, 3\], no adapter is loaded"),
        ({"positions": torch.zeros(3, 5).long()}, "this model rotates by one position a token"),
        ({n: getattr(a_step(groups=2), n) for n in GROUPED}, "has 2 KV cache groups, this model has 1"),
    ],
)
def test_what_the_model_has_not_is_refused(runner: ModelRunner, more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        runner.step(replace(a_step(), **more))
    options = replace(runner.options, return_hidden_states=False)
    plain = ModelRunner(runner.config, options, runner.executable, Ledger(), {})
    plain.allocate_kv(8)
    with pytest.raises(ValueError, match="load the runner with return_hidden_states=True"):
        plain.step(a_step(hidden_states=True))
