"""Which layers of a captured model need the same of a request's past; each group of them gets a block table of its own.

before: kv_append(k, v, *kv_caches[1], slot_mapping); attention(q, *kv_caches[1], block_table, …, window=128)
after:  kv_append(k, v, *kv_caches[1], slot_mapping_1); attention(q, *kv_caches[1], block_table_1, …, window=128)

Groups are equally long, so that a block of any of them takes as much memory; a kind with more layers has several.
Source: as in vLLM's hybrid cache, https://docs.vllm.ai/en/latest/design/hybrid_kv_cache_manager.html
"""

from __future__ import annotations

import logging
from dataclasses import replace

from torch.fx import Node

from seamwise.passes.graph import given, value

from .capture import Captured
from .program import CacheGroup

_LOG = logging.getLogger(__name__)
_PER_GROUP = ("slot_mapping", "block_table")  # inputs of the step of which each group has its own


def group_caches(captured: Captured, num_layers: int) -> tuple[Captured, list[CacheGroup]]:
    """Let each group of layers of a graph, changed in place, read its own inputs; return it and the groups.

    Further groups' inputs stand last: slot_mapping_1, block_table_1, slot_mapping_2, … A model whose layers all need
    the same, or cache tensors of different shapes, stays as it is.
    """
    users, windows, latent = _of_layers(captured)
    kinds: dict[int, list[int]] = {}
    for layer in range(num_layers):
        kinds.setdefault(windows.get(layer, 0), []).append(layer)
    shapes = {tuple(value(n).shape[1:] for n in _caches(captured, layer)) for layer in range(num_layers)}
    if len(kinds) == 1 or len(shapes) > 1:
        if len(kinds) > 1:
            _LOG.info("layers cache tensors of different shapes: one group keeps all tokens, whatever their windows")
        window = next(iter(kinds)) if len(kinds) == 1 else 0
        return captured, [CacheGroup(window=window, latent=latent, layers=tuple(range(num_layers)))]
    fewest, most = min(map(len, kinds.values())), max(map(len, kinds.values()))
    size = most if 4 * most <= 5 * fewest else fewest  # a few unused places cost less than a table
    groups = [
        CacheGroup(window=window, latent=latent, layers=tuple(layers[i : i + size]))
        for window, layers in sorted(kinds.items())
        for i in range(0, len(layers), size)
    ]
    inputs = list(captured.inputs)
    for number, group in enumerate(groups[1:], start=1):
        for name in _PER_GROUP:
            given = next(n for n in captured.graph.find_nodes(op="placeholder") if n.name == name)
            with captured.graph.inserting_after(captured.graph.find_nodes(op="placeholder")[-1]):
                own = captured.graph.placeholder(f"{name}_{number}")
            own.meta = dict(given.meta)
            inputs.append(own.name)
            for user in {user for layer in group.layers for user in users[layer]}:
                user.replace_input_with(given, own)
    return replace(captured, inputs=tuple(inputs)), groups


def _caches(captured: Captured, layer: int) -> list[Node]:
    start = f"kv_caches_{layer}_"
    return [n for n in captured.graph.find_nodes(op="placeholder") if n.name.startswith(start)]


def _of_layers(captured: Captured) -> tuple[dict[int, list[Node]], dict[int, int], bool]:
    """Return the ops on each layer's cache, the windows (below 0: chunks) of layers where no op sees more, and whether
    any is latent."""
    users: dict[int, list[Node]] = {}
    windows: dict[int, list[int]] = {}
    latent = False
    for cache in captured.graph.find_nodes(op="placeholder"):
        if not cache.name.startswith("kv_caches_"):
            continue
        layer = int(cache.name.split("_")[2])
        for user in cache.users:
            named = vars(given(user))  # every reader is a contract's op
            users.setdefault(layer, []).append(user)
            latent |= "cache" in named
            if "block_table_RB" in named:  # else it writes
                windows.setdefault(layer, []).append(named.get("window", 0))
    alike = {layer: seen for layer, seen in windows.items() if min(seen) > 0 or len({*seen}) == 1}  # else it needs all
    return users, {layer: max(seen) for layer, seen in alike.items() if any(seen)}, latent
