"""Sum over the ranks, add the residual and normalize in one op.

before: s = wait(all_reduce(x)); y, total = add_rms_norm(s, residual, weight, eps)      s is read by nothing else
after:  y, total = allreduce_rms_norm(x, residual, weight, eps, group)
before: s = wait(all_reduce(x)); y = rms_norm(s, weight, eps)
after:  y, s = allreduce_rms_norm(x, None, weight, eps, group)
Where ranks share memory, the sum is neither written nor read: 2·T·D elements a norm, and a kernel launch less.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from seamwise.kernels import add_rms_norm, allreduce_rms_norm, rms_norm
from seamwise.passes.graph import aten, inserting, is_getitem, is_op, place, replace, value
from seamwise.passes.matcher import Miss
from seamwise.passes.rewrite import Pass, Report

_COLLECTIVES = torch.ops._c10d_functional


def fuse(module: GraphModule, report: Report) -> None:
    """Rewrite every sum over ranks that a norm reads; the others are misses."""
    for total in list(module.graph.find_nodes(op="call_function", target=_COLLECTIVES.wait_tensor.default)):
        if not is_op(total.args[0], _COLLECTIVES.all_reduce.default):
            continue
        norm = next((u for u in total.users if is_op(u, add_rms_norm.op, rms_norm.op)), None)
        if (reason := _why_not(total, norm)) is not None:
            report.misses.append(Miss(place(total), total.name, reason))
            continue
        assert norm is not None
        _rewrite(module, total, norm)
        report.matched += 1


def _why_not(total: Node, norm: Node | None) -> str | None:
    if norm is None:
        return f"is read by {', '.join(str(u.target) for u in total.users)}, wanted a norm"
    if is_op(norm, add_rms_norm.op) and len(total.users) > 1:
        extra = next(u for u in total.users if u is not norm)
        return f"has an extra user {extra.name}, so the sum without the residual must be kept"
    return None


def _rewrite(module: GraphModule, total: Node, norm: Node) -> None:
    x, _, group = total.args[0].args  # type: ignore[union-attr]
    *summands, weight, eps = norm.args
    residual = next((s for s in summands if s is not total), None)
    before = norm if residual is not None else min(total.users)
    with inserting(module.graph, before, like=total) as proxy:

        def rows(node: object) -> object:
            given = proxy(node) if isinstance(node, Node) else node
            return aten.squeeze.dim(given, 0) if batched and node is not None else given

        batched = value(x).dim() == 3 and value(x).shape[0] == 1  # type: ignore[arg-type]
        both = allreduce_rms_norm(rows(x), rows(residual), proxy(weight), eps, group)  # type: ignore[arg-type]
        results = [operator.getitem(both, i) for i in range(2)]
        results = [aten.unsqueeze.default(r, 0) for r in results] if batched else results
    if residual is None:
        replace(norm, results[0].node)
        replace(total, results[1].node)
    else:
        for item in list(norm.users):
            assert is_getitem(item)
            replace(item, results[item.args[1]].node)  # type: ignore[index]
            module.graph.erase_node(item)
    module.graph.erase_node(norm)


FUSE_ALLREDUCE_RMS_NORM = Pass(
    name="fuse_allreduce_rms_norm", rewrite=fuse, expect=lambda s: s.all_reduces if s.norms else 0
)
