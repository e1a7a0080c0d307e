"""Let each rank keep and norm its share of the rows between attention and MLPs, which read all of them.

before: y, total = allreduce_rms_norm(x, residual, weight, eps, group)
after:  y, share = reduce_scatter_rms_norm(x, residual's share, weight, eps, group, gather=True)
As many bytes between ranks, 1/ranks of the norms' work and of the residual's memory. A sum stays whole where another op
than such a norm reads it or its residual comes from one; then so do those that it is the residual of.
Source: Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2.2.
"""

from __future__ import annotations

import operator

from torch.fx import GraphModule, Node

from seamwise.kernels import allreduce_rms_norm, reduce_scatter_rms_norm
from seamwise.passes.graph import inserting, is_getitem, place, replace_results
from seamwise.passes.matcher import Miss
from seamwise.passes.promises import inner_sums
from seamwise.passes.rewrite import Pass, Report


def rewrite(module: GraphModule, report: Report) -> None:
    """Rewrite the sums of the longest chain of residuals that stays in shares; the others are misses."""
    shared = dict.fromkeys(module.graph.find_nodes(op="call_function", target=allreduce_rms_norm.op))
    while whole := {n: why for n in shared if (why := _why_not(n, shared)) is not None}:
        report.misses += [Miss(place(n), n.name, why) for n, why in whole.items()]
        shared = {n: None for n in shared if n not in whole}
    for node in shared:
        with inserting(module.graph, node, like=node) as proxy:
            both = reduce_scatter_rms_norm(*map(proxy, node.args), True)
            results = {i: operator.getitem(both, i) for i in range(2)}
        replace_results(node, results)
        report.matched += 1


def _why_not(node: Node, shared: dict[Node, None]) -> str | None:
    residual = node.args[1]
    if isinstance(residual, Node) and not (
        is_getitem(residual) and residual.args[1] == 1 and residual.args[0] in shared
    ):
        return f"its residual {residual.name} is whole on every rank"
    readers = [u for item in node.users if item.args[1] == 1 for u in item.users]
    other = next((u for u in readers if u not in shared), None)
    return f"its sum is read by {other.name}, which wants all rows" if other is not None else None


SEQUENCE_PARALLEL = Pass(
    name="sequence_parallel", rewrite=rewrite, expect=lambda _, module: inner_sums(module, allreduce_rms_norm.op),
    from_tokens=lambda parallel: (parallel and parallel.sequence) or None,
)  # fmt: skip
