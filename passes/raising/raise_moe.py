"""Name the routing of transformers' mixtures of experts, where it is a softmax and its largest.

before: v, i = topk(softmax(logits), K); w = v / v.sum(-1, keepdim)           Mixtral, Qwen3; without the division: v
before: v, i = topk(logits, K); w = softmax(v)                                gpt-oss: the same
after:  w, i = moe_route(logits, K, "softmax", normalize)
The experts themselves are contracts already, by transformers' experts interface (model_defs/hf_experts.py). Groups and
sigmoids (DeepSeek) are left as they are: their routers spell out half of `moe_route`, each in its own way.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from seamwise.kernels import moe_route
from seamwise.passes.graph import aten, inserting, is_getitem, is_op, place, replace, value
from seamwise.passes.matcher import Miss
from seamwise.passes.rewrite import Pass, Report

_SOFTMAX = (aten.softmax.int, aten._softmax.default)


def raise_moe(module: GraphModule, report: Report) -> None:
    """Rewrite every topk over the last dimension that chooses experts; one whose results go elsewhere is a miss."""
    for node in list(module.graph.find_nodes(op="call_function", target=aten.topk.default)):
        found = _routing(node)
        if isinstance(found, str):
            report.misses.append(Miss(place(node), node.name, found))
            continue
        logits, weights, normalize = found
        indices = [u for u in node.users if u.args[1] == 1]
        narrow = [u for i in indices for u in i.users if is_op(u, aten.to.dtype) and u.args[1] == torch.int32]
        with inserting(module.graph, min(weights, *indices), like=node) as proxy:
            routed = moe_route(proxy(logits), node.args[1], "softmax", normalize)
            new_weights, experts = (operator.getitem(routed, i) for i in range(2))
            if value(weights).dtype != torch.float32:
                new_weights = aten.to.dtype(new_weights, value(weights).dtype)
            wide = aten.to.dtype(experts, torch.int64)
        for old, new in ((weights, new_weights), *((n, experts) for n in narrow), *((i, wide) for i in indices)):
            replace(old, new.node)
        report.matched += 1


def _routing(topk: Node) -> tuple[Node, Node, bool] | str:
    """Return the logits, the node that is the experts' weights, and whether they are normalized; or why not."""
    scores, dims = topk.args[0], value(topk.args[0]).dim()  # type: ignore[arg-type]
    dim = topk.args[2] if len(topk.args) > 2 else topk.kwargs.get("dim", -1)
    if dims != 2 or dim not in (-1, 1) or not all(map(is_getitem, topk.users)):
        return f"it takes the largest of dimension {dim} of {dims}, wanted the last of (tokens, experts)"
    values = [u for u in topk.users if u.args[1] == 0]
    if len(values) != 1 or not any(u.args[1] == 1 for u in topk.users):
        return "its values or its indices are not read"
    assert isinstance(scores, Node)
    users = list(values[0].users)
    if is_op(scores, *_SOFTMAX) and scores.args[1] in (-1, 1):
        logits = scores.args[0]
        assert isinstance(logits, Node)
        if is_op(logits, aten.to.dtype) and value(logits).dtype == torch.float32:
            logits = logits.args[0]  # which moe_route widens itself
        total = next((u for u in users if is_op(u, aten.sum.dim_IntList)), None)
        divided = next((u for u in users if is_op(u, aten.div.Tensor) and u.args == (values[0], total)), None)
        normalizes = len(users) == 2 and divided is not None
        return logits, divided if normalizes else values[0], normalizes  # type: ignore[return-value]
    if len(users) == 1 and is_op(users[0], *_SOFTMAX) and users[0].args[1] in (-1, 1):
        return scores, users[0], True
    return f"it takes the largest of {scores.target}, wanted a softmax before it or after"


RAISE_MOE = Pass(name="raise_moe", rewrite=raise_moe)
