"""Take rows of a table by index: token embedding, and the rows whose logits are wanted.

Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.embedding.html.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, Cost, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton


@contract(
    args={"index_T": "[*T] int64"},
    fake=lambda table_VD, index_T: table_VD.new_empty((*index_T.shape, table_VD.shape[1])),
)  # fmt: skip
def gather_rows(table_VD: Tensor, index_T: Tensor) -> Tensor:
    """Return table[index]: (T, D) for a table (V, D) and int64 indices (T,) from 0 to V - 1. Moves 2·T·D elements."""
    return table_VD.index_select(0, index_T.flatten()).unflatten(0, index_T.shape)


@gather_rows.costs
def cost(table_VD: Tensor, index_T: Tensor) -> Cost:
    return Cost(bytes=index_T.nbytes + 2 * index_T.numel() * table_VD.shape[1] * table_VD.element_size(), flops=0)


@gather_rows.inputs(
    examples=({"V": 5, "T": 1, "D": 8}, {"V": 9, "T": 4, "D": 33}, {"V": 3, "T": 0, "D": 16}),
    shapes={"llama-3-8b prefill": {"V": 128256, "T": 4096, "D": 4096}},
    sizes={"V": (1, 20), "T": (0, 9), "D": (1, 1100)},
    rows=(1,),
)
def make(draw: Draw, V: int, T: int, D: int) -> tuple[Tensor, Tensor]:
    return draw(V, D), draw.integers(0, V, T)


@triton.jit
def _gather_rows_kernel(table_ptr, index_ptr, out_ptr, table_stride, V, D, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    source = tl.load(index_ptr + row)
    known = column < tl.where((source >= 0) & (source < V), D, 0)  # zeros for another row than the table's
    values = tl.load(table_ptr + source * table_stride + column, mask=known, other=0.0)
    tl.store(out_ptr + row * D + column, values, mask=column < D)


def config(D: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: 1024 columns a program, 16-byte loads with 4 warps of bfloat16."""
    return {"BLOCK": min(triton.next_power_of_2(D), 1024), "num_warps": 4}


@gather_rows.builds
def builds(dtype: str) -> Iterator[Build]:
    for width in (256, 14336):
        yield Build(_gather_rows_kernel, config(width), {"index_ptr": "*i64"})


@gather_rows.provider("triton", devices=("cuda",), triton=True)
def gather_rows_triton(table_VD: Tensor, index_T: Tensor) -> Tensor:
    width = table_VD.shape[1]
    out = torch.empty((*index_T.shape, width), dtype=table_VD.dtype, device=table_VD.device)
    if index_T.numel():
        chosen = config(width)
        grid = (index_T.numel(), triton.cdiv(width, chosen["BLOCK"]))
        _gather_rows_kernel[grid](table_VD, index_T, out, table_VD.stride(0), table_VD.shape[0], width, **chosen)
    return out
