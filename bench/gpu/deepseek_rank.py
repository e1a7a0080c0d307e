"""One rank's decode step of DeepSeek-R1, of contracts alone: no model definition, pass or process group.

Shapes: T tokens, D hidden, H heads, C latent, E experts of this rank, R = T · top_k rows that come in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seamwise import kernels
from seamwise.kernels.contract import Contract
from seamwise.kernels.cpu import tape

FLOAT8, GROUP, PAGE, EPS = torch.float8_e4m3fn, 128, 64, 1e-6
Scaled = tuple[Tensor, Tensor]  # a float8 weight and its scales of 128 × 128 blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShape:
    """The model's sizes, and `local_experts`: this rank's share of the experts with its redundant ones."""

    layers: int
    dense_layers: int
    hidden: int
    heads: int
    q_latent: int
    latent: int
    nope: int
    rope: int
    value: int
    dense_width: int
    expert_width: int
    experts: int
    local_experts: int
    top_k: int
    groups: int
    top_groups: int
    vocab: int


# 256 experts over 32 ranks are 8 each.
DEEPSEEK_R1 = RankShape(
    layers=61, dense_layers=3, hidden=7168, heads=128, q_latent=1536, latent=512, nope=128, rope=64, value=128,
    dense_width=18432, expert_width=2048, experts=256, local_experts=9, top_k=8, groups=8, top_groups=4, vocab=129280,
)  # fmt: skip
TINY_RANK = RankShape(
    layers=3, dense_layers=1, hidden=256, heads=4, q_latent=128, latent=32, nope=16, rope=16, value=32,
    dense_width=256, expert_width=128, experts=16, local_experts=3, top_k=4, groups=4, top_groups=2, vocab=64,
)  # fmt: skip


def call(record: Contract, *args: Any) -> Any:
    """Call a contract's provider for these arguments; on a CPU's tape, what is no C++ kernel is recorded as a whole."""
    provider = record.choose(args)
    if provider.launches and not provider.composed:
        return provider.call(*args)
    return tape.call(provider.call, *args, seam=record.name if record.seam else "")


class Rank:
    """The weights of one rank: every layer's own, drawn on the device in the type that they are read in."""

    def __init__(self, shape: RankShape, device: str) -> None:
        self.shape, self.device = shape, device
        self._generator = torch.Generator(device).manual_seed(0)
        s = shape
        self.embedding_VD, self.head_VD = self.wide(s.vocab, s.hidden), self.wide(s.vocab, s.hidden)
        self.final_D = self.ones(s.hidden)
        self.layers = [self.layer(i < s.dense_layers) for i in range(s.layers)]
        self.mtp = self.layer(False) | {
            "norms": self.ones(2, s.hidden), "join": self.scaled(s.hidden, 2 * s.hidden)
        }  # fmt: skip
        self.speeds_F = (10000.0 ** -(torch.arange(0, s.rope, 2, device=device) / s.rope)).float()

    def ones(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.bfloat16, device=self.device)

    def wide(self, *shape: int) -> Tensor:
        """Draw a bfloat16 weight that keeps the size of what it multiplies."""
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        return drawn.normal_(0, shape[-1] ** -0.5, generator=self._generator)

    def scaled(self, *shape: int) -> Scaled:
        """Draw a float8 weight (…, N, K), normal of deviation 1, and block scales K^-½."""
        weight = torch.empty(shape, dtype=torch.bfloat16, device=self.device)
        blocks = (*shape[:-2], -(-shape[-2] // GROUP), -(-shape[-1] // GROUP))
        scale = torch.full(blocks, shape[-1] ** -0.5, dtype=torch.float32, device=self.device)
        return weight.normal_(generator=self._generator).to(FLOAT8), scale

    def layer(self, dense: bool) -> dict[str, Any]:
        """Draw one layer: W_UK and W_UV are absorbed, bfloat16; a MoE layer's MLP is the shared expert."""
        s = self.shape
        width = s.dense_width if dense else s.expert_width
        weights: dict[str, Any] = {
            "norm": self.ones(s.hidden), "down_qkv": self.scaled(s.q_latent + s.latent + s.rope, s.hidden),
            "q_norm": self.ones(s.q_latent), "kv_norm": self.ones(s.latent),
            "up_q": self.scaled(s.heads * (s.nope + s.rope), s.q_latent),
            "uk_HNC": self.wide(s.heads, s.nope, s.latent), "uv_HCV": self.wide(s.heads, s.latent, s.value),
            "out": self.scaled(s.hidden, s.heads * s.value), "mlp_norm": self.ones(s.hidden),
            "up": self.scaled(2 * width, s.hidden), "down": self.scaled(s.hidden, width),
        }  # fmt: skip
        if not dense:
            weights |= {
                "router": self.wide(s.experts, s.hidden), "bias_E": torch.zeros(s.experts, device=self.device),
                "experts_up": self.scaled(s.local_experts, 2 * s.expert_width, s.hidden),
                "experts_down": self.scaled(s.local_experts, s.hidden, s.expert_width),
            }  # fmt: skip
        return weights

    def ledger(self) -> dict[str, Any]:
        """Return the bytes of weights by kind, and of a cached token over all layers, MTP's included."""
        attention = ("down_qkv", "up_q", "uk_HNC", "uv_HCV", "out")
        kinds = {
            **dict.fromkeys(attention, "attention"), **dict.fromkeys(("experts_up", "experts_down"), "experts"),
            **dict.fromkeys(("up", "down", "join"), "mlp_and_shared_expert"),
        }  # fmt: skip
        held: dict[str, int] = {"embedding_and_head": self.embedding_VD.nbytes + self.head_VD.nbytes}
        for weights in (*self.layers, self.mtp):
            for name, weight in weights.items():
                kind = kinds.get(name, "router_and_norms")
                tensors = weight if isinstance(weight, tuple) else (weight,)
                held[kind] = held.get(kind, 0) + sum(t.nbytes for t in tensors)
        row = (self.shape.latent + self.shape.rope) * 2 * (self.shape.layers + 1)
        return {f"{k}_bytes": n for k, n in held.items()} | {
            "weights_bytes": sum(held.values()), "cache_bytes_per_token": row,
            "device_bytes": torch.cuda.get_device_properties(0).total_memory if self.device == "cuda" else 0,
        }  # fmt: skip


class Step:
    """A decode step over `sequences` of `length` cached tokens and `queries` new ones; calling it runs the step.

    With two queries (MTP) the step checks a drafted token beside the last one, and drafts the next with the MTP layer.
    """

    def __init__(self, rank: Rank, sequences: int, length: int, queries: int) -> None:
        self.rank, self.shape, device = rank, rank.shape, rank.device
        generator = torch.Generator(device).manual_seed(1)
        self.tokens, self.mtp = sequences * queries, queries > 1
        self.moe_layers = self.shape.layers - self.shape.dense_layers + self.mtp
        pages = -(-(length + queries) // PAGE)
        cache = (sequences * pages + 1, PAGE, self.shape.latent + self.shape.rope)
        empty = (torch.empty(cache, dtype=torch.bfloat16, device=device) for _ in range(self.shape.layers + self.mtp))
        self.caches = [one.normal_(generator=generator) for one in empty]
        table = 1 + torch.randperm(sequences * pages, generator=generator, device=device).view(sequences, pages)
        at_RQ = torch.arange(length, length + queries, device=device).expand(sequences, queries)
        self.positions_T = at_RQ.flatten().contiguous()
        self.slots_T = (table.gather(1, at_RQ // PAGE) * PAGE + at_RQ % PAGE).flatten()
        self.table_RB = table.int()
        self.lengths_R = torch.full((sequences,), length + queries, dtype=torch.int32, device=device)
        self.starts_S = torch.arange(0, self.tokens + 1, queries, dtype=torch.int32, device=device)
        self.ids_T = torch.randint(self.shape.vocab, (self.tokens,), generator=generator, device=device)
        rows = self.tokens * self.shape.top_k
        # The rows that come in: as many as go out, of random tokens, for random experts of this rank.
        self.incoming_R = torch.randperm(rows, generator=generator, device=device)
        self.outgoing_R = self.incoming_R.argsort()
        chosen = torch.randint(self.shape.local_experts, (rows, 1), generator=generator, device=device)
        self.experts_R1 = chosen.int()

    @property
    def cache_bytes(self) -> int:
        return sum(c.nbytes for c in self.caches)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Run the step; return the next tokens (T,), drafted ones with MTP, and the hidden states (T, D)."""
        rank = self.rank
        angles = call(kernels.rope_table, self.positions_T, rank.speeds_F, 1.0, torch.bfloat16)
        x_TD = call(kernels.gather_rows, rank.embedding_VD, self.ids_T)
        residual_TD = torch.zeros_like(x_TD)
        for weights, cache in zip(rank.layers, self.caches[: len(rank.layers)], strict=True):
            x_TD, residual_TD = self.layer(weights, cache, x_TD, residual_TD, angles)
        hidden_TD, _ = call(kernels.add_rms_norm, x_TD, residual_TD, rank.final_D, EPS)
        next_T = F.linear(hidden_TD, rank.head_VD).argmax(-1)
        if not self.mtp:
            return next_T, hidden_TD
        drawn_TD = call(kernels.gather_rows, rank.embedding_VD, next_T)
        both = zip((drawn_TD, hidden_TD), rank.mtp["norms"], strict=True)
        joined = torch.cat([call(kernels.rms_norm, x, w, EPS) for x, w in both], -1)
        x_TD = self.linear(joined, rank.mtp["join"])
        x_TD, residual_TD = self.layer(rank.mtp, self.caches[-1], x_TD, torch.zeros_like(x_TD), angles)
        draft_TD, _ = call(kernels.add_rms_norm, x_TD, residual_TD, rank.final_D, EPS)
        return F.linear(draft_TD, rank.head_VD).argmax(-1), hidden_TD

    def linear(self, x_TK: Tensor, weight: Scaled) -> Tensor:
        return self.product(call(kernels.quantize, x_TK, FLOAT8, GROUP, None), weight)

    def product(self, quantized: Scaled, weight: Scaled) -> Tensor:
        return call(kernels.scaled_linear, *quantized, *weight, torch.bfloat16)

    def norm_quant(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor) -> tuple[Scaled, Tensor]:
        """Return the normed sum of both, quantized, and the sum."""
        *quantized, residual_TD = call(
            kernels.add_rms_norm_quant, x_TD, residual_TD, weight_D, EPS, FLOAT8, GROUP, None
        )  # fmt: skip
        return (quantized[0], quantized[1]), residual_TD

    def layer(
        self, w: dict[str, Any], cache: Tensor, x_TD: Tensor, residual_TD: Tensor, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the layer's output before it is added, and the residual sum up to it."""
        quantized, residual_TD = self.norm_quant(x_TD, residual_TD, w["norm"])
        x_TD = self.attend(w, cache, quantized, angles)
        if "router" not in w:
            quantized, residual_TD = self.norm_quant(x_TD, residual_TD, w["mlp_norm"])
            return self.mlp(w, quantized), residual_TD
        normed_TD, residual_TD = call(kernels.add_rms_norm, x_TD, residual_TD, w["mlp_norm"], EPS)
        return self.experts(w, normed_TD), residual_TD

    def attend(self, w: dict[str, Any], cache: Tensor, quantized: Scaled, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Multi-head latent attention, absorbed: (T, D) from the normed, quantized rows."""
        s = self.shape
        joint_TN = self.product(quantized, w["down_qkv"])
        q_TA, latent_TC = call(kernels.dual_rms_norm, joint_TN, w["q_norm"], w["kv_norm"], EPS)
        q_THE = self.linear(q_TA, w["up_q"]).unflatten(-1, (s.heads, s.nope + s.rope))
        key_T1R = joint_TN[:, s.q_latent + s.latent :].unsqueeze(1).contiguous()
        turned_THR = call(kernels.rope, q_THE[..., s.nope :].contiguous(), *angles, True)
        turned_T1R = call(kernels.rope, key_T1R, *angles, True)
        absorbed_HTC = torch.bmm(q_THE[..., : s.nope].transpose(0, 1), w["uk_HNC"])
        call(kernels.mla_append, latent_TC, turned_T1R.squeeze(1), cache, self.slots_T, None)
        out_THC = call(
            kernels.mla_decode, torch.cat((absorbed_HTC.transpose(0, 1), turned_THR), -1), cache, self.table_RB,
            self.lengths_R, self.starts_S, (s.nope + s.rope) ** -0.5, s.latent, None,
        )  # fmt: skip
        out_HTV = torch.bmm(out_THC.transpose(0, 1), w["uv_HCV"])
        return self.linear(out_HTV.transpose(0, 1).flatten(1), w["out"])

    def mlp(self, w: dict[str, Any], quantized: Scaled) -> Tensor:
        """A gated MLP, or the shared expert: (T, D)."""
        up_TI2 = self.product(quantized, w["up"])
        return self.product(call(kernels.silu_mul_quant, up_TI2, FLOAT8, GROUP, None, None), w["down"])

    def experts(self, w: dict[str, Any], normed_TD: Tensor) -> Tensor:
        """Route, send, compute what came in, send back, add up with the shared expert: (T, D)."""
        s = self.shape
        weights_TK, _, *quantized = call(
            kernels.moe_route_quant, normed_TD, F.linear(normed_TD, w["router"]), FLOAT8, GROUP, s.top_k, "sigmoid",
            True, 2.5, w["bias_E"], s.groups, s.top_groups, None,
        )  # fmt: skip
        own = (quantized[0], quantized[1])
        sender_R = self.incoming_R // s.top_k
        rows_RD = own[0].view(torch.uint8).index_select(0, sender_R).view(FLOAT8)  # dispatch: R rows and their scales
        scale_RG = own[1].index_select(0, sender_R)
        order_R, starts_E = call(kernels.moe_align, self.experts_R1, s.local_experts, None)
        up_RI2 = self.grouped((rows_RD, scale_RG), w["experts_up"], order_R, starts_E)
        activated = call(kernels.silu_mul_quant, up_RI2, FLOAT8, GROUP, None, None)
        out_RD = self.grouped(activated, w["experts_down"], order_R, starts_E)
        back_RD = out_RD.index_select(0, self.outgoing_R)  # combine: R rows of bfloat16
        return call(kernels.moe_sum, back_RD, weights_TK, self.mlp(w, own))

    def grouped(self, quantized: Scaled, weight: Scaled, order_R: Tensor, starts_E: Tensor) -> Tensor:
        return call(kernels.grouped_scaled_linear, *quantized, *weight, order_R, starts_E, 1, torch.bfloat16, None)
