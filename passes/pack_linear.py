"""Pack the weights of linear layers where a kernel wants them packed.

before: y = linear(x, w, bias)
after:  y = linear_packed(x, pack_linear(w), N, bias)      pack_linear(w) is a derived tensor: computed at load
before: y = w4a16_linear(x, q, scale, zero, group, bias)
after:  y = linear_int(x, pack_int_panels(q), scale', -zero · scale', group, N, bias)   (an offset stays as it is)
before: y = scaled_linear(xq, xs, q, s, dtype, bias)          float8; grouped_scaled_linear likewise, as one weight
after:  y = linear_int(xq, pack_int_panels(q), s', None, group, N, bias, xs, dtype)    s': a row's blocks have its scale
before: y = grouped_linear(x, w, order, starts, K, bias)
after:  y = grouped_linear_packed(x, pack_linear(flatten(w)), N, order, starts, K, bias)
before: x = gather_rows(w, ids); y = linear(x', w)
after:  p = pack_linear(w); x = gather_packed_rows(p, ids, V, D); y = linear_packed(x', p, V) (one weight, held once)
Fires where the packed op has a kernel for the layer's device and dtype; elsewhere the weight is read as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from seamwise.kernels import (
    gather_packed_rows,
    gather_rows,
    grouped_linear,
    grouped_linear_int,
    grouped_linear_packed,
    grouped_scaled_linear,
    linear_int,
    linear_packed,
    pack_group_values,
    pack_int_panels,
    pack_linear,
    scaled_linear,
    w4a16_linear,
)
from seamwise.kernels.contract import Contract
from seamwise.kernels.linear.linear import PANEL
from seamwise.kernels.linear.scaled_linear import BLOCK
from seamwise.kernels.signature import WrongArguments, cdiv

from .graph import arguments, aten, fake_values, given, inserting, is_op, is_weight, replace, replace_by, value
from .rewrite import Pass, Report, each_call


def pack(module: GraphModule, report: Report) -> None:
    """Rewrite every linear layer over a weight for which a packed kernel exists; the others are misses."""
    tied = filter(_is_tied, module.graph.find_nodes(op="call_function", target=gather_rows.op))
    shared = dict(_gather_packed(node) for node in list(tied))  # weights that are packed already, for an embedding
    rules: dict[Any, Callable[[Node], str | None]] = {
        aten.linear.default: partial(_pack_plain, shared), w4a16_linear.op: _pack_int, grouped_linear.op: _pack_experts,
        scaled_linear.op: _pack_float8, grouped_scaled_linear.op: _pack_float8,
    }  # fmt: skip
    layers = [node for node in module.graph.nodes if is_op(node, *rules)]
    each_call(layers, lambda node: rules[node.target](node), report)


def _pack_plain(shared: Mapping[Node, Node], node: Node) -> str | None:
    if (reason := _why_not(node)) is not None:
        return reason
    weight, bias = given(node).weight, given(node).bias

    def made(of: Any) -> Any:
        packed = of(shared[weight]) if weight in shared else pack_linear(of(weight))
        biases = [] if bias is None else [of(bias)]
        return linear_packed(of(given(node).input), packed, value(weight).shape[0], *biases)

    replace_by(node, made)
    return None


def _is_tied(node: Node) -> bool:
    """Return whether a table of embeddings is packed for a linear layer anyhow, and read by nothing else."""
    table, index = node.args
    if not (isinstance(table, Node) and isinstance(index, Node) and is_weight(table)):
        return False
    readers = [u for u in table.users if is_op(u, aten.linear.default) and given(u).weight is table]
    linears = [u for u in readers if _why_not(u) is None]
    packed = [pack_linear.meaning(value(table)), value(index), *value(table).shape]
    return 0 < len(linears) == len(table.users) - 1 and unserved(gather_packed_rows, packed) is None


def _gather_packed(node: Node) -> tuple[Node, Node]:
    """Read an embedding's rows from its packed table; return the table and what packs it."""
    table: Any = node.args[0]
    index = node.args[1]
    with inserting(node.graph, node, like=node) as proxy:
        packed = pack_linear(proxy(table))
        rows = gather_packed_rows(packed, proxy(index), *value(table).shape)
    replace(node, rows.node)
    return table, packed.node


