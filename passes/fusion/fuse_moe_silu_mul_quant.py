"""Quantize in the kernel of the experts' gated activation; slots of no expert, the padding, are not read.

before: h = grouped_scaled_linear(…, order, …); y = silu_mul(h); q, s = quantize(y, dtype, group, scale)
after:  q, s = silu_mul_quant(h, dtype, group, scale, row)      row: each slot's expert, -1 where it has none here
Without expert parallelism every slot has an expert, and row is None. With it a rank of R has one slot in R, and reads
and computes that part of h only; the others' rows are zeros before and after.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node, Proxy

from seamwise.kernels import ep_dispatch, ep_dispatch_quant, grouped_scaled_linear, silu_mul, silu_mul_quant
from seamwise.passes.graph import aten, given, is_getitem, is_op
from seamwise.passes.promises import quantized_mlps

from .fuse_quant import quant_pass


def _of_experts(activation: Node) -> bool:
    return is_op(activation.args[0], grouped_scaled_linear.op)


def _row(activation: Node, proxy: Callable[[Node], Proxy]) -> list[Proxy | None]:
    """Return the op's last argument. Sharding numbers experts from the rank's first: others' are out of range."""
    order = given(given(activation).x_TI2).order_S
    chosen, experts, *mapped = order.args[0].args  # of moe_align
    # ep_dispatch gives -1 for them
    sent = is_getitem(chosen) and is_op(chosen.args[0], ep_dispatch.op, ep_dispatch_quant.op)
    if mapped or not (sent or is_op(chosen, aten.sub.Tensor)):
        return [None]
    slots = aten.reshape.default(proxy(chosen), [-1])
    if sent:
        return [slots]
    return [aten.masked_fill.Scalar(slots, aten.ge.Scalar(slots, experts), -1)]


FUSE_MOE_SILU_MUL_QUANT = quant_pass(
    "fuse_moe_silu_mul_quant", silu_mul, silu_mul_quant, wanted=_of_experts, more=_row,
    expect=lambda _, module: quantized_mlps(module),
)  # fmt: skip
