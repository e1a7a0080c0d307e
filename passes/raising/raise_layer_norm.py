"""Name LayerNorm over the last dimension.

before: y = aten.layer_norm(x, [D], weight, bias, eps)
after:  y = layer_norm(x, weight, bias, eps)
"""

from __future__ import annotations

from torch.fx import Node

from seamwise.kernels import layer_norm
from seamwise.passes.graph import aten, given, replace_by, value
from seamwise.passes.rewrite import rewrite_each


def raise_layer_norm(node: Node) -> str | None:
    """Rewrite a layer norm of one dimension."""
    call = given(node)
    shape, columns = call.normalized_shape, value(call.input).shape[-1]
    if len(shape) != 1:
        return f"it normalizes {len(shape)} dimensions, wanted the last one"
    if call.weight is None:
        return "it has no weight"
    if columns != shape[0]:
        return f"it normalizes {shape[0]} of {columns} columns"
    replace_by(node, lambda of: layer_norm(of(call.input), of(call.weight), of(call.bias), call.eps))
    return None


RAISE_LAYER_NORM = rewrite_each(
    "raise_layer_norm", aten.layer_norm.default, one=raise_layer_norm, expect=lambda s, _: s.layer_norms
)
