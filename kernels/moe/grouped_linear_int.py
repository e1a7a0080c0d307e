"""Linear layers of many experts over int4, int8 or float8 weights packed once for CPUs: `linear_int` for each expert.

An expert's panels, scales and offsets follow those of the one before, so that `pack_int_panels` and
`pack_group_values` pack the stacked weights (E·N, K) as one matrix; N is a multiple of a panel's columns. Experts
without rows are not read, and none is dequantized but in registers.
Source: kernels/linear/linear_int.py for the layout; Tan et al. 2024, ScatterMoE, https://arxiv.org/abs/2403.08245.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Cost, contract
from seamwise.kernels.cpu.linear_cpu import launch_linear
from seamwise.kernels.cpu.tape import empty
from seamwise.kernels.draw import Draw
from seamwise.kernels.linear.linear import PANEL
from seamwise.kernels.linear.linear_int import FORMATS, PANELS, limits_panels, linear_int, refuses_int

from .grouped_linear import GROUPS, each_expert, grouped_cost
from .grouped_linear_packed import limits_experts
from .moe_align import make_groups


def _limits(panels: Tensor, out_features: int, starts_E: Tensor) -> str | None:
    experts = starts_E.shape[0] - 1
    if panels.shape[0] != (wanted := experts * out_features // PANEL):
        return f"there are {panels.shape[0]} panels, wanted {wanted} for {experts} experts of {out_features} rows"
    return limits_panels(panels)


_VALUES = "[P blocks(K,group) 32] float32"


@contract(
    args={
        "panels": f"[P cdiv(K,2) 32|64] {PANELS}", "scale_PGC": "[P blocks(K,group) 32|1] float32",
        "offset_PGC": _VALUES, "order_S": GROUPS["order_S"], "starts_E": "L int32", "bias_EN": "[E out_features]",
        "x_scale_RG": "[R blocks(K,group)] float32",
    },
    limits=(limits_experts, _limits), opaque=True, reads_values=True,
    fake=lambda x_RK, out_features, top_k, dtype: x_RK.new_empty(
        (x_RK.shape[0] * top_k, out_features), dtype=dtype or x_RK.dtype
    ),
)  # fmt: skip
def grouped_linear_int(
    x_RK: Tensor, panels: Tensor, scale_PGC: Tensor, offset_PGC: Tensor | None, group: int, out_features: int,
    order_S: Tensor, starts_E: Tensor, top_k: int, bias_EN: Tensor | None = None, x_scale_RG: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """Return `grouped_linear` of x and weights value · scale + offset: (S, N) in `dtype`; sums in float32 or wider.

    panels  of `pack_int_panels`; scale and offset float32 of `pack_group_values`, of the experts' weights (E, N, K) as
            (E·N, K); group 0: one a row; x_scale and dtype are `linear_int`'s, and the rest `grouped_linear`'s
    Moves R·K + S·N elements and, of the experts with slots, N·K/2 bytes of int4 or N·K of others, and the scales; takes
    2·S·N·K flops. A row has the same bits whatever the other rows are.
    """
    count = out_features // PANEL

    def own(packed: Tensor | None, e: int) -> Any:
        return None if packed is None else packed[e * count : (e + 1) * count]

    return each_expert(
        order_S, starts_E, top_k, x_RK.new_zeros(order_S.shape[0], out_features, dtype=dtype or x_RK.dtype),
        lambda e, rows: linear_int.meaning(
            x_RK.index_select(0, rows), own(panels, e), own(scale_PGC, e), own(offset_PGC, e), group, out_features,
            None if bias_EN is None else bias_EN[e],
            None if x_scale_RG is None else x_scale_RG.index_select(0, rows), dtype,
        ),
    )  # fmt: skip


@grouped_linear_int.costs
def cost(
    x_RK: Tensor, panels: Tensor, scale_PGC: Tensor, offset_PGC: Tensor | None, out_features: int, order_S: Tensor,
    starts_E: Tensor, bias_EN: Tensor | None, x_scale_RG: Tensor | None, dtype: torch.dtype | None,
) -> Cost:  # fmt: skip
    experts = starts_E.shape[0] - 1
    weight = panels.flatten().unflatten(0, (experts, out_features, -1))
    values = [None if t is None else t.flatten().unflatten(0, (experts, -1)) for t in (scale_PGC, offset_PGC)]
    rows = (x_RK,) if x_scale_RG is None else (x_RK, x_scale_RG)
    return grouped_cost(rows, (weight, *values, bias_EN), order_S, starts_E, dtype or x_RK.dtype)


@grouped_linear_int.inputs(
    examples=(
        {"R": 1, "top_k": 2, "E": 16, "P": 1, "K": 40}, {"R": 0, "top_k": 2, "E": 4, "P": 1, "K": 16},
        {"R": 5, "top_k": 2, "E": 3, "P": 2, "K": 96, "group": 32, "offset": True, "bias": True},
        {"R": 37, "top_k": 1, "E": 2, "P": 3, "K": 33, "format": "int8"},
        {"R": 7, "top_k": 2, "E": 2, "P": 1, "K": 97, "group": 16, "offset": True, "format": "int8"},
        {"R": 7, "top_k": 2, "E": 3, "P": 2, "K": 197, "group": 128, "bias": True, "format": "float8_e4m3fn"},
    ),
    shapes={
        "qwen3-30b-a3b decode up": {"R": 1, "top_k": 8, "E": 128, "P": 48, "K": 2048, "group": 32, "offset": True},
        "qwen3-30b-a3b decode down": {"R": 8, "top_k": 1, "E": 128, "P": 64, "K": 768, "group": 32, "offset": True},
        "qwen3-30b-a3b prefill up": {"R": 256, "top_k": 8, "E": 128, "P": 48, "K": 2048, "group": 128},
        "qwen3-30b-a3b fp8 decode up": {
            "R": 1, "top_k": 8, "E": 128, "P": 48, "K": 2048, "group": 128, "format": "float8_e4m3fn",
        },
    },
    sizes={
        "R": (0, 20), "top_k": [1, 2, 5], "E": [1, 3, 32], "P": (1, 3), "K": [1, 8, 33, 64, 150],
        "group": [0, 2, 32, 128], "offset": [False, True], "bias": [False, True], "format": list(FORMATS),
    },
)  # fmt: skip
def make(
    draw: Draw, R: int, top_k: int, E: int, P: int, K: int, group: int = 0, offset: bool = False, bias: bool = False,
    format: str = "int4",
) -> tuple[Any, ...]:  # fmt: skip
    """Draw experts of P panels."""
    N = P * PANEL
    drawn = linear_int.drawn(draw, T=R, N=E * N, K=K, group=group, offset=offset, format=format)
    return *drawn[:5], N, *make_groups(draw, R, top_k, E), top_k, draw(E, N) if bias else None, *drawn[7:]


@grouped_linear_int.provider(
    "cpp", devices=("cpu",), launches=True,
    refuses=lambda x_RK, panels, offset_PGC, group, bias_EN, x_scale_RG, dtype: refuses_int(
        x_RK, panels, offset_PGC, group, bias_EN, x_scale_RG, dtype
    ),
)  # fmt: skip
def grouped_linear_int_cpp(
    x_RK: Tensor, panels: Tensor, scale_PGC: Tensor, offset_PGC: Tensor | None, group: int, out_features: int,
    order_S: Tensor, starts_E: Tensor, top_k: int, bias_EN: Tensor | None = None, x_scale_RG: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    out_SN, scales = empty((order_S.shape[0], out_features), dtype or x_RK.dtype), (scale_PGC, offset_PGC, x_scale_RG)
    return launch_linear(x_RK, panels, out_SN, bias_EN, group, scales, order_S, starts_E, top_k)
