"""Take rows of a table that is packed for a linear layer: the embedding of a model whose head is the same weight.

So a CPU holds that weight once. A row's words lie a panel's width apart, 128 bytes; a step reads few rows.
Source: Press and Wolf 2017, on tying both, https://arxiv.org/abs/1608.05859.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seamwise.kernels.contract import Cost, contract
from seamwise.kernels.cpu.tape import Kernel, empty, launch
from seamwise.kernels.draw import Draw

from .linear import PANEL, limits_packed, pack_linear

_GATHER = Kernel("linear_cpu.cpp", "seamwise_gather_packed")


@contract(
    args={"packed": "[P W L E]", "index_T": "[*T] int64"}, opaque=True,
    limits=lambda packed, num_rows, width: limits_packed(packed, num_rows, width),
)  # fmt: skip
def gather_packed_rows(packed: Tensor, index_T: Tensor, num_rows: int, width: int) -> Tensor:
    """Return table[index], (T, D), for a table (V, D) packed by `pack_linear`; V num_rows, D width, index int64.

    Moves 2·T·D elements.
    """
    index = index_T.flatten()
    rows = packed[index // PANEL, :, index % PANEL].flatten(1)[:, :width]
    return rows.reshape(*index_T.shape, width).clone(memory_format=torch.contiguous_format)


@gather_packed_rows.costs
def cost(packed: Tensor, index_T: Tensor, width: int) -> Cost:
    return Cost(bytes=index_T.nbytes + 2 * index_T.numel() * width * packed.element_size(), flops=0)


@gather_packed_rows.inputs(
    examples=({"V": 5, "T": 1, "D": 8}, {"V": 40, "T": 4, "D": 33}, {"V": 3, "T": 0, "D": 16}),
    shapes={
        "smollm2-135m decode": {"V": 49152, "T": 32, "D": 576},
        "smollm2-135m prefill": {"V": 49152, "T": 512, "D": 576},
    },
    sizes={"V": (1, 80), "T": (0, 9), "D": (1, 200)},
    rows=(1,),
)
def make(draw: Draw, V: int, T: int, D: int) -> tuple[Tensor, Tensor, int, int]:
    return pack_linear(draw(V, D)), draw.integers(0, V, T), V, D


def _refuses(packed: Tensor) -> str | None:
    return None if packed.element_size() in (2, 4) else f"elements must be of 2 or 4 bytes, got {packed.dtype}"


@gather_packed_rows.provider("cpp", devices=("cpu",), refuses=_refuses, launches=True)
def gather_packed_rows_cpp(packed: Tensor, index_T: Tensor, num_rows: int, width: int) -> Tensor:
    """Copy rows in C++. Raises ValueError when an index lies outside the table."""
    out = empty((*index_T.shape, width), packed.dtype)
    wrong = launch(
        _GATHER, packed.data_ptr(), index_T.data_ptr(), out.data_ptr(), packed.element_size(), index_T.numel(),
        num_rows, width, torch.get_num_threads(),
    )  # fmt: skip
    if wrong:
        got = int(index_T.flatten()[wrong - 1])
        raise ValueError(f"gather_packed_rows: index {got}, wanted 0 to {num_rows - 1}")
    return out
