"""Sharding a graph: collectives, parts of weights, generated code, refusals; in one process, with a fake group."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from blocks import apply, captured
from families import FAMILIES
from shared_traces import sharing_traces
from tiny_models import save_tiny
from torch import Tensor, nn

from seamwise import passes
from seamwise.compile.derive import evaluate, parameters_of
from seamwise.compile.pipeline import PipelineConfig
from seamwise.compile.program import Program
from seamwise.compile.startup_times import Ledger
from seamwise.passes import Parallel
from seamwise.passes.shard.tensor_placement import Cut, Unplaceable
from seamwise.runtime.build.compile_model import compile_model
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.ranks import placed
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.distributed.group import fake_group
from seamwise.runtime.serve.cli import main

traces = sharing_traces()
GOLDEN = Path(__file__).with_name("golden")
REDUCED, SHARED = "allreduce_rms_norm", "reduce_scatter_rms_norm"


def compiled(
    directory: Path, size: int, rank: int = 0, *, entry: str = "own", disabled: tuple[str, ...] = (), **options: Any
) -> Program:
    config = ModelConfig.from_directory(directory)
    pipeline = PipelineConfig(
        parallel=Parallel(size=size, rank=rank, **{"group": "ranks", **options}), disabled=disabled,
        allow_missed=("fuse_add_rms_norm_quant",),
    )  # fmt: skip
    settings = RunnerConfig.for_model(config, dtype="float32", device="cpu", entry=entry, pipeline=pipeline)
    return compile_model(config, settings, Ledger())[0]


def calls(program: Program) -> dict[str, int]:
    return {c["op"].rpartition(".")[2]: c["calls"] for c in program.collectives}


# transformers' plan gathers what Phi-3's joined projections give
@pytest.mark.parametrize(
    ("family", "entry"),
    [("phi3", "own"), *((f, e) for f in ("llama", "gemma2", "qwen3") for e in ("own", "transformers"))],
)
def test_two_sums_a_layer_each_in_its_norm(family: str, entry: str, tmp_path: Path) -> None:
    architecture, changes = FAMILIES[family]
    save_tiny(tmp_path, architecture, **changes)
    embedding = 1  # of a vocabulary that is shared out
    if family == "llama":
        before = compiled(tmp_path, 2, entry=entry, disabled=("fuse_allreduce_rms_norm",))
        assert calls(before) == {"all_reduce": 2 * 2 + embedding, "all_gather_into_tensor": 1}
    after = compiled(tmp_path, 2, entry=entry)
    assert calls(after) == {REDUCED: 2 * 2 + embedding, "all_gather_into_tensor": 1}
    report = next(r for r in after.reports if r.name == "fuse_allreduce_rms_norm")
    assert (report.matched, report.expected, report.misses) == (5, 4, [])


def test_the_generated_code_is_golden(tiny_llama_dir: Path) -> None:
    program = compiled(tiny_llama_dir, 2, rank=1)
    for name, text in (
        ("tp2.py.txt", program.source),
        ("tp2.json", json.dumps({"collectives": program.collectives, "recipes": program.recipes}, indent=1) + "\n"),
    ):
        assert (GOLDEN / name).read_text() == text, f"{name} differs; if it should, write it anew"


def test_the_ranks_parts_make_up_the_weights(tmp_path: Path) -> None:
    """Every row or column is somewhere, no rank reads a whole matrix, and biases after a sum are added once."""
    model = save_tiny(tmp_path, "LlamaForCausalLM", attention_bias=True, mlp_bias=True, num_key_value_heads=4)
    state = {k: v.double() for k, v in model.state_dict().items()}
    read: dict[str, torch.Tensor] = {name: torch.zeros(w.shape, dtype=torch.int64) for name, w in state.items()}
    biases: dict[str, torch.Tensor] = {}
    for rank in range(4):
        program = compiled(tmp_path, 4, rank, disabled=("pack_linear", "fuse_qkv", "fuse_gate_up"))
        for recipe in program.recipes.values():
            (name,) = parameters_of(recipe)
            if name not in state:
                continue  # a table of rotations
            value = evaluate(recipe, state.__getitem__)
            if recipe.get("op") == "aten.mul.Tensor":
                biases[name] = biases.get(name, 0) + value
            counted = torch.zeros(read[name].shape, dtype=torch.int64)
            evaluate(recipe, lambda n: counted, lambda n, d, a, b: counted.narrow(d, a, b - a).add_(1))  # noqa: B023
            read[name] += counted
    assert len(biases) == 4 and all(torch.equal(total, state[name]) for name, total in biases.items())
    cut = {name for name in state if "norm" not in name and name not in biases}
    assert all(bool((read[name] == 1).all()) for name in cut)


@pytest.mark.parametrize(
    ("size", "changes", "options", "message"),
    [
        (3, {}, {}, "q_proj: 4 heads do not divide among 3 ranks"),
        (8, {}, {}, "4 heads do not divide among 8 ranks"),
        (2, {"intermediate_size": 51}, {}, "51 columns do not divide among 2 ranks"),
        (2, {}, {"plan": {"*.q_proj": "columns"}}, "has style 'columns'; wanted one of"),
        (2, {}, {"plan": {"*.qq_proj": "colwise"}}, "is a weight of this model"),
        (2, {}, {"plan": {"*.q_proj": "colwise"}}, "wanted heads of both"),
        (2, {}, {"plan": {"*.gate_proj": "colwise"}}, "joins tensors that are cut differently"),
        (2, {}, {"plan": {"*.[gu][ap]*_proj": "colwise"}}, "the plan has no style for its weight"),
        (2, {"vocab_size": 98}, {"plan": {"lm_head": "colwise"}}, "is the model's result"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_out_is_refused(
    size: int, changes: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path, "LlamaForCausalLM", **changes)
    with pytest.raises(ValueError, match=message):
        compiled(tmp_path, size, **options)


def test_a_norm_over_all_heads_is_refused_unless_they_are_gathered(tmp_path: Path) -> None:
    """Built with divided sizes, OLMo 2 would norm a rank's heads by themselves, and be wrong."""
    save_tiny(tmp_path, "Olmo2ForCausalLM")
    plan = {"*.[qkv]_proj": "colwise", "*.o_proj": "rowwise"}
    with pytest.raises(Unplaceable, match=r"rms_norm.*needs the whole of linear"):
        compiled(tmp_path, 2, entry="transformers", plan=plan)
    program = compiled(tmp_path, 2, entry="transformers")  # its own plan gathers them
    assert calls(program)["all_gather_into_tensor"] == 1 and not program.local_inputs


