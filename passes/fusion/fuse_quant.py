"""Let the kernel that makes a tensor quantize it too: a pass for each such kernel.

before: y = op(…); q, s = quantize(y, dtype, group, scale)      y is read by nothing else
after:  q, s, … = op_quant(…, dtype, group, scale)
Saves one write and one read of y.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node, Proxy

from seamwise.kernels import (
    add_rms_norm,
    add_rms_norm_quant,
    allreduce_rms_norm,
    allreduce_rms_norm_quant,
    attention,
    attention_quant,
    quantize,
    rms_norm,
    rms_norm_quant,
    silu_mul,
    silu_mul_quant,
)  # fmt: skip
from seamwise.kernels.contract import Contract, contract_of
from seamwise.passes.graph import arguments, aten, inserting, is_getitem, is_op, replace_results, same_sizes, value
from seamwise.passes.promises import calls
from seamwise.passes.rewrite import Pass, Promise, rewrite_each

_RESHAPES = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim)


def quant_pass(
    name: str,
    producer: Contract,
    fused: Contract,
    *,
    result: int | None = None,
    others: tuple[tuple[int, int], ...] = (),
    wanted: Callable[[Node], bool] = lambda source: True,
    more: Callable[[Node, Callable[[Node], Proxy]], list[Any]] = lambda source, proxy: [],
    expect: Promise | None = None,
) -> Pass:
    """Return the pass that joins `quantize` to `producer` as `fused`, which takes both ops' arguments in order.

    result  which of the producer's results is quantized; None where it has one
    others  (producer's result, fused op's result) of those that stay
    wanted  which of the producer's nodes
    more    makes what else the fused op takes, before the producer's node
    """

    def candidate(node: Node) -> bool:
        source = _producer(node.args[0], producer, result)
        return source is not None and wanted(source)

    def fuse(node: Node) -> str | None:
        source = _producer(node.args[0], producer, result)
        assert source is not None
        if (reason := _other_rows(node, source) or _why_not(node, source)) is not None:
            return reason
        _replace(node, source, fused, others, more)
        return None

    return rewrite_each(name, quantize.op, one=fuse, wanted=candidate, expect=expect)


def _producer(made: Any, producer: Contract, result: int | None) -> Node | None:
    """Return the producer's node behind a quantized value, looking through reshapes, or None."""
    while is_op(made, *_RESHAPES):
        made = made.args[0]
    if result is not None:
        if not is_getitem(made) or made.args[1] != result:
            return None
        made = made.args[0]
    return made if is_op(made, producer.op) else None


def _other_rows(node: Node, source: Node) -> str | None:
    """Return how the rows quantized are not those that the producer makes, or None; a batch of one may be around."""
    shape, rows = value(node.args[0]).shape, _rows(source)  # type: ignore[arg-type]
    if same_sizes(shape, rows) or same_sizes(shape, (1, *rows)):
        return None
    return f"what is quantized has shape {tuple(shape)}, {source.name} makes rows {tuple(rows)}"


def _why_not(node: Node, source: Node) -> str | None:
    inner, reader = node.args[0], node
    while inner is not source:
        assert isinstance(inner, Node)
        if len(inner.users) > 1:
            return _extra(inner, reader)
        reader, inner = inner, inner.args[0]
    if not is_getitem(reader) and len(source.users) > 1:
        return _extra(source, reader)
    return None


def _extra(node: Node, reader: Node) -> str:
    return f"{node.name} has an extra user {next(u for u in node.users if u is not reader).name}, so it must be kept"


def _replace(
    node: Node, source: Node, fused: Contract, others: tuple[tuple[int, int], ...],
    more: Callable[[Node, Callable[[Node], Proxy]], list[Any]],
) -> None:  # fmt: skip
    with inserting(node.graph, source, like=source) as proxy:
        both = fused(*map(proxy, (*arguments(source), *arguments(node)[1:])), *more(source, proxy))
        results = [operator.getitem(both, i) for i in range(2)]
        if value(node.args[0]).dim() > len(_rows(source)):  # type: ignore[arg-type]  # a batch of one was added on the way
            results = [aten.unsqueeze.default(r, 0) for r in results]
        kept = {old: operator.getitem(both, new) for old, new in others}
    replace_results(node, dict(enumerate(results)))
    if kept:
        replace_results(source, kept)


def _rows(source: Node) -> tuple[Any, ...]:
    """Return the shape of what the fused op quantizes: attention's heads are columns of its rows."""
    made = value(source)
    shape = tuple(made.shape if isinstance(made, Tensor) else made[0].shape)
    return (*shape[:-2], shape[-2] * shape[-1]) if contract_of(source.target) is attention else shape


def _only_quantized(module: GraphModule) -> int:
    """Return how many norms of a sum give their rows to one `quantize` and nothing else: no head, no router."""
    rows = (item for norm in calls(module, add_rms_norm) for item in norm.users if item.args[1] == 0)
    return sum([is_op(reader, quantize.op) for reader in _readers(item)] == [True] for item in rows)


def _readers(node: Node) -> list[Node]:
    return [r for user in node.users for r in (_readers(user) if is_op(user, *_RESHAPES) else [user])]


FUSE_RMS_NORM_QUANT = quant_pass("fuse_rms_norm_quant", rms_norm, rms_norm_quant)
FUSE_ADD_RMS_NORM_QUANT = quant_pass(
    "fuse_add_rms_norm_quant", add_rms_norm, add_rms_norm_quant, result=0, others=((1, 2),),
    expect=lambda _, module: _only_quantized(module),
)  # fmt: skip
FUSE_ALLREDUCE_RMS_NORM_QUANT = quant_pass(
    "fuse_allreduce_rms_norm_quant", allreduce_rms_norm, allreduce_rms_norm_quant, result=0, others=((1, 2),)
)
FUSE_SILU_MUL_QUANT = quant_pass("fuse_silu_mul_quant", silu_mul, silu_mul_quant)
FUSE_ATTENTION_QUANT = quant_pass("fuse_attention_quant", attention, attention_quant)  # for the output projection
