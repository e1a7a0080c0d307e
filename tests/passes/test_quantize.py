"""Quantized linear layers: every promise kept, the result near the plain model's, each near miss explained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shared_traces import sharing_traces
from step_inputs import Steps

from seamwise import LLM, ModelRunner, StepInput
from seamwise.compile.pipeline import PipelineConfig, rewrite
from seamwise.compile.startup_times import Ledger
from seamwise.passes import FUSE_QKV, FUSE_RMS_NORM_QUANT, SCHEMES
from seamwise.passes.quantization.quantize_linear import QUANTIZE_LINEAR
from seamwise.passes.quantization.quantize_weights import quantize_weights
from seamwise.runtime.build.capture_model import capture_model
from seamwise.runtime.build.compile_model import compile_model
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig

traces = sharing_traces()
FUSED = {"fuse_rms_norm_quant": 1, "fuse_add_rms_norm_quant": 3, "fuse_silu_mul_quant": 2, "fuse_attention_quant": 2}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        intermediate_size=512, tie_word_embeddings=False, max_position_embeddings=512,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("quantized")
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def options(path: Path, entry: str, quantization: str | None, **pipeline: Any) -> tuple[ModelConfig, RunnerConfig]:
    config = ModelConfig.from_directory(path)
    chosen = PipelineConfig(quantization=quantization, **pipeline)
    return config, RunnerConfig.for_model(
        config, dtype="bfloat16", entry=entry, device="cpu", pipeline=chosen, pack_dir=None
    )


@pytest.mark.parametrize(
    ("quantization", "entry"),
    [*((scheme, "own") for scheme in SCHEMES), ("fp8", "transformers"), ("int8", "transformers")],
)
def test_every_layer_is_quantized_and_every_quantize_is_fused(model_dir: Path, entry: str, quantization: str) -> None:
    program, _ = compile_model(*options(model_dir, entry, quantization, validate=True), Ledger())
    reports = {r.name: r for r in program.reports}
    assert reports["quantize_weights"].matched == reports["quantize_weights"].expected == 14
    assert reports["quantize_linear"].matched == reports["quantize_linear"].expected == 8
    weight_only = SCHEMES[quantization].format == "int4"
    assert {n: reports[n].matched for n in FUSED} == {n: 0 if weight_only else count for n, count in FUSED.items()}
    left = [n for n in program.providers if n.split(":")[0] == "quantize"]
    assert not left, "a quantize is left alone"
    packed = 0 if quantization == "int8" else 8
    assert reports["pack_linear"].matched == packed + 1, "int4 and float8 layers, and the head, are packed"
    assert program.providers.get("linear_int:cpp", 0) == packed
    for report in program.reports:
        assert report.certificate is not None
        assert report.certificate["lossy"] == (
            report.name in ("quantize_weights", "quantize_linear", "quantize_experts")
        )
        assert report.certificate["lossy"] or report.certificate["max_error"] < 1e-9
    (miss,) = reports["quantize_weights"].misses
    assert miss.module == "lm_head" and "the head" in miss.reason


@pytest.mark.parametrize(("quantization", "error"), [("fp8", 0.1), ("fp8_block", 0.1), ("int8", 0.05), ("w4a16", 0.4)])
def test_logits_stay_near_the_plain_models(model_dir: Path, quantization: str, error: float) -> None:
    """The whole runner: quantized weights are recipes, evaluated at load. Errors are of the largest logit."""
    steps = Steps([[5, 77, 301, 18, 44, 9], [7, 8]], block_size=16)
    batch = StepInput(**steps.next({0: 6, 1: 2}))

    def logits(**chosen: Any) -> torch.Tensor:
        runner = ModelRunner.load(model_dir, dtype="bfloat16", device="cpu", pack_dir=None, **chosen)
        runner.allocate_kv(steps.num_blocks)
        return runner.step(batch).logits.float()

    plain, quantized = logits(), logits(quantization=quantization)
    apart = float((plain - quantized).abs().max() / plain.abs().max())
    assert 1e-3 < apart < error, apart


def test_an_extra_user_of_the_normed_rows_is_named(model_dir: Path) -> None:
    config, chosen = options(model_dir, "own", "fp8", disabled=tuple(FUSED))
    model = capture_model(config, chosen, Ledger())
    rewrite(model.captured, model.structure, chosen.pipeline, Ledger())
    graph = model.captured.graph
    quant = next(n for n in graph.nodes if "quantize.default" in str(n.target))
    with graph.inserting_after(quant):
        extra = graph.call_function(torch.ops.aten.neg.default, (quant.args[0],))
    extra.meta = dict(quant.args[0].meta)
    output = next(iter(graph.find_nodes(op="output")))
    output.args = ((*output.args[0], extra),)
    report = FUSE_RMS_NORM_QUANT.apply(model.captured.module, model.structure)
    assert report.matched == 0 and "has an extra user neg" in report.misses[0].reason


def test_joined_weights_must_be_stored_alike(model_dir: Path) -> None:
    """A form that no kernel reads keeps the dequantized weight and says why."""
    config, chosen = options(model_dir, "own", None, disabled=("pack_linear",))
    model = capture_model(config, chosen, Ledger())
    quantize_weights(replace(SCHEMES["fp8"], rows=48)).apply(model.captured.module, model.structure)
    report = QUANTIZE_LINEAR.apply(model.captured.module, model.structure)
    assert report.matched == report.expected == 0 and "blocks of (48, 0) have no kernel" in report.misses[0].reason


def test_weights_that_were_joined_wrongly_break_the_promise(model_dir: Path) -> None:
    """A layer whose weight is quantized in part is no fault of the checkpoint: joining must have left it apart."""
    config, chosen = options(model_dir, "own", None)
    model = capture_model(config, chosen, Ledger())
    module = model.captured.module
    quantize_weights(SCHEMES["fp8"]).apply(module, model.structure)
    FUSE_QKV.apply(module, model.structure)
    joined = next(n for n in module.graph.nodes if n.target is torch.ops.aten.cat.default)
    first, *others = joined.args[0]
    with module.graph.inserting_before(joined):
        plain = module.graph.call_function(torch.ops.aten.neg.default, (first,))
    plain.meta = dict(first.meta)
    joined.args = ([plain, *others], *joined.args[1:])
    report = QUANTIZE_LINEAR.apply(module, model.structure)
    assert report.expected == report.matched + 1 and "which is not quantized" in report.misses[0].reason


@pytest.mark.parametrize("bias", [False, True])
def test_joined_weights_whose_blocks_do_not_meet_are_read_one_by_one(bias: bool, tmp_path: Path) -> None:
    """SmolLM2's 576 rows of queries are four and a half blocks of 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=192, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=32,
        intermediate_size=192, attention_bias=bias, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    model.save_pretrained(tmp_path)
    steps = Steps([[5, 7, 30, 18, 44, 9], [7, 8]], block_size=16)
    batch, found = StepInput(**steps.next({0: 6, 1: 2})), []
    for quantization in (None, "fp8_block"):
        runner = ModelRunner.load(tmp_path, dtype="float32", device="cpu", pack_dir=None, quantization=quantization)
        runner.allocate_kv(steps.num_blocks)
        found.append(runner.step(batch).logits.clone())
    reports = {r.name: r for r in runner.program.reports}
    assert reports["quantize_linear"].matched == reports["quantize_linear"].expected == 8
    apart = float((found[0] - found[1]).abs().max() / found[0].abs().max())
    assert 1e-3 < apart < 0.1, apart


def test_unknown_schemes_are_refused(model_dir: Path) -> None:
    with pytest.raises(ValueError, match="quantization='fp9'; wanted None or one of fp8, fp8_block, int8, w4a16"):
        LLM(model_dir, quantization="fp9", device="cpu")
