"""Give each rank its part of the model: columns, rows, vocabulary or experts of the weights that a plan names.

before: q = linear(x, wq); …; y = linear(attention(…), wo); z = rms_norm(y + x, …)
after:  q = linear(x, slice(wq, 0, …)); …; y = wait(all_reduce(linear(attention(…), slice(wo, 1, …)))); z = …
A slice of a weight is a recipe, so loading reads no more than the slice. Each value's placement follows from those of
its inputs, op by op; sums over ranks stand as late as they can, and what cannot be placed is refused, naming the op.
Another way is to build the model with divided sizes. It would need to know what every configuration derives from its
heads, and what it gets wrong (a norm over all heads) would run and be wrong; here it is an error.
Source: Shoeybi et al. 2019, https://arxiv.org/abs/1909.08053; Xu et al. 2021 (GSPMD), https://arxiv.org/abs/2105.04663.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch.fx import GraphModule, Node

from seamwise.kernels import (
    attention,
    ep_combine,
    ep_dispatch,
    gather_rows,
    grouped_linear,
    kv_append,
    mla_prefill,
    moe_align,
    moe_sum,
)
from seamwise.passes.graph import aten, infer, is_op, value
from seamwise.passes.rewrite import Parallel, Pass, Report

from .sharder import COLUMNS, EXPERTS, GATHERED, ROWS, VOCABULARY, Sharder
from .tensor_placement import OWNED, PARTIAL, ROUTED, Cut, Placement, Unplaceable, sections_of


def shard(parallel: Parallel, styles: Mapping[str, str]) -> Pass:
    """Return the pass; `styles`: placeholder -> style of each weight that is shared out, biases apart.

    It marks each input of which a rank has a part with meta["local"] = (dimension, start, end).
    """

    def rewrite(module: GraphModule, report: Report) -> None:
        report.matched = len(Sharder(module, parallel, styles, _RULES).run())

    return Pass(name="shard", rewrite=rewrite, expect=lambda s, _: len(styles))


def _linear(s: Sharder, node: Node) -> Placement:
    """Share out a linear layer, or a layer of many experts, which takes what routes its rows behind the weight."""
    x, weight, *more = node.args
    assert isinstance(x, Node) and isinstance(weight, Node)
    grouped = is_op(node, grouped_linear.op)
    routing, rest = (more[:3], more[3:]) if grouped else ([], more)
    bias, style, cut = rest[0] if rest else None, s.style(weight), s.placed(x)
    if style is None:
        if cut is not None and (grouped or (isinstance(cut, Cut) and cut.dim == -1)):
            raise Unplaceable(node, f"its input is placed {cut}, and the plan has no style for its weight")
        if cut is not None:
            infer(node)
        return cut
    if style in ROWS:
        node.args = (*s.rows_of(node, x, weight), *routing, *([s.own_bias(node, bias)] if bias else []))
        infer(node)
        return PARTIAL
    if grouped and style == EXPERTS:
        own, count = s.own_experts(node, s.shapes[weight][0])
        of_experts = Cut(-3, ((count, s.parallel.size),))
        biases = [s.part(node, bias, Cut(-2, of_experts.sections), bounds=own)] if bias else []
        node.args = (x, s.part(node, weight, of_experts, bounds=own), *routing, *biases)
        infer(node)
        return ROUTED if s.parallel.data else OWNED
    whole = style in (*GATHERED, VOCABULARY)  # every rank gets all columns; of a vocabulary, that is the head too
    if grouped and (whole or style not in COLUMNS):
        raise Unplaceable(node, f"style {style!r} is none for a layer of experts")
    if cut is not None:
        raise Unplaceable(node, f"its input is placed {cut}; style {style!r} wants it whole")
    width = s.shapes[node][-1]
    share = -(-width // s.parallel.size) if whole else 0
    sections = ((share * s.parallel.size, s.parallel.size),) if whole else sections_of(node, s.parallel.size)
    own_weight, *biases = (
        s.part(node, w, Cut(d, sections), share) for w, d in ((weight, -2), (bias, -1)) if w is not None
    )
    node.args = (x, own_weight, *routing, *biases)
    infer(node)
    if not whole:
        return Cut(-1, sections)
    users = list(node.users)
    result = s.gathered(node, width)
    for user in users:
        user.replace_input_with(node, result)
    return None


def _moe_align(s: Sharder, node: Node) -> Placement:
    """Number the experts from the rank's first: those of other ranks are then no experts. Or send rows to them."""
    readers = [user for item in node.users for user in item.users if is_op(user, grouped_linear.op)]
    if any(s.style(r.args[1]) == EXPERTS for r in readers):
        if s.parallel.data:
            return _send_rows(s, node, min(readers))
        chosen, experts = node.args[:2]
        cut = s.even(node, -1, experts)  # type: ignore[arg-type]
        start = cut.width * s.parallel.rank
        node.args = (s.before(node, aten.sub.Tensor, chosen, start), cut.width, *node.args[2:])
        for changed in (node, *node.users):  # there are fewer starts
            infer(changed)
    return None


