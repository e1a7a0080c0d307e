"""Lower: decide, for every contract in the graph, which provider runs it, by the contracts' own rule."""

from __future__ import annotations

from collections import Counter

from torch.fx import GraphModule

from seamwise.kernels.contract import contract_of
from seamwise.passes.graph import fake_values


def choose_providers(module: GraphModule, requested: dict[str, str] | None = None) -> Counter[str]:
    """Mark each contract's node with its provider; return how often each "contract:provider" was chosen.

    requested  contract name -> provider that must be used. Raises ValueError when it cannot serve a call.
    """
    chosen: Counter[str] = Counter()
    for node in module.graph.nodes:
        record = contract_of(node.target)
        if record is None:
            continue
        args = [*fake_values(node.args), *fake_values(node.kwargs).values()]
        provider = record.choose(args, (requested or {}).get(record.name))
        node.meta["provider"] = provider.name
        chosen[f"{record.name}:{provider.name}"] += 1
    return chosen
