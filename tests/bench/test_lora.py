"""`seamwise bench lora`: its adapters are what PEFT would have saved, and every case runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_adapters import logits_of
from tiny_models import save_tiny

from seamwise.bench.lora import write_adapters
from seamwise.passes.add_adapters import AdaptedLayer
from seamwise.runtime.serve.cli import main
from seamwise.runtime.weights.read_adapter import read_adapter


@pytest.mark.slow
def test_every_case_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "m", "LlamaForCausalLM", max_position_embeddings=1024)
    assert model is not None
    shape = ["--requests", "4", "--adapters", "2", "--rank", "4", "--prompt-tokens", "5", "--output-tokens", "6"]
    out = tmp_path / "out.json"
    assert main(["bench", "lora", "--model", str(tmp_path / "m"), *shape, "--rounds", "2", "--json", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["results"].keys() == {"plain", "enable_lora", "adapters"} and report["shape"]["adapters"] == 2
    for row in report["results"].values():
        assert len(row["runs"]) == 2 and row["tokens_per_s"] > 0 and row["of_plain"] > 0
    assert report["results"]["plain"]["of_plain"] == 1 and "goal 0.870" in capsys.readouterr().out


def test_peft_reads_the_adapters(tmp_path: Path) -> None:
    from peft import PeftModel

    base = save_tiny(tmp_path / "m", "LlamaForCausalLM", num_hidden_layers=1)
    layers = [
        AdaptedLayer(
            module=f"model.layers.0.self_attn.{name}_proj", shape=(rows, 64), width=rows, rows=[(0, rows)],
            columns=[(0, 64)],
        )
        for name, rows in (("q", 64), ("k", 32))
    ]  # fmt: skip
    (directory,) = write_adapters(tmp_path, layers, 1, 4)
    assert {*read_adapter(Path(directory)).layers} == {layer.module for layer in layers}
    plain = logits_of(base, [[3, 4, 5]])
    changed = logits_of(PeftModel.from_pretrained(base, directory), [[3, 4, 5]])
    assert not torch.equal(plain[0], changed[0])
