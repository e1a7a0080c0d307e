"""Mixture of experts: each token goes through the few experts that a router chooses for it.

T tokens, D model width, E experts, K of them chosen for a token, I an expert's width, S = T·K slots.
Source: Shazeer et al. 2017, https://arxiv.org/abs/1701.06538; shared experts: Dai et al. 2024,
https://arxiv.org/abs/2401.06066.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seamwise.kernels import grouped_linear, moe_align, moe_route, moe_sum, silu_mul


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How experts are chosen: `moe_route` says what each of these means; wide: logits are computed in float32."""

    E: int
    K: int
    score: str = "softmax"
    normalize: bool = True
    scaling: float = 1.0
    num_groups: int = 0
    top_groups: int = 0
    corrected: bool = False
    wide: bool = False


class Router(nn.Module):
    """Returns the weights and the numbers of each token's experts, both (T, K)."""

    e_score_correction_bias: Tensor

    def __init__(self, D: int, r: Routing, *, bias: bool = False) -> None:
        super().__init__()
        self.r = r
        self.weight = nn.Parameter(torch.empty(r.E, D))
        self.bias = nn.Parameter(torch.empty(r.E)) if bias else None
        if r.corrected:  # a buffer: it stays in float32 whatever the model's dtype
            self.register_buffer("e_score_correction_bias", torch.empty(r.E))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        x_TD, weight_ED = (x_TD.float(), self.weight.float()) if self.r.wide else (x_TD, self.weight)
        correction_E = self.e_score_correction_bias if self.r.corrected else None
        weights_TK, experts_TK = moe_route(
            F.linear(x_TD, weight_ED, self.bias), self.r.K, self.r.score, self.r.normalize, self.r.scaling,
            correction_E, self.r.num_groups, self.r.top_groups,
        )  # fmt: skip
        return weights_TK, experts_TK


class Experts(nn.Module):
    """Gated MLPs, their weights stacked: a checkpoint may hold them one by one as well."""

    def __init__(self, E: int, D: int, I: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, I))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, shared_TD: Tensor | None) -> Tensor:
        order_S, starts_E = moe_align(experts_TK, self.gate_up_proj.shape[0])
        gate_up_S2I = grouped_linear(x_TD, self.gate_up_proj, order_S, starts_E, weights_TK.shape[1])
        y_SD = grouped_linear(silu_mul(gate_up_S2I), self.down_proj, order_S, starts_E, 1)
        return moe_sum(y_SD, weights_TK, shared_TD)


class MoE(nn.Module):
    """The chosen experts' weighted sum, and where there are shared experts, what they give every token."""

    def __init__(self, D: int, I: int, r: Routing, shared: nn.Module | None = None) -> None:
        super().__init__()
        self.gate = Router(D, r)
        self.experts = Experts(r.E, D, I)
        self.shared_experts = shared

    def forward(self, x_TD: Tensor) -> Tensor:
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_TD)
        return self.experts(x_TD, *self.gate(x_TD), shared_TD)
