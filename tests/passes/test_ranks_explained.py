"""What `seamwise explain` says of many ranks, in one process: bytes a token, memory of a rank, what is hidden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from moe_families import GROUPS, MLA
from shared_traces import sharing_traces
from tiny_models import save_tiny

from seamwise.bench.gpu.models import REAL
from seamwise.runtime.serve.cli import main

traces = sharing_traces()
DEEPSEEK_V3 = {**REAL["deepseek-r1"], "num_hidden_layers": 61}


def explained(directory: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    command = ["explain", "--model", str(directory), "--device", "cpu", "--no-pack", "--json", *more]
    assert main(command) == 0
    report: dict[str, Any] = json.loads(capsys.readouterr().out)
    return report


def saved(directory: Path, **changes: Any) -> Path:
    (directory / "config.json").write_text(json.dumps(DEEPSEEK_V3 | changes))
    return directory


def test_deepseek_v3_on_64_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """13 of its layers: all 61 take 29 s of processor time. A token's row goes to 8 experts in float8 with a scale for
    each 128 columns, and 8 rows of bfloat16 come back: 10 times 59,136 and 114,688 bytes."""
    report = explained(saved(tmp_path, num_hidden_layers=13), capsys, "--ep", "64")
    sent = {c["op"].removeprefix("seamwise."): c for c in report["collectives"]}
    out, back = sent["ep_dispatch_quant:all_to_all"], sent["ep_combine:all_to_all"]
    assert (out["calls"], out["row_bytes"]) == (10, 8 * (7168 + 7168 // 128 * 4))
    assert (back["calls"], back["row_bytes"]) == (10, 8 * 7168 * 2)
    assert sent["ep_dispatch_quant:choices"]["row_bytes"] == 8 * 4 and len(sent) == 3
    assert out["meanwhile"] == ["linear_int", "silu_mul_quant", "linear_int"]  # the shared expert
    assert report["kv_bytes_per_token"] == 13 * (512 + 64) * 2
    passes = {p["name"]: (p["matched"], p["expected"]) for p in report["passes"]}
    assert passes["quantize_dispatch"] == (10, 10) and passes["begin_exchanges"] == (20, 20)
    experts = 10 * 4 * 3 * 7168 * 2048 * (1 + 4 / 128**2)  # four of 256 a rank
    attention = 13 * (7168 * (1536 + 576) + 1536 * 128 * 192 + 512 * 128 * 256 * 2 + 128 * 128 * 7168)
    rest = 10 * (3 * 7168 * 2048 + 256 * 7168 * 4) + 3 * 3 * 7168 * 18432 + 2 * 129280 * 7168 * 2
    assert report["weight_bytes"] == pytest.approx(experts + attention + rest, rel=0.01)


def test_memory_by_placement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DeepSeek-R1 in float8 on R = 8 GPUs of 141 GB, M nine tenths of it, from traces of four and of five layers.

    W(61) = W(4) + 57 (W(5) - W(4)), a rank's weights: layers with experts are alike. c = 61 (512 + 64) elements a
    cached token. Experts are shared out by whole ones in both ways that are compared:
    - "tp", attention by heads and requests on all ranks: each caches the same latents, (M - W_tp) / c tokens in all;
    - "ep", attention whole and requests of each rank's own: a token is cached once, R (M - W_ep) / c tokens in all.
    W_ep - W_tp = (1 - 1/R) (attention by heads + shared experts + dense MLPs + vocabulary), which is what ep costs.
    A float8 cache halves c. What is published of others (67 to 650 thousand tokens, 34 GB, two fifths of the cache)
    is of memory, lengths and versions that are not stated: these are ours, of the sizes that are stated here.
    """
    weights: dict[str, float] = {}
    for way, flags in {"ep": ["--ep", "8"], "tp": ["--tp", "8", "--ep"]}.items():
        few = [explained(saved(tmp_path, num_hidden_layers=n), capsys, *flags) for n in (4, 5)]
        assert [report["kv_bytes_per_token"] for report in few] == [4 * 576 * 2, 5 * 576 * 2]
        weights[way] = few[0]["weight_bytes"] + 57 * (few[1]["weight_bytes"] - few[0]["weight_bytes"])
    by_heads = 61 * (1536 * 128 * 192 + 512 * 128 * 256 * 2 + 128 * 128 * 7168)  # kv_b in bfloat16
    mlps = 58 * 3 * 7168 * 2048 + 3 * 3 * 7168 * 18432
    rows = 2 * 129280 * 7168 * 2
    assert weights["ep"] - weights["tp"] == pytest.approx(7 / 8 * (by_heads + mlps + rows), rel=0.02)
    assert [round(weights[way] / 1e9) for way in ("ep", "tp")] == [102, 86]
    free = {way: 0.9 * 141e9 - weight for way, weight in weights.items()}
    tokens = {way: n * free[way] / (61 * 576 * 2) for way, n in (("ep", 8), ("tp", 1))}
    assert tokens == pytest.approx({"ep": 2.83e6, "tp": 0.596e6}, rel=0.04)
    half = explained(saved(tmp_path, num_hidden_layers=4), capsys, "--ep", "8", "--kv-cache-dtype", "fp8")
    assert half["kv_bytes_per_token"] == 4 * 576


def test_what_ranks_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(tmp_path, "DeepseekV3ForCausalLM", **MLA, **GROUPS)
    command = ["explain", "--model", str(tmp_path), "--device", "cpu", "--no-pack"]
    for more, message in (
        (["--dp", "2"], "wanted enable_expert_parallel=True"),
        (["--dp", "2", "--ep", "2"], "beside --tp or --dp, give --ep alone"),
        (["--ep", "2", "--validate"], "no other ranks"),
        (["--ep", "3"], "8 do not divide among 3 ranks"),
        (["--ep", "2", "--eplb", "3"], "11 do not divide among 2 ranks"),
        (["--eplb", "3"], "give --ep N too"),
    ):
        assert main([*command, *more]) == 2 and message in capsys.readouterr().err
    report = explained(tmp_path, capsys, "--dp", "2", "--ep")
    assert report == report | {"collectives": explained(tmp_path, capsys, "--ep", "2")["collectives"]}
    moving = explained(tmp_path, capsys, "--ep", "2", "--eplb", "2")["balance"]
    assert main([*command, "--ep", "2", "--eplb", "2"]) == 0
    text = capsys.readouterr().out
    assert "meanwhile linear_packed silu_mul linear_packed" in text
    assert moving == {
        "layers": 1, "experts": 8, "places": 10, "expert_bytes": 3 * 64 * 24 * 4, "row_bytes": 2 * 64 * 4,
        "table_bytes": 8 * (1 + 3) * 4,  # how many copies, and as many places as an expert may have
    }  # fmt: skip
    assert f"8 at 10 places in each of 1 layers, one layer between two steps, {moving['expert_bytes']} B each" in text


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