class SumNorm(nn.Module):
    """A sum over ranks, of which a norm reads the sum with a residual; `kept`, something else reads it too."""

    def __init__(self, *, kept: bool = False, residual: bool = True) -> None:
        super().__init__()
        self.weight, self.kept, self.residual = nn.Parameter(torch.rand(16) + 0.5), kept, residual

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        ops = torch.ops._c10d_functional
        total = ops.wait_tensor(ops.all_reduce(x, "sum", "ranks"))
        both = total + residual if self.residual else total
        normed = F.rms_norm(both, (16,), self.weight, 1e-5)
        return (normed, both, total * 2 if self.kept else residual * 2)


@pytest.mark.parametrize("residual", [True, False])
def test_a_sum_that_something_else_reads_is_kept(residual: bool) -> None:
    x, rows = torch.randn(5, 16), torch.randn(5, 16)
    reports = []
    for kept in (False, True):
        graph = captured(SumNorm(kept=kept, residual=residual), x, rows)
        for entry in (passes.RAISE_RMS_NORM, passes.FUSE_ADD_RMS_NORM):
            apply(entry, graph)
        reports += [apply(passes.FUSE_ALLREDUCE_RMS_NORM, graph), apply(passes.FUSE_ALLREDUCE_RMS_NORM, graph)]
    # The op gives the sum without a residual; with one, only the sum of both.
    assert [r.matched for r in reports] == [1, 0, 0 if residual else 1, 0]
    assert not reports[0].misses and ("has an extra user" in str(reports[2].misses)) == residual


