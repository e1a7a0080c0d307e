"""How often each expert is chosen, counted where steps run: what balancing goes by. One op for all layers of a step.

Source: DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton


def limits_choices(experts_TX: Tensor, loads_LE: Tensor) -> str | None:
    """Return why choices are not as many in every layer, or None."""
    columns, layers = experts_TX.shape[1], loads_LE.shape[0]
    return f"{columns} columns of choices do not divide among {layers} layers" if columns % layers else None


@contract(
    args={"experts_TX": "[T X] int32", "slots_T": "int64", "loads_LE": "[L E] int32"}, limits=limits_choices,
    seam=True, mutates=("loads_LE",), fake=lambda *args: None,
)  # fmt: skip
def count_experts(experts_TX: Tensor, slots_T: Tensor, loads_LE: Tensor) -> None:
    """Add to loads[l, e] the choices of expert e in layer l: column l·K + k of `experts` is layer l's k-th choice.

    A choice of -1, and a row whose cache slot is -1, is not counted. Moves 4·T·L·K bytes, the slots and the loads.
    """
    chosen_LTK = experts_TX.unflatten(1, (loads_LE.shape[0], -1)).transpose(0, 1)
    counted_LTK = (chosen_LTK >= 0) & (slots_T >= 0).view(-1, 1)
    loads_LE.scatter_add_(1, chosen_LTK.clamp(min=0).flatten(1).long(), counted_LTK.flatten(1).int())


@count_experts.inputs(
    examples=({"T": 1, "K": 1, "L": 1, "E": 1}, {"T": 7, "K": 2, "L": 3, "E": 8}, {"T": 0, "K": 2, "L": 2, "E": 4}),
    shapes={"deepseek-v3 decode": {"T": 64, "K": 8, "L": 58, "E": 256}},
    sizes={"T": (0, 40), "K": [1, 2, 8], "L": (1, 4), "E": (1, 20)},
)
def make(draw: Draw, T: int, K: int, L: int, E: int) -> tuple[Any, ...]:
    """Some choices are -1, and every third row is padding."""
    slots_T = torch.arange(T, device=draw.device)
    slots_T[2::3] = -1
    loads_LE = draw.integers(0, 9, L, E).int()
    return draw.integers(-1, E, T, L * K).int(), slots_T, loads_LE


@triton.jit
def _count_experts_kernel(experts_ptr, slots_ptr, loads_ptr, choices, X, K, E, BLOCK: tl.constexpr):
    """Whole numbers add up to the same in any order, so programs need not wait for each other."""
    choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = choice < choices
    expert = tl.load(experts_ptr + choice, mask=inside, other=-1)
    known = (expert >= 0) & (expert < E) & (tl.load(slots_ptr + choice // X, mask=inside, other=-1) >= 0)
    tl.atomic_add(loads_ptr + (choice % X // K) * E + expert, 1, mask=known, sem="relaxed")


_CONFIG = {"BLOCK": 256, "num_warps": 4}  # unmeasured: a decode step of 64 tokens and 58 layers is 116 programs
_TYPES = {**dict.fromkeys(("experts_ptr", "loads_ptr"), "*i32"), "slots_ptr": "*i64"}
count_experts.builds([Build(_count_experts_kernel, _CONFIG, _TYPES)])


@count_experts.provider("triton", devices=("cuda",), triton=True)
def count_experts_triton(experts_TX: Tensor, slots_T: Tensor, loads_LE: Tensor) -> None:
    choices, (columns, (layers, experts)) = experts_TX.numel(), (experts_TX.shape[1], loads_LE.shape)
    if choices:
        _count_experts_kernel[(triton.cdiv(choices, _CONFIG["BLOCK"]),)](
            experts_TX, slots_T, loads_LE, choices, columns, columns // layers, experts, **_CONFIG
        )
