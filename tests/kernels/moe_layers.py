"""Tiny random MoE layers of transformers, and the same layers composed of contracts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seamwise.kernels import grouped_linear, moe_align, moe_route, moe_sum, silu_mul, swiglu_clamped

D, I = 40, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer: transformers' block, and its weights as the contracts take them."""

    block: nn.Module
    router: nn.Module
    route: tuple[Any, ...]  # moe_route's arguments after the logits
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    activation: Any = silu_mul
    shared: Callable[[Tensor], Tensor] | None = None

    def theirs(self, x_TD: Tensor) -> Tensor:
        result = self.block(x_TD[None])
        return (result[0] if isinstance(result, tuple) else result)[0]

    def logits(self, x_TD: Tensor) -> Tensor:
        return F.linear(x_TD, self.router.weight, getattr(self.router, "bias", None))

    def ours(
        self, x_TD: Tensor, call: Callable[..., Any] = lambda op, *args: op(*args), experts: Tensor | None = None,
        rank: int = 0, ranks: int = 1,
    ) -> Tensor:  # fmt: skip
        """`experts` overrides those chosen; of `ranks` ranks, this one has every ranks-th expert, from `rank` on."""
        weights, chosen = call(moe_route, self.logits(x_TD), *self.route)
        every = torch.arange(self.gate_up.shape[0], dtype=torch.int32, device=x_TD.device)
        expert_map = torch.where(every % ranks == rank, every // ranks, -1) if ranks > 1 else None
        own = [
            None if w is None else w[rank::ranks].contiguous()
            for w in (self.gate_up, self.gate_up_bias, self.down, self.down_bias)
        ]  # fmt: skip
        groups = call(moe_align, chosen if experts is None else experts, own[0].shape[0], expert_map)
        gate_up = call(grouped_linear, x_TD, own[0], *groups, self.route[0], own[1])
        y_SD = call(grouped_linear, call(self.activation, gate_up), own[2], *groups, 1, own[3])
        return call(moe_sum, y_SD, weights, None if self.shared is None or rank else self.shared(x_TD))


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        nn.init.normal_(tensor, std=0.3)
    return module.eval().requires_grad_(False)


def mixtral() -> Layer:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=D, intermediate_size=I, num_local_experts=6, num_experts_per_tok=2)
    block = randomized(MixtralSparseMoeBlock(config))
    return Layer(
        block=block, router=block.gate, route=(2, "softmax"), gate_up=block.experts.gate_up_proj,
        down=block.experts.down_proj,
    )  # fmt: skip


def qwen3(normalize: bool = True) -> Layer:
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=I, num_experts=32, num_experts_per_tok=4, norm_topk_prob=normalize
    )
    block = randomized(Qwen3MoeSparseMoeBlock(config))
    return Layer(
        block=block, router=block.gate, route=(4, "softmax", normalize), gate_up=block.experts.gate_up_proj,
        down=block.experts.down_proj,
    )  # fmt: skip


def deepseek_v2() -> Layer:
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe

    config = DeepseekV2Config(
        hidden_size=D, moe_intermediate_size=I, n_routed_experts=20, num_experts_per_tok=3, n_shared_experts=2,
        n_group=4, topk_group=2, topk_method="group_limited_greedy", routed_scaling_factor=16.0, num_attention_heads=4,
    )  # fmt: skip
    block = randomized(DeepseekV2Moe(config))
    return Layer(
        block=block, router=block.gate, route=(3, "softmax", False, 16.0, None, 4, 2),
        gate_up=block.experts.gate_up_proj, down=block.experts.down_proj, shared=block.shared_experts,
    )  # fmt: skip


def deepseek_v3() -> Layer:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=I, n_routed_experts=16, num_experts_per_tok=3, n_shared_experts=1,
        n_group=4, topk_group=2, norm_topk_prob=True, routed_scaling_factor=2.5,
    )  # fmt: skip
    block = randomized(DeepseekV3MoE(config))
    bias = block.gate.e_score_correction_bias
    return Layer(
        block=block, router=block.gate, route=(3, "sigmoid", True, 2.5, bias, 4, 2),
        gate_up=block.experts.gate_up_proj, down=block.experts.down_proj, shared=block.shared_experts,
    )  # fmt: skip


def gpt_oss() -> Layer:
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    config = GptOssConfig(hidden_size=D, intermediate_size=I, num_local_experts=8, num_experts_per_tok=4)
    block = randomized(GptOssMLP(config))

    def halves(columns: Tensor) -> Tensor:
        return torch.cat((columns[..., ::2], columns[..., 1::2]), -1)

    experts = block.experts
    return Layer(
        block=block, router=block.router, route=(4, "softmax"), activation=swiglu_clamped,
        gate_up=halves(experts.gate_up_proj).transpose(1, 2).contiguous(),
        gate_up_bias=halves(experts.gate_up_proj_bias),
        down=experts.down_proj.transpose(1, 2).contiguous(), down_bias=experts.down_proj_bias,
    )  # fmt: skip


LAYERS = (mixtral, qwen3, deepseek_v2, deepseek_v3, gpt_oss)


def rows(T: int, seed: int = 0) -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(seed))
