"""Rotate the keys where they are stored.

before: k = rope(k0, cos, sin); kv_append(k, v, k_cache, v_cache, slots)      k is read by nothing else
after:  rope_kv_write(k0, v, cos, sin, k_cache, v_cache, slots)
Saves one write and one read of the keys, and brings their rotation into the seam.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from seamwise.kernels import kv_append, rope, rope_kv_write
from seamwise.passes.graph import given, inserting, is_op
from seamwise.passes.promises import calls
from seamwise.passes.rewrite import Structure, rewrite_each


def fuse(node: Node) -> str | None:
    """Join a kv_append to the rope that makes its keys."""
    written = given(node)
    if not is_op(written.k_TKD, rope.op):
        return "its keys are not rope's result"
    if written.k_scale is not None or written.v_scale is not None:
        return "its cache is quantized, which the fused op does not do"
    if len(written.k_TKD.users) > 1:
        extra = next(u for u in written.k_TKD.users if u is not node)
        return f"{written.k_TKD.name} has an extra user {extra.name}, so it must be kept"
    x, cos, sin, *interleaved = written.k_TKD.args
    with inserting(node.graph, node, like=node) as proxy:
        kept = (x, written.v_TKD, cos, sin, written.k_cache, written.v_cache, written.slot_mapping_T)
        rope_kv_write(*map(proxy, kept), *interleaved)
    node.graph.erase_node(node)
    return None


def _promised(s: Structure, module: GraphModule) -> int:
    quantized = any(given(node).k_scale is not None for node in calls(module, kv_append))
    return 0 if quantized else max(s.rotations // 2 - s.qk_norms, 0)


FUSE_ROPE_KV_WRITE = rewrite_each(
    "fuse_rope_kv_write", kv_append.op, one=fuse,
    expect=_promised,
)  # fmt: skip
