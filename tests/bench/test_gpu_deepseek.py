"""The DeepSeek rank of `seamwise bench gpu`: its network model, attention, experts and recorded step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from seamwise.bench.gpu.deepseek import BACK_GB_PER_S, OUT_GB_PER_S, network
from seamwise.bench.gpu.deepseek_rank import Rank, Step, local_copies
from seamwise.compile.derive import parameters_of
from seamwise.compile.record.recorder import CPURecorder


def test_the_network_model() -> None:
    row = network(20_000.0, tokens=128, sequences=128, moe_layers=58, hidden=7168, top_k=8, mtp=False)
    assert row["out_bytes"] == 128 * 8 * (7168 + 56 * 4) and row["back_bytes"] == 128 * 8 * 7168 * 2
    # DeepEP measured 155 us out and 273 us back for these rows over 32 ranks.
    assert row["out_bytes"] / OUT_GB_PER_S / 1e3 == pytest.approx(155, rel=0.03)
    assert row["back_bytes"] / BACK_GB_PER_S / 1e3 == pytest.approx(273, rel=0.03)
    assert row["step_us"] == pytest.approx(20_000 + row["network_us"])
    assert row["tokens_per_s"] == pytest.approx(128e6 / row["step_us"])
    assert row["overlapped_step_us"] >= 2 * max(20_000, row["network_us"])
    drafted = network(20_000.0, tokens=128, sequences=64, moe_layers=58, hidden=7168, top_k=8, mtp=True)
    assert drafted["network_us"] == row["network_us"] and drafted["tokens_per_sequence"] == 1.85


@pytest.fixture(scope="module")
def rank() -> Rank:
    return Rank("cpu", tiny=True)


def test_the_rank_is_the_model_as_the_passes_share_it_out(rank: Rank) -> None:
    """Two sparse layers of 3, and MTP's; 16 experts over 8 ranks with one more each: three are here."""
    for runner, layers in ((rank.main, 2), (rank.mtp, 1)):
        reports = {r.name: (r.matched, r.expected) for r in runner.program.reports}
        for name in ("quantize_dispatch", "balance_experts", "fuse_moe_route_quant", "fuse_moe_silu_mul_quant"):
            assert reports[name] == (layers, layers), name
        calls = {c["op"].rpartition(":")[0]: c["calls"] for c in runner.program.collectives}
        assert calls == {"seamwise.ep_dispatch_quant": layers, "seamwise.ep_combine": layers}
    assert any("eh_proj" in name for recipe in rank.mtp.program.recipes.values() for name in parameters_of(recipe))
    held = {w.data_ptr(): w.nbytes for r in (rank.main, rank.mtp) for w in r.executable.weights}
    ledger = rank.ledger()
    # Sparse layers, matrices, experts; of a CPU's panels of 32 rows each has its block's scale.
    assert ledger["experts_bytes"] == 3 * 3 * 3 * (256 * 128 + 256 // 32 * 4)
    assert ledger["embedding_and_head_bytes"] == 2 * 512 * 256 * 2  # MTP's are the model's
    assert ledger["cache_bytes_per_token"] == (4 * (128 + 16) + 256) * 2  # latents, and what MTP reads
    assert ledger["weights_bytes"] == sum(held.values())
    assert ledger["weights_bytes"] == sum(n for k, n in ledger.items() if k.endswith("_bytes") and k not in (
        "weights_bytes", "device_bytes"
    ))  # fmt: skip


def test_the_ranks_rows_come_back_to_their_tokens(rank: Rank) -> None:
    """As many rows come in as choices go out; each choice gets a row back, which another choice's token sent."""
    copies = local_copies(5, rank, np.random.default_rng(3))
    x_TD = torch.arange(5.0)[:, None].expand(5, 256).to(torch.float8_e4m3fn)
    scale_TG = torch.arange(5.0)[:, None].expand(5, 2).contiguous()
    rows, scales, local = copies["ep_dispatch_quant"](x_TD, scale_TG, None, 24, "")
    assert rows.shape == (40, 256) and scales.shape == (40, 2) and local.shape == (40, 4)
    assert (local[:20, 0] >= 0).all() and (local[:20, 0] < 3).all() and int((local >= 0).sum()) == 20
    assert torch.equal(rows[:20, :2].float(), scales[:20])
    assert scales[:20, 0].sort().values.tolist() == sorted(4 * list(map(float, range(5))))
    made = rows.float().repeat_interleave(4, 0)  # an expert that gives what it is given
    back = copies["ep_combine"](made, local, None, 24, "")
    assert torch.equal(back[:, 0], torch.arange(5.0).repeat_interleave(4))


@pytest.mark.parametrize("queries", [1, 2])
def test_a_recorded_rank_follows_its_inputs(rank: Rank, queries: int) -> None:
    """With MTP, its module reads the tokens and the hidden states that the step before it has made."""
    step, recorder = Step(rank, 2, 40, queries), CPURecorder()
    assert (step.tokens, step.moe_layers) == (2 * queries, 1 + queries)
    parts = (step, step.guess)[:queries]
    with torch.inference_mode():
        recordings = [recorder.record(part, full=True) for part in parts]
        first = [[t.clone() for t in recording.replay()] for recording in recordings]
        ids_T = step.parts[0][1][rank.main.program.inputs.index("token_ids")]
        ids_T.copy_((ids_T + 1) % 512)
        replayed = [[t.clone() for t in recording.replay()] for recording in recordings]
        called = [part() for part in parts]
    if queries == 2:
        runner, inputs = step.parts[1]
        assert torch.equal(inputs[runner.program.inputs.index("token_ids")], called[0][0])
        assert torch.equal(step.caches[-1][step._at], called[0][1])
    for before, now, again in zip(first, replayed, called, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(now, again, strict=True))
        assert not torch.equal(before[1], now[1]) and not torch.equal(before[0], now[0])
        assert before[1].float().std().item() == pytest.approx(1.0, rel=0.05)  # normed rows