def _send_rows(s: Sharder, node: Node, first: Node) -> Placement:
    """Send the rows that the first of the experts' layers reads; what came in and its experts are then aligned."""
    chosen, experts = node.args[:2]
    _, places = s.own_experts(node, experts)  # type: ignore[arg-type]
    sent = s.before(node, ep_dispatch.op, first.args[0], chosen, places, s.parallel.group)
    rows, local = (s.before(node, operator.getitem, sent, i) for i in range(2))
    node.args = (local, places // s.parallel.size, *node.args[2:])
    first.args = (rows, *first.args[1:])
    for changed in (node, *node.users):
        infer(changed)
    s.placements[rows], s.shapes[rows] = ROUTED, tuple(value(rows).shape)
    s.sent[node] = sent
    return None


def _moe_sum(s: Sharder, node: Node) -> Placement:
    y, _, *shared = node.args
    if s.placed(y) == ROUTED:  # each choice's row comes back by itself: summed here, in the order of one rank alone
        layer = next(a for a in _behind(y) if is_op(a, grouped_linear.op))
        sent = s.sent[layer.args[2].args[0]]  # type: ignore[union-attr, index]
        local = next(u for u in sent.users if u.args[1] == 1)
        back = s.before(node, ep_combine.op, y, local, *sent.args[1:])
        node.args = (back, *node.args[1:])
        infer(node)
        return None
    if s.placed(y) not in (PARTIAL, OWNED):
        return None
    if any(other is not None and s.placed(other) != PARTIAL for other in shared):
        raise Unplaceable(node, "what shared experts give is whole on every rank, and would be added by each")
    infer(node)
    return PARTIAL


def _behind(node: Any) -> Iterator[Node]:
    """Yield a node, and what it is computed from through first arguments."""
    while isinstance(node, Node):
        yield node
        node = node.args[0] if node.args else None


def _gather_rows(s: Sharder, node: Node) -> Placement:
    """Look tokens up in a part of the vocabulary: those of other ranks give zero."""
    table, ids = node.args
    assert isinstance(table, Node) and isinstance(ids, Node)
    if s.placed(table) is not None:
        raise Unplaceable(node, f"takes rows of what is placed {s.placed(table)}; wanted the whole of it")
    if s.style(table) != VOCABULARY:
        return None
    size, rank = s.parallel.size, s.parallel.rank
    share = -(-s.shapes[table][0] // size)
    part = s.part(node, table, Cut(-2, ((share * size, size),)), share)
    local = s.before(node, aten.sub.Tensor, ids, rank * share)
    inside = s.before(node, aten.clamp.default, local, 0, share - 1)
    outside = s.before(node, aten.unsqueeze.default, s.before(node, aten.ne.Tensor, local, inside), -1)
    node.args = (part, inside)
    infer(node)
    users = list(node.users)
    masked = s.add(node, aten.masked_fill.Scalar, node, outside, 0.0)
    for user in users:
        user.replace_input_with(node, masked)
    s.placements[masked], s.shapes[masked] = PARTIAL, s.shapes[node]
    return None


def _kv_append(s: Sharder, node: Node) -> Placement:
    """Let a rank cache the heads that it has."""
    k, v, *caches = node.args[:4]
    if (cut := s.placed(k)) != s.placed(v):
        raise Unplaceable(node, f"keys are placed {cut}, values {s.placed(v)}; wanted alike")
    if cut is None:
        return None
    if not isinstance(cut, Cut) or cut.dim != -2 or len(cut.sections) != 1:
        raise Unplaceable(node, f"keys and values are placed {cut}; wanted heads, a part on each rank")
    ((start, end),) = cut.bounds(s.parallel.rank, s.parallel.size)
    for cache in caches:
        assert isinstance(cache, Node) and cache.op == "placeholder"
        cache.meta["local"] = (1, start, end)
        cache.meta["val"] = value(cache)[:, start:end].clone()
        s.placements[cache] = Cut(-3, cut.sections)
    if any(scale is not None and s.shapes[scale] != (1,) for scale in node.args[5:]):  # type: ignore[index]
        raise Unplaceable(node, "scales are of each head; wanted one of all")
    return None


def _attention(s: Sharder, node: Node) -> Placement:
    cut, cache = s.placed(node.args[0]), s.placed(node.args[1])
    if cut is None and cache is None:
        return None
    if not (isinstance(cut, Cut) and cut.dim == -2 and len(cut.sections) == 1 and isinstance(cache, Cut)):
        raise Unplaceable(node, f"queries are placed {cut}, the cache {cache}; wanted heads of both")
    ((heads, parts),) = cut.sections
    if parts != s.parallel.size:
        raise Unplaceable(node, f"{heads} heads do not divide among {s.parallel.size} ranks; use fewer")
    by_head = {i for i in (9, 10) if i < len(node.args) and node.args[i] is not None}  # sinks, slopes
    node.args = tuple(s.part(node, a, Cut(-1, cut.sections)) if i in by_head else a for i, a in enumerate(node.args))
    infer(node)
    return cut


def _mla_prefill(s: Sharder, node: Node) -> Placement:
    """Let a rank attend with the heads that it has to latents that are whole: it expands them to these heads alone."""
    q_nope, q_rope, _, kv_b, *_ = node.args
    cut = s.placed(q_nope)
    if cut != s.placed(q_rope):
        raise Unplaceable(node, f"queries are placed {cut}, their rotated part {s.placed(q_rope)}; wanted alike")
    if cut is None:
        return None
    heads, expanded, latent = s.shapes[kv_b]  # type: ignore[index]
    size = s.parallel.size
    if cut != Cut(-2, ((heads, size),)) or not is_op(kv_b, aten.reshape.default):
        raise Unplaceable(node, f"queries are placed {cut}; wanted {heads} heads, a part of kv_b's on each rank")
    s.style(kv_b.args[0])  # type: ignore[union-attr]
    rows = s.part(node, kv_b.args[0], Cut(-2, ((heads * expanded, size),)))  # type: ignore[union-attr]
    own = s.before(node, aten.reshape.default, rows, [heads // size, expanded, latent])
    node.args = (*node.args[:3], own, *node.args[4:])
    infer(node)
    return cut


_RULES: dict[Any, Callable[[Sharder, Node], Placement]] = {
    aten.linear.default: _linear,
    grouped_linear.op: _linear,
    moe_align.op: _moe_align,
    moe_sum.op: _moe_sum,
    gather_rows.op: _gather_rows,
    kv_append.op: _kv_append,
    attention.op: _attention,
    mla_prefill.op: _mla_prefill,
}
