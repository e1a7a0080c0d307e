"""Requests that share a long prefix attend to it together: outputs stay the same in bits, however steps run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import save_tiny

from seamwise import LLM, SamplingParams

PREFIX, OTHER = (np.random.default_rng(i).integers(3, 97, 700).tolist() for i in range(2))
OWN = np.random.default_rng(2).integers(3, 97, (8, 9)).tolist()
PROMPTS = [PREFIX + own for own in OWN[:5]] + [OTHER + own for own in OWN[5:]]
TILES = 4 * 10 + 2 * 10  # that a step of all of them spares in a layer: of 700 tokens, of which 64 each are a tile


def run(llm: LLM, prompts: list[list[int]] = PROMPTS) -> tuple[list[Any], int]:
    """Return tokens with their log probabilities, and the tiles spared."""
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logprobs=2, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    found = [(o.outputs[0].token_ids, o.outputs[0].cumulative_logprob) for o in outputs]
    return found, llm.engine.runner.recording_stats.cascade_tiles


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cascade")
    heads = {"head_dim": 64, "max_position_embeddings": 1024}
    save_tiny(folder / "llama", "LlamaForCausalLM", **heads)
    windows = {"sliding_window": 90, **heads}
    save_tiny(folder / "gemma2", "Gemma2ForCausalLM", **windows)  # softcaps; one layer of two sees all
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_scaling": None, "rope_parameters": None}
    save_tiny(folder / "gpt_oss", "GptOssForCausalLM", **windows | experts)  # sinks; one layer of two
    return folder


def load(path: Path, **options: Any) -> LLM:
    given = {"dtype": "float32", "max_model_len": 800, "max_num_batched_tokens": 96, "pack_dir": path / "packs"}
    return LLM(path, **(given | options))


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("llama", {}, 2),
        ("llama", {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "cudagraph_mode": "full_and_piecewise"}, 2),
        ("llama", {"enforce_eager": True, "async_scheduling": False}, 2),
        ("llama", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 3}}, 2),
        ("gemma2", {}, 1),
        ("gpt_oss", {}, 1),
    ],
)
def test_outputs_are_the_same_in_bits(directory: Path, name: str, options: dict[str, Any], layers: int) -> None:
    alone, none = run(load(directory / name, disable_cascade_attn=True, **options))
    together, spared = run(load(directory / name, **options))
    assert together == alone
    assert none == 0
    assert spared >= layers * TILES  # one step of all of them, at the least


def test_prompts_that_share_nothing_spare_nothing(directory: Path) -> None:
    assert run(load(directory / "llama"), [PREFIX, OTHER])[1] == 0
