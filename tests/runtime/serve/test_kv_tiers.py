"""Models whose blocks leave the cache and come back: equal in bits, across restarts, never those of other weights."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tiny_models import save_tiny

from seamwise import LLM, SamplingParams
from seamwise.runtime.kv.offload_options import make_offload
from seamwise.runtime.serve.async_llm import AsyncLLM
from seamwise.testing import FakeRunner

GREEDY = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logprobs=1, detokenize=False)
PROMPTS = [np.random.default_rng(i).integers(3, 97, 60).tolist() for i in range(4)]
SMALL: dict[str, Any] = {
    "max_model_len": 80, "max_num_seqs": 2, "max_num_batched_tokens": 64, "block_size": 4, "kv_offloading_min_tokens": 1
}  # fmt: skip
MLA: dict[str, Any] = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip


def results(llm: LLM) -> list[tuple[list[int], Any]]:
    found = []
    for prompt in PROMPTS:
        (output,) = llm.generate([{"prompt_token_ids": prompt}], GREEDY, use_tqdm=False)
        found.append((list(output.outputs[0].token_ids), output.outputs[0].cumulative_logprob))
    return found


def stats(llm: LLM) -> Any:
    assert llm.engine.offload is not None
    return llm.engine.offload.stats


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("LlamaForCausalLM", {}),
        ("Gemma2ForCausalLM", {"sliding_window": 12, "head_dim": 16}),
        ("DeepseekV3ForCausalLM", MLA),
    ],
)
def test_blocks_come_back_in_bits(tmp_path: Path, architecture: str, changes: dict[str, Any]) -> None:
    save_tiny(tmp_path / "m", architecture, **changes)
    tiers = {"kv_offloading_folder": tmp_path / "kv", "kv_offloading_folder_size": 0.1}
    plain = LLM(tmp_path / "m", **SMALL | {"kv_offloading_min_tokens": None})
    wanted, groups = results(plain), len(plain.engine.runner.kv_groups)
    if architecture.startswith("Deepseek"):  # latent attention in float32 rounds by how a prompt is cut
        wanted = [(tokens, pytest.approx(logprob, rel=1e-5)) for tokens, logprob in wanted]
    llm = LLM(tmp_path / "m", num_gpu_blocks_override=1 + 25 * groups, kv_offloading_size=0.1, **tiers, **SMALL)
    assert results(llm) == wanted and stats(llm).stored > 0
    assert results(llm) == wanted and stats(llm).loaded > 0 and stats(llm).hits > 0, "nothing came back"
    llm.shutdown()
    later = LLM(tmp_path / "m", **tiers, **SMALL)
    assert results(later) == wanted and stats(later).hits == 4 * 56 and stats(later).lost == 0
    later.shutdown()


def test_other_weights_and_other_dtypes_find_nothing(tmp_path: Path) -> None:
    for seed in (0, 1):
        save_tiny(tmp_path / str(seed), "LlamaForCausalLM", seed=seed)
    tiers = {"kv_offloading_folder": tmp_path / "kv", "kv_offloading_folder_size": 0.1}
    llm = LLM(tmp_path / "0", **tiers, **SMALL)
    results(llm)
    llm.shutdown()
    for options in ({"dtype": "bfloat16"}, {"kv_cache_dtype": "fp8"}):
        other = LLM(tmp_path / "0", **options, **tiers, **SMALL)
        results(other)
        assert stats(other).loaded == stats(other).lost == 0, options  # they have other names
        other.shutdown()
    shutil.copytree(tmp_path / "0", tmp_path / "rope")
    config = json.loads((tmp_path / "rope/config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 50.0
    (tmp_path / "rope/config.json").write_text(json.dumps(config))
    other = LLM(tmp_path / "rope", **tiers, **SMALL)
    results(other)
    assert stats(other).loaded == 0, "the weights are the same, and what is computed with them is not"
    other.shutdown()
    llm = LLM(tmp_path / "0", **tiers, **SMALL)
    llm.update_weights(load_file(tmp_path / "1/model.safetensors"))
    plain = LLM(tmp_path / "1", **SMALL | {"kv_offloading_min_tokens": None})
    assert results(llm) == results(plain) and stats(llm).loaded == 0
    llm.reset_prefix_cache()
    llm.update_weights(load_file(tmp_path / "0/model.safetensors"))
    results(llm)
    assert stats(llm).hits == 4 * 56, "the first weights are back, and what they computed is right"
    llm.shutdown()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_offloading_folder": "x"}, "kv_offloading_folder and kv_offloading_folder_size .* go together"),
        ({"kv_offloading_min_tokens": 9}, "kv_offloading_min_tokens needs kv_offloading_size or"),
        ({"kv_offloading_size": 1, "kv_offloading_backend": "lmcache"}, "'lmcache': wanted 'native'"),
        ({"kv_offloading_size": 1e-9}, "kv_offloading_size=1e-09: wanted GiB, at least those of one block of"),
        ({"kv_offloading_size": 1, "enable_prefix_caching": False}, "enable_prefix_caching=False: stored blocks"),
        ({"kv_offloading_size": 1, "kv_offloading_min_tokens": 0}, "kv_offloading_min_tokens=0: wanted 1 or more"),
    ],
)
def test_what_contradicts_is_refused_by_name(tiny_llama_dir: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(tiny_llama_dir, max_num_seqs=2, max_model_len=64, **options)


def test_ranks_that_decide_for_themselves_are_refused_by_name() -> None:
    runner = FakeRunner(num_blocks=5, block_size=4)
    with pytest.raises(ValueError, match=r"kv_offloading_size and .* with 2 ranks that decide for themselves: .*'mp'"):
        make_offload(runner, ahead=1, num_ranks=2, enable_prefix_caching=True, kv_offloading_size=1)


@pytest.mark.slow
@pytest.mark.usefixtures("forked_ranks")
def test_each_rank_keeps_its_part_and_what_one_has_lost_is_computed(tmp_path: Path, pack_dir: Path) -> None:
    for seed in (0, 1):
        save_tiny(tmp_path / str(seed), "LlamaForCausalLM", seed=seed)
    tiers: dict[str, Any] = {"kv_offloading_folder": tmp_path / "kv", "kv_offloading_folder_size": 0.1}
    options: dict[str, Any] = {**SMALL, **tiers, "dtype": "float32", "device": "cpu", "pack_dir": pack_dir}
    wanted = []
    for seed in (0, 1):
        alone = LLM(tmp_path / str(seed), **options)
        wanted.append([tokens for tokens, _ in results(alone)])
        alone.shutdown()
    of_one = sorted(path.name for path in (tmp_path / "kv").glob("*.kv"))

    def tokens(llm: LLM) -> list[list[int]]:
        return [tokens for tokens, _ in results(llm)]

    llm = LLM(
        tmp_path / "0", tensor_parallel_size=2, num_gpu_blocks_override=26, kv_offloading_size=0.1, **options
    )  # fmt: skip
    assert tokens(llm) == wanted[0] and stats(llm).stored > 0 and stats(llm).loaded == stats(llm).lost == 0
    assert tokens(llm) == wanted[0] and stats(llm).hits > 0, "nothing came back"
    before = stats(llm).loaded
    llm.update_weights(load_file(tmp_path / "1/model.safetensors"))
    assert tokens(llm) == wanted[1] and stats(llm).loaded == before, "what other weights computed is loaded"
    llm.update_weights(load_file(tmp_path / "0/model.safetensors"))
    assert tokens(llm) == wanted[0] and stats(llm).loaded > before
    llm.shutdown()
    assert sorted(path.name for path in (tmp_path / "kv").glob("*.kv")) == of_one
    parts = [sorted((tmp_path / "kv" / f"rank{rank}of2").glob("*.kv")) for rank in range(2)]
    assert [path.name for path in parts[0]] == [path.name for path in parts[1]] and not {*of_one} & {
        path.name for path in parts[0]
    }
    for index, path in enumerate(parts[1]):  # of rank 1 alone, every third file is whole
        data = path.read_bytes()
        if index % 3:
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if index % 3 == 1 else data[: len(data) // 2])
    parts[0][3].unlink()
    later = LLM(tmp_path / "0", tensor_parallel_size=2, **options)
    assert tokens(later) == wanted[0] and stats(later).lost > 0
    assert tokens(later) == wanted[0]
    later.shutdown()


@pytest.mark.slow
def test_a_server_that_is_started_again_finds_its_blocks(tiny_llama_dir: Path, tmp_path: Path) -> None:
    async def life() -> tuple[list[int], int, int]:
        llm = AsyncLLM(
            tiny_llama_dir, kv_offloading_folder=tmp_path, kv_offloading_folder_size=0.1, max_num_seqs=2, device="cpu"
        )
        try:
            params = SamplingParams(max_tokens=4, seed=0, detokenize=False)
            async for output in llm.generate({"prompt_token_ids": [*range(3, 200)]}, params):
                last = output
            assert last.metrics is not None
            await asyncio.sleep(0.3)  # until its counters have come
            return last.outputs[0].token_ids, last.metrics.num_cached_tokens, llm.engine.stats.counters["kv_hits"]
        finally:
            await llm.shutdown()

    first, second = asyncio.run(life()), asyncio.run(life())
    assert first[1:] == (0, 0) and second == (first[0], 192, 192)