def test_quantized_weights_are_scaled_in_parts(tmp_path: Path) -> None:
    save_tiny(tmp_path, "LlamaForCausalLM", hidden_size=128, intermediate_size=256)
    config = ModelConfig.from_directory(tmp_path)
    with fake_group(2):
        options = RunnerConfig.for_model(
            config, dtype="float32", device="cpu", quantization="int8", tensor_parallel_size=2
        )
        program, _ = compile_model(config, placed(options), Ledger())
    assert (options.pipeline.parallel, options.num_ranks) == (Parallel(size=2), 2)  # resolved, and nothing joined
    with pytest.raises(AssertionError, match="has not joined"):
        compile_model(config, options, Ledger())
    counts = {r.name: r.matched for r in program.reports}
    assert counts["quantize_linear"] == 8 and counts["fuse_allreduce_rms_norm_quant"] == 4
    assert calls(program)["allreduce_rms_norm_quant"] == 4


def test_parts_follow_bounds() -> None:
    joined = Cut(-1, ((8, 4), (2, 2)))  # eight columns among four ranks, two that pairs of ranks share
    assert [joined.bounds(r, 4) for r in range(4)] == [
        [(0, 2), (8, 9)], [(2, 4), (8, 9)], [(4, 6), (9, 10)], [(6, 8), (9, 10)]
    ]  # fmt: skip
    assert joined.width == 3
    with pytest.raises(ValueError, match="rank=2 of size=2"):
        Parallel(size=2, rank=2, group="")
    with pytest.raises(ValueError, match="enable_async_tp needs enable_sequence_parallel"):
        Parallel(size=2, rank=0, group="", overlap=True)


def test_explain_without_the_other_ranks(tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain", "--model", str(tiny_llama_dir), "--device", "cpu", "--no-pack"]
    assert main([*command, "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert main([*command, "--json", "--tp", "4"]) == 0
    four = json.loads(capsys.readouterr().out)
    assert one["collectives"] == [] and [c["calls"] for c in four["collectives"]] == [5, 1]
    assert [c["row_bytes"] for c in four["collectives"]] == [64 * 4, 512 // 4 * 4]
    assert one["kv_bytes_per_token"] == 2 * four["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert one["weight_bytes"] / 4 < four["weight_bytes"] < one["weight_bytes"] / 3
    assert main([*command, "--tp", "4"]) == 0
    assert "seamwise.allreduce_rms_norm" in capsys.readouterr().out
    assert main([*command, "--tp", "4", "--validate"]) == main([*command, "--sp"]) == 2
    assert main([*command, "--tp", "4", "--sp", "--async-tp", "--json"]) == 0
    overlapped = {c["op"]: (c["calls"], c["row_bytes"]) for c in json.loads(capsys.readouterr().out)["collectives"]}
    assert overlapped["seamwise.norm_between_linears"] == (3, 64 * 4)


def test_experts_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, "MixtralForCausalLM", num_local_experts=3, num_experts_per_tok=2)
    with pytest.raises(Unplaceable, match="3 do not divide among 2 ranks"):
        compiled(tmp_path, 2, experts=True)


def test_sixty_four_ranks_of_experts_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 2, "num_local_experts": 64}
    save_tiny(tmp_path, "MixtralForCausalLM", num_experts_per_tok=2, **sizes)
    command = ["explain", "--model", str(tmp_path), "--device", "cpu", "--no-pack", "--tp", "64", "--ep", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert [c["calls"] for c in report["collectives"]] == [5, 1]
    assert next(p for p in report["passes"] if p["name"] == "shard")["matched"] == 14
