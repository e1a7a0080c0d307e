"""Packed weights: a weight that embedding and head share is held once, and what keeps it from that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from shared_traces import sharing_traces
from step_inputs import Steps
from tiny_models import save_tiny

from seamwise import ModelRunner, StepInput
from seamwise.compile.derive import parameters_of
from seamwise.compile.pipeline import PipelineConfig
from seamwise.kernels import gather_packed_rows, pack_linear

traces = sharing_traces()


def save(directory: Path, tie: bool = True) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 40, "num_attention_heads": 4, "head_dim": 16, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=tie)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.mark.parametrize(("entry", "dtype"), [("own", "float32"), ("transformers", "bfloat16")])
def test_a_tied_weight_is_held_once_and_gives_the_same_logits(tmp_path: Path, entry: str, dtype: str) -> None:
    path, logits = save(tmp_path), []
    for disabled in ((), ("pack_linear",)):
        pipeline = PipelineConfig(disabled=disabled)
        runner = ModelRunner.load(path, dtype=dtype, device="cpu", entry=entry, pack_dir=None, pipeline=pipeline)
        program = runner.executable.program
        readers = [r for r in program.recipes.values() if "model.embed_tokens.weight" in parameters_of(r)]
        assert len(readers) == 1, "one tensor serves embedding and head"
        gathers = [n for n in program.providers if n.startswith("gather_packed_rows")]
        assert gathers == ([] if disabled else ["gather_packed_rows:cpp"])
        steps = Steps([[5, 96, 0, 31], [7]], block_size=runner.block_size)
        runner.allocate_kv(steps.num_blocks)
        logits.append(runner.step(StepInput(**steps.next({0: 4, 1: 1}))).logits)
    budget = 2 * float(torch.finfo(getattr(torch, dtype)).eps) * float(logits[1].abs().max())
    assert (logits[0] - logits[1]).abs().max() <= 8 * budget


def test_an_embedding_of_its_own_stays_a_table(tmp_path: Path) -> None:
    runner = ModelRunner.load(save(tmp_path, tie=False), dtype="float32", device="cpu", pack_dir=None)
    assert not any(n.startswith("gather_packed_rows") for n in runner.executable.program.providers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 7, 64])
def test_rows_of_a_packed_table_are_the_tables(dtype: torch.dtype, width: int) -> None:
    table, index = torch.randn(97, width).to(dtype), torch.tensor([[0, 96], [31, 32]])
    packed = pack_linear(table)
    assert torch.equal(gather_packed_rows(packed, index, 97, width), table[index])
    with pytest.raises(ValueError, match="index 97, wanted 0 to 96"):
        gather_packed_rows(packed, torch.tensor([3, 97]), 97, width)


def test_experts_are_packed_where_they_are_whole_panels(tmp_path: Path) -> None:
    save_tiny(tmp_path, "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2)  # 96 and 64 rows an expert
    whole = ModelRunner.load(tmp_path, dtype="bfloat16", device="cpu", pack_dir=None).executable.program
    assert {n for n in whole.providers if n.startswith("grouped_linear")} == {"grouped_linear_packed:cpp"}
    save_tiny(tmp_path, "MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2, intermediate_size=24)
    parts = ModelRunner.load(tmp_path, dtype="bfloat16", device="cpu", pack_dir=None).executable.program
    (report,) = [r for r in parts.reports if r.name == "pack_linear"]
    missed = [m for m in report.misses if "multiple of 32, for whole panels of an expert, got 48" in m.reason]
    assert len(missed) == 2, "the joined gates and ups of both layers"
