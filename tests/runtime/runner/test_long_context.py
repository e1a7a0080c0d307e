"""Long prompts: RoPE stretched by YaRN is transformers', and memory grows with the prompt, never with its square."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import draw_tokens
from step_inputs import Steps
from tiny_models import assert_within_budget, save_tiny

from seamwise import LLM, ModelRunner, SamplingParams
from seamwise.runtime.build.step import StepInput

YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 256}
TRAINED = {"max_position_embeddings": 256, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}


def test_yarn_by_an_override_is_transformers_own_beyond_what_was_trained(tmp_path: Path, pack_dir: Path) -> None:
    import transformers

    model = save_tiny(tmp_path, "LlamaForCausalLM", **TRAINED)
    stretched = model.config.__class__.from_pretrained(tmp_path, rope_parameters=YARN, max_position_embeddings=1024)
    stretched._attn_implementation = "eager"
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, config=stretched).eval()
    runner = ModelRunner.load(tmp_path, device="cpu", pack_dir=pack_dir, hf_overrides={"rope_parameters": YARN})
    assert runner.options.max_model_len == 1024
    requests = draw_tokens(0, 1000, 270)
    steps = Steps(requests, block_size=16)
    runner.allocate_kv(steps.num_blocks)
    parts: tuple[list[Any], list[Any]] = ([], [])
    for counts in ({0: 500, 1: 270}, {0: 499}, {0: 1}):
        logits = runner.step(StepInput(**steps.next(counts))).logits
        for r, rows in zip(counts, logits.split([*counts.values()]), strict=True):
            parts[r].append(rows.clone())
    assert_within_budget([torch.cat(rows) for rows in parts], theirs, requests)


def test_overrides_reach_packs_and_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from seamwise.runtime.serve.cli import main

    save_tiny(tmp_path / "model", "LlamaForCausalLM", **TRAINED)
    asked = {"rope_parameters": YARN}
    packs = tmp_path / "packs"
    command = ["--model", str(tmp_path / "model"), "--hf-overrides", json.dumps(asked), "-o", str(packs / "made")]
    assert main(["compile", *command]) == 0
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, detokenize=False)
    prompt = {"prompt_token_ids": draw_tokens(0, 400)[0]}
    outputs = []
    for model, options in ((packs / "made", {}), (tmp_path / "model", {"hf_overrides": asked, "pack_dir": packs})):
        llm = LLM(model, device="cpu", **options)
        assert llm.engine.runner.options.max_model_len == 1024
        outputs.append(list(llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids))
        llm.shutdown()
    assert outputs[0] == outputs[1]
    with pytest.raises(ValueError, match="max_model_len is 256"):
        LLM(tmp_path / "model", device="cpu", pack_dir=packs).generate(prompt, params, use_tqdm=False)


# In a process of its own, whose most memory is its own; all of a prompt in one step: what is quadratic shows.
MEASURE = """
import json, sys
from pathlib import Path
from seamwise.bench.long_context import measure
sizes = {"dtype": "bfloat16", "load_format": "dummy", "pack_dir": Path(sys.argv[2])}
print(json.dumps([measure(Path(sys.argv[1]), n, n, **sizes) for n in (4096, 8192)]))
"""


@pytest.mark.slow
def test_memory_grows_with_a_prompt_as_planned(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 4, "head_dim": 32,
        "num_key_value_heads": 4, "max_position_embeddings": 8192, "hidden_size": 128, "num_hidden_layers": 2,
        "vocab_size": 512, "intermediate_size": 512, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "packs")]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    short, long = json.loads(run.stdout.splitlines()[-1])
    planned, measured = (long[name] - short[name] for name in ("planned_bytes", "measured_bytes"))
    assert planned > 12e6  # one head's scores of all tokens would be 100 MB more in bfloat16
    assert 0.97 < measured / planned < 1.03, f"planned {planned / 1e6:.1f} MB more, measured {measured / 1e6:.1f}"
