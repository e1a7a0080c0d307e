"""A graph whose layers are repeated is the graph of the whole model, node for node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, ONE_EACH
from moe_families import MOE
from tiny_models import SIZES
from torch.fx import Node

from seamwise.compile import repeat_layers
from seamwise.compile.capture import Captured, capture
from seamwise.compile.startup_times import Ledger
from seamwise.model_defs import build_model
from seamwise.model_defs.blocks import Decoder, RMSNorm
from seamwise.runtime.build import capture_model
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig
from seamwise.runtime.build.step import capture_dims

LAYERS = 4
# How many of four layers are traced: one of each kind, and where the first's kind occurs again, one more.
TRACED = {
    **dict.fromkeys(ONE_EACH, 2),
    **{"gemma2": 3, "gemma3": 3, "qwen2, upper window": 2, "qwen3, biases, windows": 3, "llama, tied, wide heads": 2},
    **{"mixtral": 2, "qwen3_moe": 2, "deepseek_v2": 2, "deepseek_v3": 2, "gpt_oss": 3},
    **{"qwen3_moe, a dense layer, biases": 2, "qwen3_moe, every other layer": 3},
}


def configured(name: str, folder: Path) -> tuple[ModelConfig, RunnerConfig]:
    architecture, changes = (FAMILIES | MOE)[name]
    changes = {**SIZES, **changes, "num_hidden_layers": LAYERS}
    if "layer_types" in changes:
        changes["layer_types"] = changes["layer_types"] * (LAYERS // len(changes["layer_types"]))
    written = getattr(transformers, architecture).config_class(**changes)
    written.architectures = [architecture]
    written.save_pretrained(folder)
    config = ModelConfig.from_directory(folder)
    return config, RunnerConfig.for_model(config, dtype=torch.bfloat16, device="cpu")


def whole(model: Any, arguments: Any, spec: Any) -> Captured:
    return capture(model, arguments, capture_dims(spec.layers))


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What loading warns of; a handler at the root would have torch describe every tensor that it traces."""
    said: list[str] = []
    monkeypatch.setattr(capture_model._LOG, "warning", lambda text, *given: said.append(text % given))
    return said


def described(captured: Captured) -> list[Any]:
    """Return every node's op, name, target, arguments, value, and modules."""

    def of(node: Node) -> Any:
        found = node.meta.get("val")
        several = found if isinstance(found, (tuple, list)) else [found]
        values = [(str(t.shape), str(t.stride()), t.dtype) if isinstance(t, torch.Tensor) else t for t in several]
        modules = {k: list(v) for k, v in (node.meta.get("nn_module_stack") or {}).items()}
        weight = node.meta.get("weight", False)
        return node.op, node.name, str(node.target), str(node.args), str(node.kwargs), str(values), modules, weight

    return [*map(of, captured.graph.nodes), captured.weights, captured.inputs]


@pytest.mark.parametrize("name", TRACED)
def test_the_graph_is_that_of_the_whole_model(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    config, options = configured(name, tmp_path)
    traced: list[int] = []

    def counted(model: Any, arguments: Any, dims: Any) -> Captured:
        traced.append(len(arguments["kv_caches"]))
        return capture(model, arguments, dims)

    monkeypatch.setattr(repeat_layers, "capture", counted)
    repeated = capture_model.capture_model(config, options, Ledger())
    assert not warnings and traced == [TRACED[name]]
    monkeypatch.setattr(capture_model, "_captured", whole)
    wanted = capture_model.capture_model(config, options, Ledger())
    repeated.captured.graph.lint()
    for got, want in zip(described(repeated.captured), described(wanted.captured), strict=True):
        assert got == want


def test_layers_that_differ_in_anything_are_kinds_of_their_own(tmp_path: Path) -> None:
    config, _ = configured("llama", tmp_path)
    decoder: Any = build_model(config.architecture, config.raw).model
    assert len(set(decoder.kinds())) == 1
    decoder.table_of_layer[3] = 1  # a rope of its own
    assert decoder.kinds()[3] not in decoder.kinds()[:3]
    decoder.table_of_layer[3] = 0
    decoder.layers[1].input_layernorm.eps = 0.5
    decoder.layers[2].mlp.act = torch.tanh
    decoder.layers[3].post_attention_layernorm = RMSNorm(7, 1e-6)
    assert len(set(decoder.kinds())) == 4
    decoder.layers[0].register_forward_hook(lambda *given: None)
    assert decoder.kinds()[0] not in decoder.kinds()[1:]


def test_a_model_of_another_form_is_traced_whole_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    """A layer that reads the one before the last: what is traced of it cannot be another's."""
    config, options = configured("llama", tmp_path)

    def forward(self: Any, ids: Any, positions: Any, caches: Any, where: Any) -> Any:
        x = self.embed_tokens(ids)
        table, before = self.tables[0](positions, x.dtype), x
        for layer, cache in zip(self.layers, caches, strict=True):
            x, before = layer(x, table, cache, where) + before, x
        return self.norm(x)

    monkeypatch.setattr(Decoder, "forward", forward)
    made = capture_model.capture_model(config, options, Ledger())
    assert len(warnings) == 1 and warnings[0].startswith("All layers of CausalLM are traced")
    monkeypatch.setattr(capture_model, "_captured", whole)
    wanted = capture_model.capture_model(config, options, Ledger())
    assert described(made.captured) == described(wanted.captured)
