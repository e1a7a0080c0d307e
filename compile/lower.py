"""Lower: decide, for every contract in the graph, which provider runs it, by the contracts' own rule."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.fx import GraphModule

from seamwise.kernels.contract import CONTRACTS, Contract, contract_of
from seamwise.passes.graph import fake_values


def begun(target: Any) -> Contract | None:
    """Return the contract of which an op begins the exchange, or None."""
    space, _, name = str(target).partition(".")
    return CONTRACTS.get(name.removesuffix("_begin.default")) if space == "seamwise_exchange" else None


def choose_providers(module: GraphModule, requested: dict[str, str] | None = None) -> Counter[str]:
    """Mark each contract's node with its provider; return how often each "contract:provider" was chosen.

    requested  contract name -> provider that must be used. Raises ValueError when it cannot serve a call.
    """
    chosen: Counter[str] = Counter()
    for node in module.graph.nodes:
        record = contract_of(node.target)
        if (half := begun(node.target)) is not None:
            way = half.choose([*fake_values(node.args[:-1])], (requested or {}).get(half.name)).name
            node.args = (*node.args[:-1], way)
            chosen[f"{half.name}:{way}"] += 1
        if record is None:
            continue
        args = [*fake_values(node.args), *fake_values(node.kwargs).values()]
        provider = record.choose(args, (requested or {}).get(record.name))
        node.meta["provider"] = provider.name
        chosen[f"{record.name}:{provider.name}"] += 1
    return chosen
