"""Generated code: one straight-line Python function for each distinct piece, and one for the whole step.

The text is what runs, what a pack stores and what a person reads:

    aten_reshape_default = torch.ops.aten.reshape.default
    add_rms_norm_cpp = provider("add_rms_norm", "cpp")

    def piece_1b00e58a(attention, getitem_1, w_0, ...):
        ...

    def step(run, w, token_ids, ...):
        linear, rope = run[0](token_ids, positions, w[0], w[1])
        kv_append_cpp(rope_1, reshape, kv_caches_0_0, kv_caches_0_1, slot_mapping)
"""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from seamwise.compile.check.awaited import begins
from seamwise.kernels.contract import CONTRACTS, contract_of
from seamwise.kernels.cpu import tape
from seamwise.passes.graph import value

from .split import Piece, Seam


class Source:
    """Collects functions and the names they need; `text()` is the whole module.

    in_turns  functions are written a second time, as generators that yield behind what `begins`: `NAME_in_turns`
    """

    def __init__(self, *, in_turns: bool = False) -> None:
        self.in_turns = in_turns
        self.turning: set[str] = set()
        self.prologue: dict[str, str] = {}
        self.functions: list[str] = []

    def text(self) -> str:
        header = [f"{name} = {expression}" for name, expression in sorted(self.prologue.items())]
        return "\n\n".join(["\n".join(header), *self.functions]) + "\n"

    def add_piece(self, name: str, piece: Piece) -> None:
        """Add `name(*inputs) -> tuple of outputs` for a lowered piece."""
        nodes = list(piece.module.graph.nodes)
        arguments = [n.name for n in nodes if n.op == "placeholder"]
        results = ", ".join(n.name for n in nodes[-1].args[0])
        if self.in_turns and any(map(begins, nodes)):
            self.turning.add(name)
        for end in ("", "_in_turns") if name in self.turning else ("",):
            body = self._body(nodes, keep={*arguments}, in_turns=bool(end))
            self.functions.append(f"def {name}{end}({', '.join(arguments)}):\n{body}    return ({results},)\n")

    def add_step(
        self, name: str, steps: Sequence[Piece | Seam], inputs: Sequence[str], index: Mapping[str, int],
        outputs: Sequence[str],
    ) -> None:  # fmt: skip
        """Add `name(run, w, *inputs) -> tuple`; `run[i]` is called for piece i, `index` is each weight's place in w."""
        lines, turns, number = list[str](), set[int](), 0
        last = _last_uses(steps, outputs)
        for i, item in enumerate(steps):
            if isinstance(item, Seam):
                lines.append(self._call(item.node, {n: f"w[{i}]" for n, i in index.items()}))
            else:
                arguments = ", ".join(f"w[{index[n]}]" if n in index else n for n in item.inputs)
                lines.append(f"{', '.join(item.outputs)}, = run[{number}]({arguments})")
                number += 1
                if f"piece_{item.digest}" in self.turning:
                    turns.add(len(lines) - 1)
            if dead := [n for n, j in last.items() if j == i and n not in index and n not in inputs]:
                lines.append(f"del {', '.join(dead)}")
        lines.append(f"return ({', '.join(outputs)},)")
        for end in ("", "_in_turns") if self.turning else ("",):
            for i in turns if end else ():
                lines[i] = lines[i].replace("= run[", "= yield from run[", 1)
            body = "".join(f"    {line}\n" for line in lines)
            self.functions.append(f"def {name}{end}(run, w, {', '.join(inputs)}):\n{body}")

    def _body(self, nodes: list[Node], keep: set[str], *, in_turns: bool = False) -> str:
        position = {n: i for i, n in enumerate(nodes)}
        last_use = {n: max((position[u] for u in n.users), default=-1) for n in nodes}
        lines = []
        for node in nodes:
            if node.op != "call_function":
                continue
            lines.append(self._call(node, {}))
            if in_turns and begins(node):
                lines.append("yield")
            dead = [n.name for n in node.all_input_nodes if n.name not in keep and last_use[n] == position[node]]
            if dead:
                lines.append(f"del {', '.join(dead)}")
        return "".join(f"    {line}\n" for line in lines)

    def _call(self, node: Node, rename: dict[str, str]) -> str:
        if node.target is operator.getitem:
            return f"{node.name} = {self._argument(node.args[0], {})}[{self._argument(node.args[1], {})}]"
        arguments = [self._argument(a, rename) for a in node.args]
        arguments += [f"{k}={self._argument(v, rename)}" for k, v in node.kwargs.items()]
        call = f"{self._target(node)}({', '.join(arguments)})"
        return f"{node.name} = {call}" if value(node) is not None else call

    def _target(self, node: Node) -> str:
        record = contract_of(node.target)
        if record is not None:
            name = f"{record.name}_{node.meta['provider']}"
            self.prologue[name] = f'provider("{record.name}", "{node.meta["provider"]}")'
        elif isinstance(node.target, torch._ops.OpOverload):
            name = str(node.target).replace(".", "_")
            self.prologue[name] = f"torch.ops.{node.target}"
        else:
            name = f"{node.target.__module__.lstrip('_')}_{node.target.__name__}"  # type: ignore[union-attr]
            self.prologue[name] = f"{node.target.__module__.lstrip('_')}.{node.target.__name__}"  # type: ignore[union-attr]
        return name

    def _argument(self, a: Any, rename: dict[str, str]) -> str:
        if isinstance(a, Node):
            return rename.get(a.name, a.name)
        if isinstance(a, (list, tuple)):
            return f"[{', '.join(self._argument(x, rename) for x in a)}]"
        if isinstance(a, torch.device):
            return f"torch.device({str(a)!r})"
        if a is None or isinstance(a, (bool, int, str, torch.dtype, torch.layout, torch.memory_format)):
            return repr(a)
        if isinstance(a, float):
            return f"float({str(a)!r})" if a != a or abs(a) == float("inf") else repr(a)
        raise ValueError(f"codegen: cannot write the argument {a!r} ({type(a).__name__})")


