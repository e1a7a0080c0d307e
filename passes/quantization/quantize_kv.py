"""Let layers cache keys and values in float8: divided by a scale where they are written, times it where they are read.

before: kv_append(k, v, k_cache, v_cache, slots); o = attention(q, k_cache, v_cache, …)       caches float8_e4m3fn
after:  kv_append(…, k_scale, v_scale); o = attention(…, k_scale, v_scale)      scales (1,) float32, weights
The ops of latent attention have one cache, and so one scale.
Source: https://docs.vllm.ai/en/latest/features/quantization/quantized_kvcache.html.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from seamwise.passes.graph import given, place, value
from seamwise.passes.rewrite import Pass, Report

_SCALES = {"k_cache": "k_scale", "v_cache": "v_scale", "cache": "cache_scale"}  # names of arguments


def quantize_kv(names: dict[str, str]) -> Pass:
    """Return the pass; `names`, placeholder -> weight, gains a scale for each cache: "…self_attn.k_scale"."""

    def rewrite(module: GraphModule, report: Report) -> None:
        caches = [n for n in module.graph.find_nodes(op="placeholder") if value(n).dtype == torch.float8_e4m3fn]
        report.expected, scales = len(caches), dict[Node, Node]()
        for node in list(module.graph.nodes):
            schema = getattr(node.target, "_schema", None)
            if schema is None or not any(n in caches for n in node.all_input_nodes):
                continue
            named = vars(given(node))
            for cache_name, scale_name in _SCALES.items():
                if scale_name in named and (cache := named[cache_name]) in caches:
                    if cache not in scales:
                        scales[cache] = _scale(module, cache, f"{place(node)}.{scale_name}", names)
                    named[scale_name] = scales[cache]
            node.args = tuple(named.values())
        report.matched = len(scales)

    return Pass(name="quantize_kv", rewrite=rewrite)


def _scale(module: GraphModule, cache: Node, weight: str, names: dict[str, str]) -> Node:
    with module.graph.inserting_before(next(iter(module.graph.nodes))), value(cache).fake_mode:
        made = module.graph.placeholder(f"scale_of_{cache.name}")
        made.meta.update(val=torch.empty(1, dtype=torch.float32, device=value(cache).device), weight=True)
    names[made.name] = weight
    return made
