"""The real model straight from its GGUF file (Q4_1) against llama.cpp's dequantization of it."""

from __future__ import annotations

import math
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor

from seamwise import LLM, SamplingParams
from seamwise.bench.demo_model import demo_gguf
from seamwise.runtime.build.step import StepInput
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.weights.gguf.families import FAMILIES
from seamwise.runtime.weights.gguf.weights import huggingface_name, read_gguf

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, there was", "1, 2, 3, 4, 5,"]
# From the Apache License 2.0, which is beside this file and is likely in every model's training data.
TEXT = (Path(__file__).parents[4] / "LICENSE").read_text()[:2000]


@pytest.fixture(scope="module")
def path() -> Path:
    return demo_gguf()


@pytest.mark.slow
def test_every_value_is_the_gguf_packages(path: Path) -> None:
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    for tensor in theirs.tensors:
        wanted = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        got = ours.pop(huggingface_name(tensor.name, FAMILIES["llama"])).load()
        if ".attn_q." in tensor.name or ".attn_k." in tensor.name:  # rows in pairs, 64 a head
            order = torch.arange(64).view(32, 2).T.flatten()
            wanted = wanted.view(-1, 64, wanted.shape[1])[:, order].flatten(0, 1)
        assert torch.equal(got.view(torch.int32), wanted.view(torch.int32)), tensor.name
    assert not ours


@pytest.mark.slow
def test_greedy_ids_are_those_of_the_bfloat16_conversion(path: Path, demo_model: Path, pack_dir: Path) -> None:
    def ids(model: Path) -> list[list[int]]:
        llm = LLM(model, dtype="bfloat16", device="cpu", max_model_len=256, max_num_seqs=4, pack_dir=pack_dir)
        return [o.outputs[0].token_ids for o in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=48))]

    got = ids(path)
    assert got == ids(demo_model) and min(map(len, got)) > 4


@pytest.mark.slow
def test_perplexity_is_that_of_the_bfloat16_conversion(path: Path, demo_model: Path, pack_dir: Path) -> None:
    """Within 1 % of transformers in bfloat16 on the converted directory, and of that directory in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.tensor(AutoTokenizer.from_pretrained(demo_model)(TEXT).input_ids)
    got = perplexity(tokens, logits(ModelRunner.load(path, device="cpu", pack_dir=pack_dir), tokens))
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=dtype).eval()
        with torch.no_grad():
            wanted = perplexity(tokens, model(tokens[None]).logits[0])
        assert abs(got / wanted - 1) < 0.01, (dtype, got, wanted)
    assert 1 < got < 50


@pytest.mark.slow
def test_packed_logits_are_within_the_budget_of_the_dequantized_model(
    path: Path, demo_model: Path, pack_dir: Path
) -> None:
    """Layers read Q4_1 and the tied head Q8_0; the truth is transformers' model in float64, of the file's values.

    Greedy text then agrees with the truth's up to near-ties: a token that is chosen is as likely, within the budget.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = torch.tensor(AutoTokenizer.from_pretrained(demo_model)(TEXT[:500]).input_ids)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
        values = {name: tensor.load() for name, tensor in read_gguf(path).items()}
        absent, unknown = model.double().load_state_dict(values, strict=False)
        assert absent == ["lm_head.weight"] and not unknown  # the embedding
        exact = model(tokens[None]).logits[0]
    runner = ModelRunner.load(path, dtype=torch.bfloat16, device="cpu", pack_dir=pack_dir, quantization="gguf")
    assert runner.program.providers["linear_int:cpp"] == 4 * 30 + 1
    got = logits(runner, tokens)
    error, budget = (got - exact).abs().max(), 2 * (theirs - exact).abs().max()
    assert error <= budget, (error, budget)
    chosen = exact.gather(1, got.argmax(1, keepdim=True)).squeeze(1)
    assert (exact.amax(1) - chosen <= 2 * error).all()


def perplexity(tokens: Tensor, logits_TV: Tensor) -> float:
    return math.exp(torch.nn.functional.cross_entropy(logits_TV[:-1].float(), tokens[1:]))


def logits(runner: ModelRunner, tokens: Tensor) -> Tensor:
    """Return the logits of every token of one request that lies in blocks 1, 2, …"""
    blocks = -(-len(tokens) // runner.block_size)
    runner.allocate_kv(blocks + 1)
    at = torch.arange(len(tokens))
    batch = StepInput(
        token_ids=tokens, positions=at, slot_mapping=at + runner.block_size, logit_rows=at,
        block_table=torch.arange(1, blocks + 1, dtype=torch.int32)[None],
        seq_lens=torch.tensor([len(tokens)], dtype=torch.int32),
        query_starts=torch.tensor([0, len(tokens)], dtype=torch.int32),
    )  # fmt: skip
    return runner.step(batch).logits
