"""Overlap what ranks say to each other with the GEMMs before and after it.

before: y, share = reduce_scatter_rms_norm(linear(x, down), residual, weight, eps, group, True); z = linear(y, up)
after:  z, share = norm_between_linears(x, down, residual, weight, eps, group, up)
The op takes its rows in chunks, and one chunk's rows travel while another's are multiplied. Experts are no such GEMM,
and the head reads few of the rows: those sums stay as they are.
"""

from __future__ import annotations

import operator
from typing import Any

from torch.fx import GraphModule, Node

from seamwise.kernels import dequantize_weight, norm_between_linears, reduce_scatter_rms_norm
from seamwise.passes.graph import aten, inserting, is_op, replace, replace_results, value
from seamwise.passes.promises import calls, inner_sums
from seamwise.passes.rewrite import Structure, rewrite_each


def rewrite(node: Node) -> str | None:
    """Rewrite a norm of shares between two linear layers."""
    before = _without_batch(node.args[0])
    rows = [u for item in node.users if item.args[1] == 0 for u in item.users]
    readers = [u for r in rows for u in (r.users if is_op(r, aten.unsqueeze.default) else [r])]
    if (reason := _why_not(before, readers)) is None:
        _rewrite(node, before, readers[0])
    return reason


def _rewrite(node: Node, before: Node, after: Node) -> None:
    with inserting(node.graph, node, like=node) as proxy:
        x, down, *others = map(proxy, (*before.args[:2], *node.args[1:5], *after.args[1:]))
        x = aten.squeeze.dim(x, 0) if value(before).dim() == 3 else x
        both = norm_between_linears(x, down, *others)
        results = [operator.getitem(both, i) for i in range(2)]
        results[0] = aten.unsqueeze.default(results[0], 0) if value(after).dim() == 3 else results[0]
    replace(after, results[0].node)
    replace_results(node, {1: results[1]})


def _without_batch(x: Any) -> Any:
    return x.args[0] if is_op(x, aten.squeeze.dim) else x


def _why_not(before: Node, readers: list[Node]) -> str | None:
    if not is_op(before, aten.linear.default) or any(before.args[2:]) or len(before.users) > 1:
        return f"it sums {before.name}, wanted what a linear layer without bias gives to nothing else"
    if len(readers) != 1 or not is_op(readers[0], aten.linear.default):
        return f"its rows are read by {', '.join(r.name for r in readers)}, wanted one linear layer"
    weights = [layer.args[1] for layer in (before, readers[0])]
    parts = [p for w in weights for p in (w.args[0] if is_op(w, aten.cat.default) else [w])]  # type: ignore[union-attr]
    if any(is_op(p, dequantize_weight.op) for p in parts):
        return "a layer's weight is quantized, which the op does not read"
    return None


def _promised(s: Structure, module: GraphModule) -> int:
    """Return the sums but the last, which feeds the head, and those before and after experts."""
    sums = inner_sums(module, reduce_scatter_rms_norm.op)
    return 0 if calls(module, dequantize_weight) else max(sums - 1 - 2 * s.sparse_mlps, 0)


ASYNC_TP = rewrite_each(
    "async_tp", reduce_scatter_rms_norm.op, one=rewrite, expect=_promised,
    from_tokens=lambda parallel: parallel.sequence if parallel and parallel.overlap else None,
)  # fmt: skip