def _why_not(node: Node) -> str | None:
    x, weight, bias = given(node).input, given(node).weight, given(node).bias
    if not is_weight(weight):
        return "its weight is computed in the step"
    w = value(weight)
    if reason := unserved(pack_linear, [w]):
        return f"no kernel packs {w.dtype} on {w.device.type}: {reason}"
    arguments = [value(x), pack_linear.meaning(w), w.shape[0], *([] if bias is None else [value(bias)])]
    reason = unserved(linear_packed, arguments)
    return reason and f"no kernel takes its input: {reason}"


def int_arguments(
    shape: tuple[int, int], is_point: bool, x: Any, packed: Any, scale: Any, zero: Any, group: int, bias: Any
) -> Any:
    """Return the arguments of `linear_int` for those of `w4a16_linear` over a weight of this shape."""
    offset = aten.neg.default(aten.mul.Tensor(zero, scale)) if is_point else zero
    offsets = None if offset is None else pack_group_values(offset)
    return x, pack_int_panels(packed, shape[1]), pack_group_values(scale), offsets, group, shape[0], bias


def _pack_int(node: Node) -> str | None:
    known: Any = fake_values(arguments(node))
    shape = (known[1].shape[0], known[0].shape[-1])
    is_point = known[3] is not None and not known[3].is_floating_point()
    return replaced_by(node, linear_int, lambda *args: int_arguments(shape, is_point, *args))


def _pack_experts(node: Node) -> str | None:
    _, weight, *_ = arguments(node)

    def packed_arguments(x: Any, w: Any, *rest: Any) -> Any:
        return x, pack_linear(aten.flatten.using_ints(w, 0, 1)), value(weight).shape[1], *rest

    if not is_weight(weight):
        return "its weights are computed in the step"
    return replaced_by(node, grouped_linear_packed, packed_arguments)


def _pack_float8(node: Node) -> str | None:
    if not is_weight(arguments(node)[2]):
        return "its weight is computed in the step"
    _, _, weight, scales, *_ = fake_values(arguments(node))
    (*experts, N, K), (*_, blocks, groups) = weight.shape, scales.shape
    if weight.dtype != torch.float8_e4m3fn:
        return f"torch multiplies {weight.dtype} as it is"
    own, panels = blocks == N and N > 1, cdiv(N, PANEL)

    def packed_arguments(x: Any, x_scale: Any, w: Any, scale: Any, *rest: Any) -> Any:
        if not own:  # panels that share a scale: of a block, or of all
            repeated = aten.repeat_interleave.self_int(scale, panels if blocks == 1 else BLOCK // PANEL, -2)
            scale = aten.slice.Tensor(repeated, -2, 0, panels)
        w, scale = (aten.flatten.using_ints(t, 0, 1) if experts else t for t in (w, scale))
        scales = pack_group_values(scale) if own else aten.unsqueeze.default(aten.clone.default(scale), -1)
        *routes, dtype, bias = rest
        layer = x, pack_int_panels(w, K), scales, None, BLOCK if groups > 1 else 0, N
        return *layer, *routes, bias, x_scale, dtype

    return replaced_by(node, grouped_linear_int if experts else linear_int, packed_arguments)


def replaced_by(node: Node, record: Contract, packed_arguments: Callable[..., Any], *of: Any) -> str | None:
    """Replace a node by another op, of arguments made `of` nodes (its own), or return why no kernel takes them."""
    made_of = of or arguments(node)
    if (reason := unserved(record, packed_arguments(*fake_values(made_of)))) is None:
        replace_by(node, lambda proxy: record(*packed_arguments(*map(proxy, made_of))))
    return reason


def unserved(record: Contract, arguments: Any) -> str | None:
    """Return why no kernel of an op takes these arguments, or None."""
    try:
        if record.choose(arguments).call is not record.meaning:
            return None
    except WrongArguments as error:  # the op has limits that the plain layer has not: experts of whole panels
        return str(error)
    reasons = (record.why_not(p, arguments) for p in record.providers[:-1])
    return next((r for r in reasons if r), "no kernel is registered")


PACK_LINEAR = Pass(name="pack_linear", rewrite=pack)
