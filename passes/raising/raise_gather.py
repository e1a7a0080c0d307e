"""Name row lookups: token embedding, and the choice of rows whose logits are wanted.

before: x = embedding(table, ids); y = index(hidden, [rows])    or y = index(hidden, [None, rows]), batch of 1
after:  x = gather_rows(table, ids); y = gather_rows(hidden, rows)
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from seamwise.kernels import gather_rows
from seamwise.passes.graph import aten, given, is_op, replace_by, value
from seamwise.passes.rewrite import rewrite_each


def raise_gather(node: Node) -> str | None:
    """Rewrite a lookup of whole rows of a matrix by one int64 index tensor."""
    table, index, reason = _operands(node)
    if reason is not None:
        return reason
    if value(table).dim() == 3:
        replace_by(node, lambda of: aten.unsqueeze.default(gather_rows(aten.select.int(of(table), 0, 0), of(index)), 0))
    else:
        replace_by(node, lambda of: gather_rows(of(table), of(index)))
    return None


def _operands(node: Node) -> tuple[Any, Any, str | None]:
    """Return the table and the index of a lookup, or why it is none of whole rows."""
    call = given(node)
    if is_op(node, aten.embedding.default):
        table, index = call.weight, call.indices
    elif is_op(node, aten.index.Tensor):
        batched = len(call.indices) == 2 and call.indices[0] is None
        if not batched and len(call.indices) != 1:
            return None, None, f"has {len(call.indices)} indices, wanted one, of whole rows"
        table, index = call.self, call.indices[-1]
        shape = value(table).shape
        if batched and len(shape) == 3 and shape[0] == 1 and value(index).dim() == 1:
            return table, index, None
    else:
        if call.dim != 0:
            return None, None, f"selects along dimension {call.dim}, wanted 0"
        table, index = call.self, call.index
    if value(table).dim() != 2 or value(index).dtype != torch.int64:
        return None, None, f"table has rank {value(table).dim()} and index {value(index).dtype}: wanted 2 and int64"
    return table, index, None


RAISE_GATHER = rewrite_each(
    "raise_gather", aten.embedding.default, aten.index.Tensor, aten.index_select.default, one=raise_gather
)