def _last_uses(steps: Sequence[Piece | Seam], outputs: Sequence[str]) -> dict[str, int]:
    last: dict[str, int] = {}
    for i, item in enumerate(steps):
        for name in item.inputs if isinstance(item, Piece) else [n.name for n in item.node.all_input_nodes]:
            last[name] = i
    return {n: i for n, i in last.items() if n not in outputs}


def calls_of(text: str, contracts: Collection[str]) -> list[dict[str, Any]]:
    """Return the arguments of every call of some contracts in generated text, by their names: values, or expressions.

    kv_caches_3_0 is the first cache of layer 3, as a string.
    """
    tree = ast.parse(text)
    providers: dict[str, str] = {}
    for line in tree.body:
        match line:
            case ast.Assign(
                targets=[ast.Name(name)],
                value=ast.Call(func=ast.Name("provider"), args=[ast.Constant(str(contract)), _]),
            ) if contract in contracts:
                providers[name] = contract
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in providers:
            names = inspect.signature(CONTRACTS[providers[node.func.id]].meaning).parameters
            found.append(dict(zip(names, map(_literal, node.args), strict=False)))
    return found


def _literal(node: ast.expr) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)


Around = Callable[[str, Callable[..., Any]], Callable[..., Any]]


def load(text: str, around: Around | None = None) -> dict[str, Any]:
    """Execute generated text and return its functions by name.

    around  is given each seam's contract and provider, and returns what the step calls in its place
    """
    namespace: dict[str, Any] = {"torch": torch, "operator": operator, "provider": partial(_provider, around)}
    exec(compile(text, "<seamwise generated>", "exec"), namespace)
    return namespace


def _provider(around: Around | None, contract: str, name: str) -> Any:
    record = CONTRACTS[contract]
    found = next(p for p in record.providers if p.name == name)
    call, launches = found.call, found.launches
    if around is not None and record.seam:
        call = around(contract, found.call)
        launches &= call is found.call
    if not record.seam and (launches or not record.reads_values):
        return call
    return partial(tape.call, call, seam=contract if record.seam else "", launches=launches)
