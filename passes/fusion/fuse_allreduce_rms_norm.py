"""Sum over the ranks, add the residual and normalize in one op.

before: s = wait(all_reduce(x)); y, total = add_rms_norm(s, residual, weight, eps)      s is read by nothing else
after:  y, total = allreduce_rms_norm(x, residual, weight, eps, group)
before: s = wait(all_reduce(x)); y = rms_norm(s, weight, eps)
after:  y, s = allreduce_rms_norm(x, None, weight, eps, group)
Where ranks share memory, the sum is neither written nor read: 2·T·D elements a norm, and a kernel launch less.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from seamwise.kernels import add_rms_norm, allreduce_rms_norm, rms_norm
from seamwise.passes.graph import aten, inserting, is_op, replace, replace_results, value
from seamwise.passes.promises import inner_sums
from seamwise.passes.rewrite import rewrite_each

_COLLECTIVES = torch.ops._c10d_functional


def fuse(total: Node) -> str | None:
    """Rewrite a sum over ranks that a norm reads."""
    norm = next((u for u in total.users if is_op(u, add_rms_norm.op, rms_norm.op)), None)
    if norm is None:
        return f"is read by {', '.join(str(u.target) for u in total.users)}, wanted a norm"
    if is_op(norm, add_rms_norm.op) and len(total.users) > 1:
        extra = next(u for u in total.users if u is not norm)
        return f"has an extra user {extra.name}, so the sum without the residual must be kept"
    _rewrite(total, norm)
    return None


def _rewrite(total: Node, norm: Node) -> None:
    x, _, group = total.args[0].args  # type: ignore[union-attr]
    *summands, weight, eps = norm.args
    residual = next((s for s in summands if s is not total), None)
    before = norm if residual is not None else min(total.users)
    batched = value(x).dim() == 3 and value(x).shape[0] == 1  # type: ignore[arg-type]
    with inserting(total.graph, before, like=total) as proxy:

        def rows(node: Any) -> Any:
            return aten.squeeze.dim(proxy(node), 0) if batched and node is not None else proxy(node)

        both = allreduce_rms_norm(rows(x), rows(residual), proxy(weight), eps, group)
        results = [operator.getitem(both, i) for i in range(2)]
        results = [aten.unsqueeze.default(r, 0) for r in results] if batched else results
    if residual is None:
        replace(norm, results[0].node)
        replace(total, results[1].node)
    else:
        replace_results(norm, dict(enumerate(results)))
        norm.graph.erase_node(norm)


FUSE_ALLREDUCE_RMS_NORM = rewrite_each(
    "fuse_allreduce_rms_norm", _COLLECTIVES.wait_tensor.default, one=fuse,
    wanted=lambda total: is_op(total.args[0], _COLLECTIVES.all_reduce.default),
    expect=lambda s, module: inner_sums(module, _COLLECTIVES.all_reduce.default) if s.norms else 0,
)  # fmt: skip
