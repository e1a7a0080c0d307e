"""The DeepSeek rank of `seamwise bench gpu`: its network model, attention, experts and recorded step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seamwise import kernels
from seamwise.bench.gpu.deepseek import BACK_GB_PER_S, OUT_GB_PER_S, network
from seamwise.bench.gpu.deepseek_rank import TINY_RANK, Rank, Step
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


def wide(weight: tuple[Tensor, Tensor]) -> Tensor:
    """Return a block-scaled weight (N, K) in float64."""
    rows, columns = weight[0].shape
    return (
        weight[0].double() * weight[1].double().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    )


@pytest.mark.parametrize("queries", [1, 2])
def test_the_rank_attends_as_the_paper_says(queries: int) -> None:
    """Keys and values expanded from the latents, in float64, against the absorbed, quantized form."""
    s, step = TINY_RANK, Step(Rank(TINY_RANK, "cpu"), 2, 40, queries)
    w, cache = step.rank.layers[0], step.caches[0]
    x_TD = torch.randn(step.tokens, s.hidden, generator=torch.Generator().manual_seed(3)).bfloat16()
    angle_TF = step.positions_T.double()[:, None] * step.rank.speeds_F.double()
    table = [f(torch.cat((angle_TF, angle_TF), -1)).bfloat16() for f in (torch.cos, torch.sin)]
    got_TD = step.attend(w, cache, kernels.quantize(x_TD, torch.float8_e4m3fn, 128), (table[0], table[1]))

    def norm(x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()

    turn = torch.polar(torch.ones_like(angle_TF), angle_TF)

    def rotate(x_THR: Tensor) -> Tensor:
        pairs = torch.view_as_complex(x_THR.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turn[:, None]).flatten(-2)

    joint = x_TD.double() @ wide(w["down_qkv"]).T
    q, latent, key = joint.split((s.q_latent, s.latent, s.rope), -1)
    q_THN = (norm(q) @ wide(w["up_q"]).T).unflatten(-1, (s.heads, -1))
    q_rope, own = rotate(q_THN[..., s.nope :]), torch.cat((norm(latent), rotate(key[:, None])[:, 0]), -1)
    out = []
    for t in range(step.tokens):
        r, seen = t // queries, 40 + t % queries + 1
        kept = cache[step.table_RB[r].long()].flatten(0, 1)[:seen].double()
        kept[40:] = own[r * queries : t + 1]
        keys = torch.einsum("lc,hnc->hln", kept[:, : s.latent], w["uk_HNC"].double())
        score = torch.einsum("hn,hln->hl", q_THN[t, :, : s.nope], keys) + q_rope[t] @ kept[:, s.latent :].T
        values = torch.einsum("lc,hcv->hlv", kept[:, : s.latent], w["uv_HCV"].double())
        weights = (score * (s.nope + s.rope) ** -0.5).softmax(-1)
        out.append(torch.einsum("hl,hlv->hv", weights, values).flatten())
    exact_TD = torch.stack(out) @ wide(w["out"]).T
    assert (got_TD - exact_TD).norm() < 0.08 * exact_TD.norm()  # float8 keeps 4 bits: 3 to 6 % for products of these


def test_the_ranks_rows_come_back_to_their_tokens() -> None:
    s, step = TINY_RANK, Step(Rank(TINY_RANK, "cpu"), 5, 40, 1)
    w = step.rank.layers[-1]
    x_TD = torch.randn(step.tokens, s.hidden, generator=torch.Generator().manual_seed(3)).bfloat16()
    weights_TK, _ = kernels.moe_route(x_TD @ w["router"].T, s.top_k, "sigmoid", True, 2.5, w["bias_E"], 4, 2)

    def gated(x_D: Tensor, up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]) -> Tensor:
        gate, linear = (wide(up) @ x_D).chunk(2)
        return wide(down) @ (torch.nn.functional.silu(gate) * linear)

    exact = []
    for t, x_D in enumerate(x_TD.double()):
        total = gated(x_D, w["up"], w["down"])
        for k in range(s.top_k):
            row = int((step.incoming_R == t * s.top_k + k).nonzero())
            e = int(step.experts_R1[row])
            up, down = ((weight[e], scale[e]) for weight, scale in (w["experts_up"], w["experts_down"]))
            total = total + weights_TK[t, k].double() * gated(x_D, up, down)
        exact.append(total)
    exact_TD = torch.stack(exact)
    assert (step.experts(w, x_TD) - exact_TD).norm() < 0.08 * exact_TD.norm()


@pytest.mark.parametrize("queries", [1, 2])
def test_a_recorded_rank_follows_its_inputs(queries: int) -> None:
    step = Step(Rank(TINY_RANK, "cpu"), 2, 40, queries)
    with torch.inference_mode():
        recording = CPURecorder().record(step, full=True)
        first = [t.clone() for t in recording.replay()]
        step.ids_T.copy_((step.ids_T + 1) % TINY_RANK.vocab)
        replayed, called = [t.clone() for t in recording.replay()], step()
    assert all(torch.equal(a, b) for a, b in zip(replayed, called, strict=True))
    assert not torch.equal(first[1], replayed[1]) and step.tokens == 2 * queries
    assert first[1].float().std().item() == pytest.approx(1.0, rel=0.05)  # normed rows
