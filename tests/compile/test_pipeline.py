"""The pipeline keeps its promises or says which is broken; pieces, verifier, derived weights, configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from seamwise import ModelRunner
from seamwise.compile.check.verify import BrokenGraph, verify
from seamwise.compile.derive import evaluate, parameters_of
from seamwise.compile.explain.text import as_json, as_text
from seamwise.compile.pipeline import BrokenPromise, PipelineConfig
from seamwise.kernels import rms_norm
from seamwise.model_defs import blocks


def load(model: Path, packs: Path | None, **options: object) -> ModelRunner:
    return ModelRunner.load(model, dtype="float32", device="cpu", pack_dir=packs, **options)


@pytest.mark.parametrize("entry", ["own", "transformers"])
def test_promised_equals_matched(tiny_llama_dir: Path, pack_dir: Path, entry: str) -> None:
    program = load(tiny_llama_dir, pack_dir, entry=entry).program
    counts = {r.name: (r.matched, r.expected) for r in program.reports}
    assert counts["raise_rms_norm"] == (5, 5)
    assert counts["raise_rope"] == (4, 4)
    assert counts["raise_swiglu"] == counts["fuse_gate_up"] == counts["fuse_qkv"] == (2, 2)
    assert counts["fuse_add_rms_norm"] == (4, 4)
    assert (len(program.calls), program.num_distinct, program.num_seams) == (3, 3, 2)


def test_a_broken_precondition_is_an_error_that_names_place_and_reason(
    tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong_sign(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        low, high = x.chunk(2, -1)
        return x * cos.unsqueeze(-2) + torch.cat((high, -low), -1) * sin.unsqueeze(-2)

    monkeypatch.setattr(blocks, "rotate", wrong_sign)
    with pytest.raises(BrokenPromise) as error:
        ModelRunner.load(tiny_llama_dir, dtype="float32", device="cpu", pack_dir=None)
    text = str(error.value)
    assert "raise_rope matched 0 of 4" in text
    assert "model.layers.0.self_attn" in text and "the pattern has" in text and "allow_missed" in text
    for _ in range(2):  # the remedy, as it is said, names one pass more each time
        (remedy,) = re.findall(r"or pass allow_missed=(\[.*\])\.", text)
        try:
            runner = load(tiny_llama_dir, None, allow_missed=eval(remedy))
        except BrokenPromise as another:
            text = str(another)
    assert eval(remedy) == ["raise_rope", "fuse_rope_kv_write"]
    report = next(r for r in runner.program.reports if r.name == "raise_rope")
    assert (report.matched, report.expected, len(report.misses)) == (0, 4, 4)


def test_a_promise_on_a_class_of_transformers_is_a_report_and_of_ours_a_stop(
    tiny_llama_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = PipelineConfig(disabled=("raise_rope",))
    runner = load(tiny_llama_dir, None, entry="transformers", pipeline=without)
    report = next(r for r in runner.program.reports if r.name == "fuse_rope_kv_write")
    assert (report.matched, report.expected, len(report.misses)) == (0, 2, 2)
    assert "fuse_rope_kv_write matched 0 of 2" in caplog.text and "fewer than promised" in as_text(runner.program, {})
    with pytest.raises(BrokenPromise, match=r"allow_missed=\['fuse_rope_kv_write'\]"):
        load(tiny_llama_dir, None, pipeline=without)
    load(tiny_llama_dir, None, pipeline=without, allow_missed=["fuse_rope_kv_write"])
    with pytest.raises(ValueError, match="no pass is named 'fuse_rope'"):
        load(tiny_llama_dir, None, allow_missed="fuse_rope")


def test_a_disabled_pass_does_not_run_and_unknown_names_are_errors(tiny_llama_dir: Path, pack_dir: Path) -> None:
    program = load(tiny_llama_dir, pack_dir, pipeline=PipelineConfig(disabled=("fuse_qkv",))).program
    assert "fuse_qkv" not in {r.name for r in program.reports}
    with pytest.raises(ValueError, match="no pass is named 'fuse_kvq'"):
        PipelineConfig(disabled=("fuse_kvq",))
    with pytest.raises(ValueError, match="inductor='sometimes'"):
        PipelineConfig(inductor="sometimes")


def test_a_requested_provider_is_used_or_refused(tiny_llama_dir: Path, pack_dir: Path) -> None:
    asked = PipelineConfig(providers={"rms_norm": "torch"})
    assert load(tiny_llama_dir, pack_dir, pipeline=asked).program.providers["rms_norm:torch"] == 1
    with pytest.raises(ValueError, match="rms_norm: no provider named 'cutlass'"):
        load(tiny_llama_dir, pack_dir, pipeline=PipelineConfig(providers={"rms_norm": "cutlass"}))


def test_identical_layers_are_one_piece_whatever_the_depth(tmp_path: Path, pack_dir: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for depth in (3, 6):
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=depth, num_attention_heads=2, num_key_value_heads=1,
            intermediate_size=48,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(tmp_path / str(depth))
        program = load(tmp_path / str(depth), pack_dir).program
        assert (len(program.calls), program.num_distinct) == (depth + 1, 3)


def test_recipes_give_what_the_graph_computed() -> None:
    weights = {"q": torch.randn(4, 3), "k": torch.randn(2, 3)}
    recipe = {"op": "aten.cat.default", "args": [[{"weight": "q"}, {"weight": "k"}], 0]}
    assert torch.equal(evaluate(recipe, weights.__getitem__), torch.cat([weights["q"], weights["k"]]))
    assert parameters_of(recipe) == {"q", "k"}


def test_the_verifier_names_rule_node_and_stage() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(3)
    y = graph.call_function(torch.ops.aten.add_.Tensor, (x, 1))
    y.meta["val"] = torch.empty(3)
    graph.output((y,))
    with pytest.raises(BrokenGraph, match=r"after fuse_nothing: rule broken: only a seam writes its arguments.*add_"):
        verify(torch.fx.GraphModule(torch.nn.Module(), graph), "fuse_nothing")


def test_explain_has_the_documented_keys(tiny_llama_dir: Path, pack_dir: Path) -> None:
    runner = load(tiny_llama_dir, pack_dir)
    report = as_json(runner.program, runner.startup_s)
    assert {"passes", "pieces", "seams", "startup_s"} <= report.keys()
    assert all({"name", "matched", "expected", "misses"} <= p.keys() for p in report["passes"])
    assert {"total", "distinct"} <= report["pieces"].keys()
    text = as_text(runner.program, runner.startup_s)
    assert "fuse_add_rms_norm" in text and "pieces: 3, distinct: 3" in text


@pytest.mark.parametrize(
    ("target", "weight", "says", "broken"),
    [
        (torch.ops.aten.mul.Tensor, (4,), (3, 4), None),
        (
            torch.ops.aten.mul.Tensor,
            (4,),
            (4, 4),
            r"it says torch.float32 \(4, 4\), the op makes torch.float32 \(3, 4\)",
        ),
        (rms_norm.op, (1,), (3, 4), "rms_norm: weight has 1 elements but x has 4 columns"),
    ],
)
def test_a_value_that_its_op_does_not_make_is_caught_at_the_pass(
    target: Any, weight: tuple[int, ...], says: tuple[int, ...], broken: str | None
) -> None:
    graph = torch.fx.Graph()
    given = [graph.placeholder(name) for name in ("x", "w")]
    y = graph.call_function(target, (*given, 1e-5) if target is rms_norm.op else tuple(given))
    with FakeTensorMode():
        for node, shape in zip((*given, y), ((3, 4), weight, says), strict=True):
            node.meta["val"] = torch.empty(shape)
    graph.output((y,))
    module = torch.fx.GraphModule(torch.nn.Module(), graph)
    if broken is None:
        return verify(module, "fuse_something")
    with pytest.raises(BrokenGraph, match=f"after fuse_something: .*what its op makes of its arguments: .*{broken}"):
        verify(module, "fuse_something")
