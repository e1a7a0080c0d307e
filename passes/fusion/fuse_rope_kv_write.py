"""Rotate the keys where they are stored.

before: k = rope(k0, cos, sin); kv_append(k, v, k_cache, v_cache, slots)      k is read by nothing else
after:  rope_kv_write(k0, v, cos, sin, k_cache, v_cache, slots)
Saves one write and one read of the keys, and brings their rotation into the seam.
"""

from __future__ import annotations

from torch.fx import GraphModule

from seamwise.kernels import kv_append, rope, rope_kv_write
from seamwise.passes.graph import inserting, is_op, place
from seamwise.passes.matcher import Miss
from seamwise.passes.rewrite import Pass, Report


def fuse(module: GraphModule, report: Report) -> None:
    """Join each kv_append to the rope that makes its keys."""
    for node in list(module.graph.find_nodes(op="call_function", target=kv_append.op)):
        k, v, k_cache, v_cache, slots, *scales = node.args
        if not is_op(k, rope.op):
            report.misses.append(Miss(place(node), node.name, "its keys are not rope's result"))
            continue
        if any(s is not None for s in scales):
            report.misses.append(Miss(place(node), node.name, "its cache is quantized, which the fused op does not do"))
            continue
        if len(k.users) > 1:
            extra = next(u for u in k.users if u is not node)
            report.misses.append(Miss(place(node), k.name, f"has an extra user {extra.name}, so it must be kept"))
            continue
        x, cos, sin, *interleaved = k.args
        with inserting(module.graph, node, like=node) as proxy:
            rope_kv_write(*map(proxy, (x, v, cos, sin, k_cache, v_cache, slots)), *interleaved)
        module.graph.erase_node(node)
        report.matched += 1


FUSE_ROPE_KV_WRITE = Pass(
    name="fuse_rope_kv_write",
    rewrite=fuse,
    expect=lambda s: 0 if s.quantized_caches else max(s.rotations // 2 - s.qk_norms, 0),
)
