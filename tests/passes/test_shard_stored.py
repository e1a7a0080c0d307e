"""Weights that are stored quantized, shared out: each rank's part is that of the dequantized weight, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from quantized_checkpoints import LAYOUTS, NO_PASSES, UNSERVED, dequantizations, save_quantized
from shared_traces import sharing_traces
from test_shard import compiled
from torch import Tensor

from seamwise.passes.shard.tensor_placement import Unplaceable
from seamwise.runtime.build.loading import load_step_weights
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.distributed.group import fake_group

traces = sharing_traces()

ONLY_RAISED = tuple(name for name in NO_PASSES if not name.startswith("raise"))
SIZES = {"num_key_value_heads": 4, "intermediate_size": 512}
MOE = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "mlp_only_layers": [0],
    "norm_topk_prob": True, **SIZES,
}  # fmt: skip


def own_part(name: str, whole: Tensor, rank: int, size: int, experts: bool) -> Tensor:
    """Return what a rank has of a weight (N, K), or of experts' (E, N, K)."""
    if experts and whole.dim() == 3:
        return whole.chunk(size)[rank]
    if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
        return whole.chunk(size, -1)[rank]
    joined = 2 if name.endswith("gate_up_proj") else 1
    return torch.cat([half.chunk(size, -2)[rank] for half in whole.chunk(joined, -2)], -2)


def parts(directory: Path, size: int, rank: int, **options: Any) -> dict[str, Tensor]:
    """Return a rank's dequantized weights, read from the checkpoint as a start reads them."""
    program = compiled(directory, size, rank, disabled=ONLY_RAISED, **options)
    program.recipes = {n: r for recipe in program.recipes.values() for n, r in dequantizations(recipe)}
    chosen = RunnerConfig.for_model(ModelConfig.from_directory(directory), dtype="float32", device="cpu", pack_dir=None)
    return dict(zip(program.recipes, load_step_weights(directory, chosen, program, {}), strict=True))


@pytest.mark.parametrize(
    ("name", "size"), [("fp8 blocks", 4), *((name, 2) for name in (*LAYOUTS, *UNSERVED) if name != "fp8 blocks")]
)
def test_the_ranks_parts_are_those_of_the_dequantized_weights(name: str, size: int, tmp_path: Path) -> None:
    layout = (LAYOUTS | UNSERVED)[name]
    means = save_quantized(tmp_path, layout, torch.float32, **SIZES | {"hidden_size": 512, "head_dim": 128})
    for rank in range(size) if name in ("fp8 blocks", "W4A16_ASYM") else [size - 1]:
        found = parts(tmp_path, size, rank)
        assert len(found) == 14
        for parameter, part in found.items():
            assert torch.equal(part, own_part(parameter, means.get_parameter(parameter), rank, size, False)), parameter


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("name", ["fp8 blocks", "W8A8 int8", "W4A16_ASYM"])
def test_experts_parts_too(name: str, experts: bool, tmp_path: Path) -> None:
    means = save_quantized(tmp_path, LAYOUTS[name], torch.float32, "Qwen3MoeForCausalLM", **MOE)
    for rank in range(2) if name == "fp8 blocks" else [1]:
        found = {n: w for n, w in parts(tmp_path, 2, rank, experts=experts).items() if ".experts." in n}
        assert len(found) == 2
        for parameter, part in found.items():
            wanted = own_part(parameter, means.get_parameter(parameter), rank, 2, experts)
            assert torch.equal(part, wanted.flatten(0, 1)), (rank, parameter)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("fp8 blocks", "Qwen3MoeForCausalLM"), ("W8A8 int8", "Qwen3MoeForCausalLM"), ("W8A8 int8", "LlamaForCausalLM"),
        ("FP8", "LlamaForCausalLM"), ("W4A16_ASYM", "LlamaForCausalLM"),
    ],
)  # fmt: skip
def test_a_rank_reads_its_part_as_it_is_stored(name: str, architecture: str, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    save_quantized(tmp_path, layout, torch.float32, architecture, **(MOE if "Moe" in architecture else SIZES))
    program = compiled(tmp_path, 2)
    reports = {r.name: r for r in program.reports}
    assert reports["quantize_linear"].matched == reports["quantize_linear"].expected > 0
    assert reports["quantize_experts"].matched == 2 * ("Moe" in architecture)
    read = str(program.recipes)
    assert "dequantize_weight" not in read and ("input_scale" in read) == (layout.inputs == "static")


def test_each_range_of_tokens_reads_the_same_stored_weights(tmp_path: Path) -> None:
    save_quantized(tmp_path, LAYOUTS["FP8"], torch.float32, **SIZES)
    with fake_group(2):
        group = str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
        whole, split = (compiled(tmp_path, 2, sequence=n, group=group) for n in (0, 9))
    assert len(whole.ranges) == 1 and len(split.ranges) == 2 and "input_scale" in str(whole.recipes)
    assert split.recipes == whole.recipes


def test_a_part_that_ends_in_a_block_is_refused(tmp_path: Path) -> None:
    save_quantized(tmp_path, LAYOUTS["fp8 blocks"], torch.float32)
    with pytest.raises(Unplaceable, match=r"k_proj: a rank's part of 128 is 0 to 64, which cuts blocks of 128"):
        compiled(tmp_path, 2)
    save_quantized(tmp_path / "one", LAYOUTS["fp8 blocks"], torch.float32, **SIZES | {"num_key_value_heads": 1})
    assert compiled(tmp_path / "one", 2)  # of heads that all ranks have the block is whole
    save_quantized(tmp_path / "groups", LAYOUTS["W4A16"], torch.float32)
    with pytest.raises(Unplaceable, match=r"down_proj: a rank's part of 384 is 192 to 384, which cuts blocks of 128"):
        compiled(tmp_path / "groups", 2, 1)
