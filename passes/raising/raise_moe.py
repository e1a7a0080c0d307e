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
from torch.fx import Node

from seamwise.kernels import moe_route
from seamwise.passes.graph import aten, given, inserting, is_getitem, is_op, replace, value
from seamwise.passes.rewrite import rewrite_each

_SOFTMAX = (aten.softmax.int, aten._softmax.default)


def raise_moe(node: Node) -> str | None:
    """Rewrite a topk over the last dimension that chooses experts; not one whose results go elsewhere."""
    found = _routing(node)
    if isinstance(found, str):
        return found
    logits, weights, normalize = found
    indices = [u for u in node.users if u.args[1] == 1]
    narrow = [u for i in indices for u in i.users if is_op(u, aten.to.dtype) and given(u).dtype == torch.int32]
    with inserting(node.graph, min(weights, *indices), like=node) as proxy:
        routed = moe_route(proxy(logits), given(node).k, "softmax", normalize)
        new_weights, experts = (operator.getitem(routed, i) for i in range(2))
        if value(weights).dtype != torch.float32:
            new_weights = aten.to.dtype(new_weights, value(weights).dtype)
        wide = aten.to.dtype(experts, torch.int64)
    for old, new in ((weights, new_weights), *((n, experts) for n in narrow), *((i, wide) for i in indices)):
        replace(old, new.node)
    return None


def _routing(topk: Node) -> tuple[Node, Node, bool] | str:
    """Return the logits, the node that is the experts' weights, and whether they are normalized; or why not."""
    scores, dim = given(topk).self, given(topk).dim
    dims = value(scores).dim()
    if dims != 2 or dim not in (-1, 1) or not all(map(is_getitem, topk.users)):
        return f"it takes the largest of dimension {dim} of {dims}, wanted the last of (tokens, experts)"
    values = [u for u in topk.users if u.args[1] == 0]
    if len(values) != 1 or not any(u.args[1] == 1 for u in topk.users):
        return "its values or its indices are not read"
    users = list(values[0].users)
    if is_op(scores, *_SOFTMAX) and given(scores).dim in (-1, 1):
        logits = given(scores).self
        if is_op(logits, aten.to.dtype) and value(logits).dtype == torch.float32:
            logits = given(logits).self  # which moe_route widens itself
        total = next((u for u in users if is_op(u, aten.sum.dim_IntList)), None)
        divided = next((u for u in users if is_op(u, aten.div.Tensor) and u.args == (values[0], total)), None)
        normalizes = len(users) == 2 and divided is not None
        return logits, divided if divided is not None and normalizes else values[0], normalizes
    if len(users) == 1 and is_op(users[0], *_SOFTMAX) and given(users[0]).dim in (-1, 1):
        return scores, users[0], True
    return f"it takes the largest of {scores.target}, wanted a softmax before it or after"


RAISE_MOE = rewrite_each("raise_moe", aten.topk.default, one=raise_moe)
