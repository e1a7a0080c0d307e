"""Capture: one functional ATen graph of the whole model, symbolic in its dynamic sizes, with zero guards.

Source: torch.export, https://docs.pytorch.org/docs/stable/export.html (non-strict mode).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx.config
from torch import Tensor, nn
from torch.export import Dim
from torch.export.graph_signature import InputKind
from torch.fx.experimental import _config as fx_config

_READS_VALUES = "computes with values of tensors on the host, which a recorded step cannot"
DimNames = Mapping[str, tuple[str | None, ...] | list[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Captured:
    """The graph of one model.

    module   the FX graph; its placeholders are, in order, the parameters and buffers read, then the step's inputs
    weights  placeholder name -> name of the parameter or buffer in the captured module
    inputs   placeholder names of the step's inputs, in the order of the flattened arguments
    constants  tensors that the model's code makes of numbers, by their names in weights
    """

    module: torch.fx.GraphModule
    weights: dict[str, str]
    inputs: tuple[str, ...]
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def graph(self) -> torch.fx.Graph:
        return self.module.graph

    def with_input(self, name: str, val: Tensor, **meta: Any) -> Captured:
        """Return the same with one more input, the first, of a fake value, that nothing reads yet."""
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            node = self.graph.placeholder(name)
        node.meta.update(val=val, **meta)
        return replace(self, inputs=(node.name, *self.inputs))

    def copy(self) -> Captured:
        """Return the same on a graph of its own."""
        graph, known = torch.fx.Graph(), dict[torch.fx.Node, torch.fx.Node]()
        graph.output(graph.graph_copy(self.graph, known))
        for node in known.values():  # what a node remembers of others is of the new graph too
            node.meta = {k: known[v] if isinstance(v, torch.fx.Node) else v for k, v in node.meta.items()}
        module = torch.fx.GraphModule(torch.nn.Module(), graph)
        return Captured(module=module, weights=dict(self.weights), inputs=self.inputs, constants=self.constants)


@contextmanager
def _without_stacks() -> Iterator[None]:
    """Let a trace keep no stack at each node: nothing reads it, and it is a tenth of a compilation.

    torch 2.11 keeps them whatever this option says.
    """
    before = getattr(torch.fx.config, "do_not_emit_stack_traces", False)
    torch.fx.config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        torch.fx.config.do_not_emit_stack_traces = before


def capture(model: nn.Module, arguments: Mapping[str, Any], dims: DimNames) -> Captured:
    """Trace `model(**arguments)` once and return its graph.

    arguments  example step inputs; no dynamic size may be 0 or 1 in them
    dims       argument name -> the name of each dynamic dimension, None where static; equal names are equal sizes, and
               "R+1" is one more than "R".
               For a list argument: one such entry for each leaf, nested alike.

    Raises ValueError when the model's code restricts a dynamic size (a guard): such a graph would be wrong for other
    sizes, so it is refused here rather than recompiled later.
    """
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # and SymPy, slowly

    symbols: dict[str, Any] = {}

    def spec(names: Any) -> Any:
        if isinstance(names, list):
            return [spec(n) for n in names]
        return {i: size(n) for i, n in enumerate(names) if n is not None}

    def size(name: str) -> Any:
        base, _, more = name.partition("+")
        known = symbols.setdefault(base, Dim(base, min=1, max=1 << 31))
        return known + int(more) if more else known

    shapes = {name: spec(dims[name]) for name in arguments}
    try:
        with torch.no_grad(), _without_stacks(), fx_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
            exported = torch.export.export(model, (), dict(arguments), dynamic_shapes=shapes, strict=False)
    except torch._dynamo.exc.UserError as error:
        raise ValueError(
            f"capture: {type(model).__name__} restricts a size that must stay dynamic ({', '.join(symbols)}): {error}"
        ) from error
    except GuardOnDataDependentSymNode as error:
        raise ValueError(f"capture: {type(model).__name__} {_READS_VALUES}: {error}") from error
    if any(n.users for n in exported.graph.find_nodes(op="call_function", target=torch.ops.aten.item.default)):
        raise ValueError(f"capture: {type(model).__name__} {_READS_VALUES} (item, tolist)")
    weights: dict[str, str] = {}
    constants: dict[str, Tensor] = {}
    inputs: list[str] = []
    module = exported.graph_module
    placeholders = {n.name: n for n in module.graph.find_nodes(op="placeholder")}
    for entry in exported.graph_signature.input_specs:
        name = entry.arg.name
        if entry.kind is InputKind.USER_INPUT:
            inputs.append(name)
        else:
            assert entry.target is not None
            weights[name] = entry.target
            if entry.kind is InputKind.CONSTANT_TENSOR:
                constants[entry.target] = exported.constants[entry.target]
            placeholders[name].meta["weight"] = True
    unify_tied(model, module, weights)
    return Captured(module=module, weights=weights, inputs=tuple(inputs), constants=constants)


def unify_tied(model: nn.Module, module: torch.fx.GraphModule, weights: dict[str, str]) -> None:
    """Let every use of one tensor (tied embeddings) read one placeholder, the first."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    first: dict[int, torch.fx.Node] = {}
    for node in list(module.graph.find_nodes(op="placeholder")):
        tensor = tensors.get(weights.get(node.name, ""))
        if not isinstance(tensor, Tensor):
            continue
        kept = first.setdefault(id(tensor), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            module.graph.erase_node(node)
            del weights[node.name]
