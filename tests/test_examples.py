"""The examples do what they say: as transformers' own model does."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from seamwise import ModelRunner

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPTS = [[3, 7, 11, 400, 5], [9], list(range(20, 47))]


@pytest.fixture(scope="module")
def theirs(tiny_llama_dir: Path) -> Any:
    return LlamaForCausalLM.from_pretrained(tiny_llama_dir)


def padded() -> dict[str, torch.Tensor]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS])
    return {"input_ids": ids, "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])}


def test_the_generation_loop(theirs: Any, tiny_llama_dir: Path, pack_dir: Path) -> None:
    runner = ModelRunner.load(tiny_llama_dir, device="cpu", max_model_len=64, pack_dir=pack_dir)
    generate = runpy.run_path(str(EXAMPLES / "generation_loop.py"))["generate"]
    for prompt, got in zip(PROMPTS, generate(runner, PROMPTS, max_tokens=8), strict=True):
        want = theirs.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :]
        assert got == want.tolist()
    assert runner.recording_stats.steps["full"] > 0


@pytest.mark.parametrize("how", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}, {"do_sample": True}])
def test_transformers_generate_drives_the_runner(
    theirs: Any, tiny_llama_dir: Path, pack_dir: Path, how: dict[str, Any]
) -> None:
    made = runpy.run_path(str(EXAMPLES / "transformers_generate.py"))["RunnerForCausalLM"]
    ours = made(str(tiny_llama_dir), max_rows=9, max_model_len=64, pack_dir=pack_dir)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        found.append(model.generate(**padded(), max_new_tokens=8, pad_token_id=0, **how).tolist())
    assert found[0] == found[1]
