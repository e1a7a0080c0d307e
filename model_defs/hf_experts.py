"""The experts of transformers' mixtures, through the contracts: grouped GEMMs instead of a loop over experts.

Source: ExpertsInterface, https://huggingface.co/docs/transformers/experts_interface.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from seamwise.kernels import grouped_linear, moe_align, moe_sum, silu_mul

IMPLEMENTATION = "seamwise"


def register() -> None:
    """Make transformers know the implementation."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, run_experts)


def run_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts function for transformers: hidden states (T, D), chosen experts and their weights (T, K) -> (T, D)."""
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"{type(module).__name__}: norms after experts are not served; wanted experts without")
    up = "gate_up_proj" if module.has_gate else "up_proj"
    order_S, starts_E = moe_align(top_k_index.int(), getattr(module, up).shape[0])
    hidden_SI = _linear(module, up, hidden_states, order_S, starts_E, top_k_index.shape[1])
    if not module.has_gate:
        hidden_SI = module.act_fn(hidden_SI)
    elif _is_swiglu(module):
        hidden_SI = silu_mul(hidden_SI)
    else:
        hidden_SI = module._apply_gate(hidden_SI)
    return moe_sum(_linear(module, "down_proj", hidden_SI, order_S, starts_E, 1), top_k_weights.float())


def _linear(module: Any, name: str, x_RK: Tensor, order_S: Tensor, starts_E: Tensor, top_k: int) -> Tensor:
    weight = getattr(module, name)
    weight_ENK = torch.transpose_copy(weight, 1, 2) if module.is_transposed else weight
    bias_EN = getattr(module, f"{name}_bias") if module.has_bias else None
    return grouped_linear(x_RK, weight_ENK, order_S, starts_E, top_k, bias_EN)


def _is_swiglu(module: Any) -> bool:
    """Return whether gate and up are halves and the gate goes through SiLU, as transformers does it by default."""
    from transformers.integrations.moe import _default_apply_gate

    activation = type(getattr(module, "act_fn", None))
    return type(module)._apply_gate is _default_apply_gate and activation in (nn.SiLU, _silu_class())


def _silu_class() -> type:
    from transformers.activations import ACT2FN

    return type(ACT2FN["silu"])
