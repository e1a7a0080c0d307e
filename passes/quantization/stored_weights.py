"""Let the graph read weights as their checkpoint stores them: quantized, beside their scales.

before: y = linear(x, w, bias)
after:  y = linear(x, dequantize_weight(stored, scale, zero, …), bias)      weights of the graph: what the file holds
Nothing is saved yet: `quantize_linear` gives the layer a kernel that reads the stored weight, or says why not; then the
dequantized one is computed at load.
Source: https://github.com/vllm-project/compressed-tensors, whose layouts these are; DeepSeek-V3's blocks,
https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from torch.fx import GraphModule, Node, Proxy

from seamwise.kernels import dequantize_weight
from seamwise.passes.graph import aten, inserting, value
from seamwise.passes.rewrite import Pass, Report

from .quantize_weights import Scheme


@dataclass(frozen=True, slots=True)
class Held:
    """A tensor that a checkpoint holds; dtype None: any floating dtype, and the values are computed with in that."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeight:
    """How a checkpoint holds a weight (N, K), or experts' stacked ones (E, N, K): in a scheme, as these tensors.

    scale        one for each block of the scheme, or (1,) for the whole
    zero         int8 of the scale's shape, for int4 int32 (⌈N/8⌉, …), packed along N; or float32, an offset
    input_scale  (1,), what the layer's input is divided by; without, each row or group by its own
    quantizes_input  whether the layer's input is quantized too
    """

    scheme: Scheme
    stored: Held
    scale: Held
    zero: Held | None = None
    input_scale: Held | None = None
    quantizes_input: bool = False

    @property
    def tensors(self) -> dict[str, Held]:
        """Return what is held, by the names of these fields."""
        held = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in held.items() if isinstance(tensor, Held)}


def stored_weights(stored: Mapping[str, StoredWeight], names: dict[str, str]) -> Pass:
    """Return the pass for these parameters; `names`, placeholder -> the checkpoint's name, is kept true."""

    def rewrite(module: GraphModule, report: Report) -> None:
        for node in list(module.graph.find_nodes(op="placeholder")):
            if (held := stored.get(names.get(node.name, ""))) is not None:
                _replace(module, node, held, names)
                report.matched += 1

    return Pass(name="stored_weights", rewrite=rewrite, expect=lambda s, _: len(stored))


def _replace(module: GraphModule, node: Node, held: StoredWeight, names: dict[str, str]) -> None:
    graph, like = module.graph, value(node)
    placeholders = {}
    with graph.inserting_before(node), like.fake_mode:
        for role, tensor in held.tensors.items():
            made = graph.placeholder(f"{node.name}_{role}")
            fake = torch.empty(tensor.shape, dtype=tensor.dtype or like.dtype, device=like.device)
            made.meta.update(val=fake, weight=True, parameter=tensor.name)
            placeholders[role], names[made.name] = made, tensor.name
    # `quantize_linear` reads from the stored weight how the layer's input is quantized: no op says it until then.
    placeholders["stored"].meta.update(
        quantizes_input=held.quantizes_input, input_scale=placeholders.get("input_scale")
    )
    first = next(n for n in graph.nodes if n.op != "placeholder")
    with inserting(graph, first, like=node) as proxy:
        weight, scale, zero = (proxy(placeholders[r]) if r in placeholders else None for r in _DEQUANTIZED)
        (*experts, N, K), scheme = like.shape, held.scheme
        if zero is not None and held.zero is not None and held.zero.dtype == torch.int32:
            zero = _unpacked(zero, N)
        if len(held.scale.shape) == 1:
            scale, zero = (None if t is None else aten.reshape.default(t, [1, 1]) for t in (scale, zero))
        if experts:  # as one weight: their blocks do not cross from one to the next
            flat = (None if t is None else aten.flatten.using_ints(t, 0, 1) for t in (weight, scale, zero))
            weight, scale, zero = flat
        form = (scheme.format, scheme.rows, scheme.columns)
        plain = dequantize_weight(weight, scale, zero, *form, K, like.dtype)
        plain = aten.reshape.default(plain, like.shape) if experts else plain
    node.replace_all_uses_with(plain.node)
    del names[node.name]
    graph.erase_node(node)


_DEQUANTIZED = ("stored", "scale", "zero")


def _unpacked(zero: Proxy, rows: int) -> Proxy:
    """Return int4 zero points (…, N, G) as int8, of int32 (…, ⌈N/8⌉, G): a recipe has no ranges, hence the shifts."""
    shifted = [aten.__rshift__.Scalar(zero, 4 * i) for i in range(8)]
    nibbles = aten.bitwise_and.Scalar(aten.stack.default(shifted, -2), 15)
    values = aten.sub.Scalar(aten.flatten.using_ints(nibbles, -3, -2), 8)
    return aten.to.dtype(aten.slice.Tensor(values, -2, 0, rows), torch.int8)
