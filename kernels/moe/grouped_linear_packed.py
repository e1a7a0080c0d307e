"""Linear layers of many experts over weights packed once, for CPUs: `grouped_linear` as `linear_packed` is a linear.

An expert's panels follow those of the one before, so that pack_linear packs the stacked weights (E·N, K) as one matrix;
N is a multiple of a panel's columns. Each expert with rows is a GEMM over its own panels: rows are gathered by
`moe_align`'s order in the kernel, and results go to their slots. Experts without rows are not read.
Source: kernels/linear/linear.py for the layout; Tan et al. 2024, ScatterMoE, https://arxiv.org/abs/2403.08245.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seamwise.kernels.contract import Cost, contract
from seamwise.kernels.cpu.dtypes import one_dtype
from seamwise.kernels.cpu.linear_cpu import launch_linear
from seamwise.kernels.cpu.tape import empty
from seamwise.kernels.draw import Draw
from seamwise.kernels.linear.linear import PANEL, packed_shape

from .grouped_linear import GROUPS, grouped_cost, grouped_linear
from .grouped_linear import make as make_grouped


def limits_experts(out_features: int, starts_E: Tensor, bias_EN: Tensor | None) -> str | None:
    """Return why experts are not of whole panels, or not as many as biases, or None."""
    experts = starts_E.shape[0] - 1
    if out_features < 1 or out_features % PANEL:
        return f"out_features must be a multiple of {PANEL}, for whole panels of an expert, got {out_features}"
    if bias_EN is not None and bias_EN.shape[0] != experts:
        return f"bias has {bias_EN.shape[0]} rows, starts are of {experts} experts"
    return None


def _limits(x_RK: Tensor, packed: Tensor, out_features: int, starts_E: Tensor) -> str | None:
    experts = starts_E.shape[0] - 1
    wanted = packed_shape(experts * out_features, x_RK.shape[1], packed.dtype)
    if tuple(packed.shape) == wanted:
        return None
    return f"packed is {tuple(packed.shape)}, wanted {wanted} for {experts} experts of {out_features} rows"


@contract(
    args={
        "order_S": GROUPS["order_S"], "starts_E": "G int32", "packed": "[P W L B]", "bias_EN": "[E out_features]",
    },
    limits=(limits_experts, _limits), opaque=True, reads_values=True,
    fake=lambda x_RK, out_features, top_k: x_RK.new_empty((x_RK.shape[0] * top_k, out_features)),
)  # fmt: skip
def grouped_linear_packed(
    x_RK: Tensor, packed: Tensor, out_features: int, order_S: Tensor, starts_E: Tensor, top_k: int,
    bias_EN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return x[s // top_k] @ weight[e]ᵀ + bias[e] for each slot s of each expert e: (S, N) in x's dtype.

    packed  of `pack_linear`, of the experts' weights (E, N, K) as (E·N, K); the rest is `grouped_linear`'s
    Moves R·K + S·N elements and the weights of the experts with slots; takes 2·S·N·K flops. A row has the same bits
    whatever the other rows are.
    """
    weight_NK = packed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)[:, : x_RK.shape[1]]
    weight_ENK = weight_NK.unflatten(0, (-1, out_features))
    return grouped_linear.meaning(x_RK, weight_ENK, order_S, starts_E, top_k, bias_EN)


@grouped_linear_packed.costs
def cost(
    x_RK: Tensor, packed: Tensor, out_features: int, order_S: Tensor, starts_E: Tensor, bias_EN: Tensor | None
) -> Cost:
    weight_ENK = packed.flatten().unflatten(0, (starts_E.shape[0] - 1, out_features, -1))
    return grouped_cost((x_RK,), (weight_ENK, bias_EN), order_S, starts_E, x_RK.dtype)


@grouped_linear_packed.inputs(
    examples=(
        {"R": 1, "top_k": 2, "E": 16, "P": 1, "K": 40}, {"R": 5, "top_k": 2, "E": 3, "P": 2, "K": 71, "bias": True},
        {"R": 0, "top_k": 2, "E": 4, "P": 1, "K": 16}, {"R": 37, "top_k": 1, "E": 2, "P": 3, "K": 33},
    ),
    shapes={
        "1b active decode up": {"R": 1, "top_k": 8, "E": 64, "P": 64, "K": 2048},
        "1b active decode down": {"R": 8, "top_k": 1, "E": 64, "P": 64, "K": 1024},
        "1b active prefill up": {"R": 256, "top_k": 8, "E": 64, "P": 64, "K": 2048},
    },
    sizes={"R": (0, 20), "top_k": [1, 2, 5], "E": [1, 3, 32], "P": (1, 3), "K": (1, 150), "bias": [False, True]},
)  # fmt: skip
def make(draw: Draw, R: int, top_k: int, E: int, P: int, K: int, bias: bool = False) -> tuple[Any, ...]:
    """Draw experts of P panels."""
    from seamwise.kernels import pack_linear

    x_RK, weight_ENK, *rest = make_grouped(draw, R, top_k, E, P * PANEL, K, bias)
    return x_RK, pack_linear(weight_ENK.flatten(0, 1)), P * PANEL, *rest


@grouped_linear_packed.provider(
    "cpp", devices=("cpu",), refuses=lambda x_RK, packed, bias_EN: one_dtype(x_RK, packed, bias_EN), launches=True
)
def grouped_linear_packed_cpp(
    x_RK: Tensor, packed: Tensor, out_features: int, order_S: Tensor, starts_E: Tensor, top_k: int,
    bias_EN: Tensor | None = None,
) -> Tensor:  # fmt: skip
    out_SN = empty((order_S.shape[0], out_features), x_RK.dtype)
    return launch_linear(x_RK, packed, out_SN, bias_EN, order=order_S, starts=starts_E, top_k=top_k)
