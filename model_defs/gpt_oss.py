"""gpt-oss: attention with sinks, every other layer with a sliding window; experts with biases and a clamped SwiGLU.

Experts are stored transposed, gate and up columns alternating; in MXFP4 where the configuration says so.
Source: OpenAI 2025, https://arxiv.org/abs/2508.10925.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seamwise.kernels import grouped_linear, grouped_mxfp4_linear, moe_align, moe_sum, swiglu_clamped

from .blocks import Attention, Block, CausalLM, Sizes, pre_norm_lm
from .hf_config import Reader
from .moe import Router, Routing
from .rope import Rope


class Experts(nn.Module):
    """alpha, limit: of the activation."""

    def __init__(self, E: int, D: int, I: int, alpha: float, limit: float) -> None:
        super().__init__()
        self.alpha, self.limit = alpha, limit
        self.gate_up_proj_bias = nn.Parameter(torch.empty(E, 2 * I))
        self.down_proj_bias = nn.Parameter(torch.empty(E, D))
        self.add_weight("gate_up_proj", E, 2 * I, D)
        self.add_weight("down_proj", E, D, I)

    def add_weight(self, name: str, E: int, rows: int, columns: int) -> None:
        setattr(self, name, nn.Parameter(torch.empty(E, columns, rows)))

    def linear(self, name: str, x_RK: Tensor, order_S: Tensor, starts_E: Tensor, top_k: int) -> Tensor:
        weight_ENK = torch.transpose_copy(getattr(self, name), 1, 2)
        return grouped_linear(x_RK, weight_ENK, order_S, starts_E, top_k, getattr(self, f"{name}_bias"))

    def forward(self, x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor) -> Tensor:
        order_S, starts_E = moe_align(experts_TK, self.down_proj_bias.shape[0])
        gate_up_S2I = self.linear("gate_up_proj", x_TD, order_S, starts_E, weights_TK.shape[1])
        h_SI = swiglu_clamped(gate_up_S2I, self.alpha, self.limit, True)
        return moe_sum(self.linear("down_proj", h_SI, order_S, starts_E, 1), weights_TK)


class MXFP4Experts(Experts):
    """Weights in blocks of 32 columns: two floats of 4 bits a byte, and an exponent a block."""

    def add_weight(self, name: str, E: int, rows: int, columns: int) -> None:
        self.register_buffer(f"{name}_blocks", torch.empty(E, rows, columns // 32, 16, dtype=torch.uint8))
        self.register_buffer(f"{name}_scales", torch.empty(E, rows, columns // 32, dtype=torch.uint8))

    def linear(self, name: str, x_RK: Tensor, order_S: Tensor, starts_E: Tensor, top_k: int) -> Tensor:
        blocks_ENGB, scale_ENG = getattr(self, f"{name}_blocks"), getattr(self, f"{name}_scales")
        bias_EN = getattr(self, f"{name}_bias")
        return grouped_mxfp4_linear(x_RK, blocks_ENGB.flatten(2), scale_ENG, order_S, starts_E, top_k, bias_EN)


class MLP(nn.Module):
    def __init__(self, D: int, routing: Routing, experts: nn.Module) -> None:
        super().__init__()
        self.router = Router(D, routing, bias=True)
        self.experts = experts

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.experts(x_TD, *self.router(x_TD))


def gpt_oss(raw: Mapping[str, Any]) -> CausalLM:
    """Build the model. Raises ValueError for what these equations do not cover."""
    read = Reader(raw, "gpt_oss")
    read.choice("hidden_act", ("silu",), "silu")
    c, bias = Sizes.from_hf(read), read.flag("attention_bias", True)
    routing = Routing(E=read.size("num_experts"), K=read.size("num_experts_per_tok"))
    activation = (read.positive("swiglu_alpha", 1.702), read.positive("swiglu_limit", 7.0))
    kind = Experts
    if read.raw.get("quantization_config") is not None:
        Reader(read.part("quantization_config"), "gpt_oss: quantization_config").choice("quant_method", ("mxfp4",))
        if c.D % 32 or c.I % 32:
            raise ValueError(f"gpt_oss: MXFP4 has blocks of 32, hidden_size is {c.D}, intermediate_size {c.I}")
        kind = MXFP4Experts
    layers = [
        Block(
            c, Attention(c, bias=bias, out_bias=bias, window=window, sinks=True),
            MLP(c.D, routing, kind(routing.E, c.D, c.I, *activation)),
        )
        for window in read.windows(c.num_layers, lambda i: i % 2 == 0, 128)
    ]  # fmt: skip
    return pre_norm_lm(c, layers, [Rope.from_hf(read, c.E)] * c.num_layers)
