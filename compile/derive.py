"""Derived tensors: what the graph computes from weights alone is hoisted out of the step and computed at load.

Each weight the step reads then has a recipe, a small expression over the checkpoint's parameters. Loading,
update_weights and packs all evaluate the same recipes; nothing else may transform a weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from seamwise.passes.graph import is_getitem, is_weight, sweep

from .capture import Captured

# {"weight": name}, or {"op": "aten.cat.default", "args": […recipes, numbers, {"dtype": …}…], "options": {…}}, where
# "getitem" takes one of the tensors that another op gives; or
# {"adapter": role, …}: memory for adapters, which no checkpoint holds, empty until the runner writes one
# (passes/add_adapters.py); or {"state": role, "values": …}: numbers that the runner changes, and what they begin as
# (passes/shard/balance_experts.py)
Recipe = dict[str, Any]


def hoist(captured: Captured) -> dict[str, Recipe]:
    """Move weight-only computation out of the graph, in place; return placeholder name -> recipe, in graph order."""
    graph = captured.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_weight(node):
            continue
        if all(is_weight(user) for user in node.users):
            continue  # an inner part of a larger derived tensor
        with graph.inserting_before(next(iter(graph.nodes))):
            placeholder = graph.placeholder(f"derived_{node.name}")
        placeholder.meta.update(val=node.meta["val"], weight=True, recipe=_recipe(node, captured.weights))
        node.replace_all_uses_with(placeholder)
    sweep(captured.module)
    recipes: dict[str, Recipe] = {}
    for node in list(graph.find_nodes(op="placeholder")):
        if node.meta.get("weight"):
            if node.users:
                recipes[node.name] = node.meta.get("recipe") or {"weight": captured.weights[node.name]}
            else:
                graph.erase_node(node)
    return recipes


def parameters_of(recipe: Recipe) -> set[str]:
    """Return the names of all parameters a recipe reads."""
    if "weight" in recipe:
        return {recipe["weight"]}
    if "adapter" in recipe or "state" in recipe:
        return set()
    return {name for argument in _flat(recipe["args"]) for name in parameters_of(argument)}


def evaluate(
    recipe: Recipe, parameter: Callable[[str], Tensor], part: Callable[[str, int, int, int], Tensor] | None = None
) -> Tensor:
    """Compute a derived tensor; `parameter(name)` gives the checkpoint's tensors.

    `part(name, dim, start, end)` gives a range of one, so that no more of it is read where a rank has a part.
    """
    if "weight" in recipe:
        return parameter(recipe["weight"])
    if "adapter" in recipe:
        return torch.zeros(recipe["shape"], dtype=getattr(torch, recipe["dtype"]))
    if "state" in recipe:
        return torch.tensor(recipe["values"], dtype=getattr(torch, recipe["dtype"]))
    if part is not None and recipe["op"] == "aten.slice.Tensor" and "weight" in recipe["args"][0]:
        source, dim, start, end = recipe["args"]
        return part(source["weight"], dim, start, end)
    result = _compute(recipe, parameter, part)
    assert isinstance(result, Tensor), f"a recipe of {recipe['op']} gives {type(result).__name__}"
    return result


def _compute(recipe: Recipe, *given: Any) -> Any:
    """Return what a recipe's op gives: a tensor, or several of which "getitem" takes one."""
    if recipe["op"] == "getitem":
        source, index = recipe["args"]
        return _compute(source, *given)[index]
    args = [_evaluate(a, *given) for a in recipe["args"]]
    options = {name: _evaluate(a, *given) for name, a in recipe.get("options", {}).items()}
    return resolve_op(recipe["op"])(*args, **options)


def resolve_op(name: str) -> Any:
    """Return the overload called `namespace.op.overload`."""
    namespace, op, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload)


def _evaluate(argument: Any, *given: Any) -> Any:
    if isinstance(argument, dict):
        return getattr(torch, argument["dtype"]) if "dtype" in argument else evaluate(argument, *given)
    return [_evaluate(a, *given) for a in argument] if isinstance(argument, list) else argument


def _flat(argument: Any) -> list[Recipe]:
    if isinstance(argument, list):
        return [r for a in argument for r in _flat(a)]
    return [argument] if isinstance(argument, dict) and "dtype" not in argument else []


def _recipe(node: Node, weights: dict[str, str]) -> Recipe:
    if node.op == "placeholder":
        hoisted: Recipe | None = node.meta.get("recipe")
        return hoisted or {"weight": weights[node.name]}
    name = "getitem" if is_getitem(node) else str(node.target)
    made: Recipe = {"op": name, "args": [_argument(a, weights) for a in node.args]}
    options = {name: _argument(a, weights) for name, a in node.kwargs.items()}
    assert not any(map(_flat, options.values())), f"{node.format_node()}: tensors are positional arguments"
    return made | ({"options": options} if options else {})


def _argument(argument: Any, weights: dict[str, str]) -> Any:
    if isinstance(argument, Node):
        return _recipe(argument, weights)
    if isinstance(argument, (list, tuple)):
        return [_argument(a, weights) for a in argument]
    if argument is None or isinstance(argument, (bool, int, float, str)):
        return argument
    if isinstance(argument, torch.dtype):
        return {"dtype": str(argument).removeprefix("torch.")}
    raise ValueError(f"derive: a recipe cannot hold {argument!r} ({type(argument).__name__})")
