"""What `seamwise explain` says of many ranks, in one process: bytes a token, memory of a rank, what is hidden."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from moe_families import GROUPS, MLA
from tiny_models import save_tiny

from seamwise.runtime.serve.cli import main

# config.json of deepseek-ai/DeepSeek-V3, what the model reads of it.
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
    "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 61, "num_key_value_heads": 128, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16", "v_head_dim": 128, "vocab_size": 129280,
    "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                            "weight_block_size": [128, 128]},
}  # fmt: skip


def explained(directory: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    command = ["explain", "--model", str(directory), "--device", "cpu", "--no-pack", "--json", *more]
    assert main(command) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def saved(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(DEEPSEEK_V3 | changes))
    return directory


@pytest.mark.slow
def test_deepseek_v3_on_64_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All 61 layers. A token's row goes to 8 experts in float8 with a scale for each 128 columns, and 8 rows of
    bfloat16 come back: 58 times 59,136 and 114,688 bytes. Measured: 29 s of processor time."""
    began = time.process_time()
    report = explained(saved(tmp_path), capsys, "--ep", "64")
    assert time.process_time() - began < 60
    sent = {c["op"].removeprefix("seamwise."): c for c in report["collectives"]}
    out, back = sent["ep_dispatch_quant:all_to_all"], sent["ep_combine:all_to_all"]
    assert (out["calls"], out["row_bytes"]) == (58, 8 * (7168 + 7168 // 128 * 4))
    assert (back["calls"], back["row_bytes"]) == (58, 8 * 7168 * 2)
    assert sent["ep_dispatch_quant:choices"]["row_bytes"] == 8 * 4 and len(sent) == 3
    assert out["meanwhile"] == ["scaled_linear", "silu_mul_quant", "scaled_linear"]  # the shared expert
    assert report["kv_bytes_per_token"] == 61 * (512 + 64) * 2
    passes = {p["name"]: (p["matched"], p["expected"]) for p in report["passes"]}
    assert passes["quantize_dispatch"] == (58, 58) and passes["begin_exchanges"] == (116, 116)
    experts = 58 * 4 * 3 * 7168 * 2048 * (1 + 4 / 128**2)  # four of 256 a rank
    attention = 61 * (7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 * 2 + 128 * 128 * 7168)
    rest = 58 * (3 * 7168 * 2048 + 256 * 7168 * 4) + 3 * 3 * 7168 * 18432 + 2 * 129280 * 7168 * 2
    assert report["weight_bytes"] == pytest.approx(experts + attention + rest, rel=0.01)


def test_memory_by_placement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Five layers, 8 ranks. The experts are shared out either way; requests that each rank has of its own
    are cached once, where ranks that share requests cache the same latents eight times: 8 times the tokens for the same
    memory, less what whole attention costs.
    """
    few = saved(tmp_path, num_hidden_layers=5)
    own, shared = explained(few, capsys, "--ep", "8"), explained(few, capsys, "--tp", "8", "--ep")
    assert own["kv_bytes_per_token"] == shared["kv_bytes_per_token"] == 5 * 576 * 2
    attention = 5 * (1536 * 128 * 192 + 512 * 128 * 256 * 2 + 128 * 128 * 7168)  # what heads share out
    mlps = 2 * 3 * 7168 * 2048 + 3 * 3 * 7168 * 18432  # shared experts, and layers without others
    rows = 2 * 129280 * 7168 * 2
    assert own["weight_bytes"] - shared["weight_bytes"] == pytest.approx(7 / 8 * (attention + mlps + rows), rel=0.02)
    free = 100e9
    tokens = [8 * (free - own["weight_bytes"]) / own["kv_bytes_per_token"]]
    tokens.append((free - shared["weight_bytes"]) / shared["kv_bytes_per_token"])
    assert 7 < tokens[0] / tokens[1] < 8


def test_what_ranks_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path, "DeepseekV3ForCausalLM", **MLA, **GROUPS)
    command = ["explain", "--model", str(tmp_path), "--device", "cpu", "--no-pack"]
    for more, message in (
        (["--dp", "2"], "wanted enable_expert_parallel=True"),
        (["--dp", "2", "--ep", "2"], "beside --tp or --dp, give --ep alone"),
        (["--ep", "2", "--validate"], "no other ranks"),
        (["--ep", "3"], "8 do not divide among 3 ranks"),
    ):
        assert main([*command, *more]) == 2 and message in capsys.readouterr().err
    report = explained(tmp_path, capsys, "--dp", "2", "--ep")
    assert report == report | {"collectives": explained(tmp_path, capsys, "--ep", "2")["collectives"]}
    assert main([*command, "--ep", "2"]) == 0
    assert "meanwhile linear_packed silu_mul linear_packed" in capsys.readouterr().out


def test_memory_of_stages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four layers in two stages: least is sent where the next layer has its latents, the query's quantized: these, a
    scale for each 128 columns, and the residual; caches are shared out, and so are all weights."""
    few = saved(tmp_path, num_hidden_layers=4, vocab_size=1024, first_k_dense_replace=2, n_routed_experts=16)
    whole, stages = explained(few, capsys), explained(few, capsys, "--pp", "2")["stages"]
    assert [s["layers"] for s in stages] == [2, 2] and [s["kv_bytes_per_token"] for s in stages] == [2 * 576 * 2] * 2
    assert [s["taken_bytes_per_token"] for s in stages] == [0, 7168 * 2 + 1536 + 12 * 4 + 576 * 2]
    assert sum(s["weight_bytes"] for s in stages) == pytest.approx(whole["weight_bytes"], rel=1e-3)
    assert main(["explain", "--model", str(few), "--device", "cpu", "--no-pack", "--pp", "5"]) == 2
    assert "pipeline_parallel_size=5: the model has 4 layers" in capsys.readouterr().err
