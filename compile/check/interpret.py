"""Run a graph op by op, in one of three semantics, with every intermediate value in view.

reference   float64 throughout, each contract by its meaning: what a rewrite must not change
meaning     the graph's own dtypes, each contract by its meaning: eager torch
providers   the graph's own dtypes, each contract by the provider lowering chose, as the compiled program runs it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from seamwise.kernels.contract import contract_of

SEMANTICS = ("reference", "meaning", "providers")


def interpret(module: GraphModule, given: Callable[[Node], Any], semantics: str) -> Iterator[tuple[Node, Any]]:
    """Yield (node, value) for every call in order, at last (output node, results).

    `given(node)` is a placeholder's value. It is asked at the first use and let go after the last, so weights need not
    be in memory together.
    """
    nodes = list(module.graph.nodes)
    last: dict[Node, Node] = {}
    for node in nodes:
        for source in node.all_input_nodes:
            last[source] = node
    values: dict[Node, Any] = {}

    def get(node: Node) -> Any:
        if node not in values:
            values[node] = _widened(given(node), semantics)
        return values[node]

    for node in nodes:
        if node.op == "placeholder":
            continue
        args, kwargs = map_arg(node.args, get), map_arg(node.kwargs, get)
        if node.op == "output":
            yield node, args[0]
            return
        values[node] = _call(node, args, kwargs, semantics)
        yield node, values[node]
        for source in node.all_input_nodes:
            if last[source] is node:
                del values[source]


@torch.inference_mode()
def _call(node: Node, args: Any, kwargs: Any, semantics: str) -> Any:
    record = contract_of(node.target)
    if semantics == "reference":
        args, kwargs = _retyped(args), _retyped(kwargs)
    if record is None:
        assert callable(node.target), node.format_node()
        return node.target(*args, **kwargs)
    if semantics == "providers" and "provider" in node.meta:
        return record.run(node.meta["provider"], *args, *kwargs.values())
    return record.meaning(*args, **kwargs)


def _widened(value: Any, semantics: str) -> Any:
    if semantics == "reference" and isinstance(value, Tensor) and value.dtype in _PLAIN:
        return value.double()
    return value


_PLAIN = (torch.float16, torch.bfloat16, torch.float32)


def _retyped(argument: Any) -> Any:
    """Return an argument structure with each plain floating dtype as wide as can be; quantized types stay."""
    if isinstance(argument, torch.dtype):
        wide = torch.complex128 if argument == torch.complex64 else argument
        return torch.float64 if argument in _PLAIN else wide
    if isinstance(argument, (list, tuple)):
        return type(argument)(map(_retyped, argument)) if type(argument) in (list, tuple) else argument
    return {k: _retyped(v) for k, v in argument.items()} if isinstance(argument, dict) else argument
