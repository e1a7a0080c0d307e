"""The cosines and sines that rotary position embedding needs for a step's positions.

Source: Su et al. 2021, https://arxiv.org/abs/2104.09864; rounded where transformers' LlamaRotaryEmbedding rounds;
M-RoPE: Wang et al. 2024, https://arxiv.org/abs/2409.12191, section 2.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton


def _limits(positions_T: Tensor, speeds_F: Tensor, sections: list[int] | None) -> str | None:
    if sections is None or (
        sum(sections) == speeds_F.shape[0] and positions_T.dim() == 2 and positions_T.shape[0] == 3
    ):
        return None
    got = f"got positions {tuple(positions_T.shape)} and {speeds_F.shape[0]} speeds"
    return f"sections {sections} want positions (3, T) and {sum(sections)} speeds, {got}"


def _fake(positions_T: Tensor, speeds_F: Tensor, dtype: torch.dtype, sections: list[int] | None) -> Any:
    size = (*positions_T.shape[sections is not None :], 2 * speeds_F.shape[0])
    return positions_T.new_empty(size, dtype=dtype), positions_T.new_empty(size, dtype=dtype)


@contract(
    args={"positions_T": "*T int64", "speeds_F": "float32"},
    limits=_limits,
    flops=lambda positions_T, speeds_F: 5 * positions_T.shape[-1] * speeds_F.numel(),
    fake=_fake,
)
def rope_table(
    positions_T: Tensor, speeds_F: Tensor, scaling: float, dtype: torch.dtype, sections: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Return cos and sin of position · speed, times scaling: each (T, 2·F), both halves alike, as `rope` reads them.

    positions (T,) are integers, speeds (F,) float32 radians a position; float32 until the last rounding, to dtype.
    With `sections` (M-RoPE) positions are (3, T), of time, height and width, which the runs of so many speeds take in
    turn: section i takes row i mod 3. Moves T + F + 4·T·F elements. Raises ValueError when sections do not fit.
    """
    angles_TF = positions_T.unsqueeze(-1).to(torch.float32) * speeds_F
    if sections is not None:
        parts = angles_TF.split(sections, -1)
        angles_TF = torch.cat([part[i % 3] for i, part in enumerate(parts)], -1)
    angles_TD = torch.cat((angles_TF, angles_TF), -1)
    return (angles_TD.cos() * scaling).to(dtype), (angles_TD.sin() * scaling).to(dtype)


@rope_table.inputs(
    examples=({"T": 1, "F": 32}, {"T": 5, "F": 7}, {"T": 0, "F": 4}),
    shapes={"llama-3-8b prefill": {"T": 4096, "F": 64}, "smollm2-135m decode": {"T": 1, "F": 32}},
    sizes={"T": (0, 9), "F": (1, 64)},
    rows=(0,),
)
def make(draw: Draw, T: int, F: int) -> tuple[Any, ...]:
    positions_T = draw.integers(0, 8192, T)
    speeds_F = 10000.0 ** (-torch.arange(F, dtype=torch.float32, device=draw.device) / F)
    return positions_T, speeds_F, 1.0, draw.dtype


@triton.jit
def _rope_table_kernel(
    positions_ptr, speeds_ptr, cos_ptr, sin_ptr, scaling, T, F, height_from, width_from, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)  # [BLOCK]
    inside = column < F
    axis = (column >= height_from).to(tl.int64) + (column >= width_from).to(tl.int64)  # 0 where there is one row
    position = tl.load(positions_ptr + axis * T + token, mask=inside, other=0)
    angle = position.to(tl.float32) * tl.load(speeds_ptr + column, mask=inside, other=0.0)
    scale = tl.cast(scaling, tl.float32)
    cos = (tl.cos(angle) * scale).to(cos_ptr.dtype.element_ty)
    sin = (tl.sin(angle) * scale).to(sin_ptr.dtype.element_ty)
    at = token * 2 * F + column
    tl.store(cos_ptr + at, cos, mask=inside)
    tl.store(cos_ptr + at + F, cos, mask=inside)
    tl.store(sin_ptr + at, sin, mask=inside)
    tl.store(sin_ptr + at + F, sin, mask=inside)


rope_table.builds(
    Build(_rope_table_kernel, {"BLOCK": block, "num_warps": 1}, {"scaling": "fp32"}) for block in (32, 64)
)


def _refuses(positions_T: Tensor, sections: list[int] | None) -> str | None:
    if sections is None:
        return None if positions_T.dim() == 1 else f"positions are {tuple(positions_T.shape)}, wanted (T,)"
    return None if len(sections) == 3 else f"{len(sections)} sections, wanted 3"


@rope_table.provider("triton", devices=("cuda",), refuses=_refuses, triton=True)
def rope_table_triton(
    positions_T: Tensor, speeds_F: Tensor, scaling: float, dtype: torch.dtype, sections: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    T, F = positions_T.shape[-1], speeds_F.shape[0]
    cos, sin = (torch.empty(T, 2 * F, dtype=dtype, device=positions_T.device) for _ in range(2))
    height_from, width_from = (F, F) if sections is None else (sections[0], sections[0] + sections[1])
    if T:
        _rope_table_kernel[(T,)](
            positions_T, speeds_F, cos, sin, scaling, T, F, height_from, width_from,
            BLOCK=triton.next_power_of_2(F), num_warps=1,
        )  # fmt: skip
    return cos, sin
