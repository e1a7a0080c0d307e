"""Take rows of a table by index: token embedding, and the rows whose logits are wanted."""

from __future__ import annotations

from torch import Tensor

from .contract import Cost, contract


@contract()
def gather_rows(table_VD: Tensor, index_T: Tensor) -> Tensor:
    """Return table[index]: (T, D) for a table (V, D) and int64 indices (T,) from 0 to V - 1. Moves 2·T·D elements."""
    return table_VD.index_select(0, index_T.flatten()).unflatten(0, index_T.shape)


@gather_rows.costs
def cost(table_VD: Tensor, index_T: Tensor) -> Cost:
    return Cost(bytes=index_T.nbytes + 2 * index_T.numel() * table_VD.shape[1] * table_VD.element_size(), flops=0)
