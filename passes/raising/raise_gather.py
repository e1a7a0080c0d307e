"""Name row lookups: token embedding, and the choice of rows whose logits are wanted.

before: x = embedding(table, ids); y = index(hidden, [rows])    or y = index(hidden, [None, rows]), batch of 1
after:  x = gather_rows(table, ids); y = gather_rows(hidden, rows)
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from seamwise.kernels import gather_rows
from seamwise.passes.graph import aten, inserting, is_op, place, replace, value
from seamwise.passes.matcher import Miss
from seamwise.passes.rewrite import Pass, Report


def raise_gather(module: GraphModule, report: Report) -> None:
    """Rewrite every lookup of whole rows of a matrix by one int64 index tensor."""
    for node in list(module.graph.nodes):
        if not is_op(node, aten.embedding.default, aten.index.Tensor, aten.index_select.default):
            continue
        table, index, reason = _operands(node)
        if reason is not None:
            report.misses.append(Miss(place(node), node.name, reason))
            continue
        with inserting(module.graph, node, like=node) as proxy:
            if value(table).dim() == 3:
                flat = aten.select.int(proxy(table), 0, 0)
                rows = aten.unsqueeze.default(gather_rows(flat, proxy(index)), 0)
            else:
                rows = gather_rows(proxy(table), proxy(index))
        replace(node, rows.node)
        module.graph.erase_node(node)
        report.matched += 1


def _operands(node: Node) -> tuple[Any, Any, str | None]:
    if is_op(node, aten.embedding.default):
        table, index = node.args[:2]
    elif is_op(node, aten.index.Tensor):
        indices: Any = node.args[1]
        batched = len(indices) == 2 and indices[0] is None
        if not batched and len(indices) != 1:
            return None, None, f"has {len(indices)} indices, wanted one, of whole rows"
        table, index = node.args[0], indices[-1]
        shape = value(table).shape  # type: ignore[arg-type]
        if batched and len(shape) == 3 and shape[0] == 1 and value(index).dim() == 1:
            return table, index, None
    else:
        if node.args[1] != 0:
            return None, None, f"selects along dimension {node.args[1]}, wanted 0"
        table, index = node.args[0], node.args[2]
    if value(table).dim() != 2 or str(value(index).dtype) != "torch.int64":  # type: ignore[arg-type]
        return None, None, f"table has rank {value(table).dim()} and index {value(index).dtype}: wanted 2 and int64"  # type: ignore[arg-type]
    return table, index, None


RAISE_GATHER = Pass(name="raise_gather", rewrite=raise_gather)
