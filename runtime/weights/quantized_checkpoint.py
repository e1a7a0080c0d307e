"""Checkpoints that are published quantized: which tensors hold which of a model's weights, by its quantization_config.

A tensor weight_shape is not read: it repeats what config.json says.
"""

from __future__ import annotations

import math
import re

import torch
from torch import nn

from seamwise.passes import Held, StoredWeight

from .quantization_rules import Quantization, Rule

_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8, "int4": torch.int32}
_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def stored_weights(quantization: Quantization, model: nn.Module) -> dict[str, StoredWeight]:
    """Return name -> form of each weight of a model that its checkpoint holds quantized.

    Experts' weights are stacked in the model, and linear layers one by one to the configuration. Raises ValueError
    for a target that names no linear layer, and for experts that are not all stored alike, or not as blocks.
    """
    stored: dict[str, StoredWeight] = {}
    tied, met = _shared(model), set()
    for name, module in model.named_modules():
        classes = {c.__name__ for c in type(module).__mro__} | {getattr(module, "published_class", "Module")}
        weight = getattr(module, "weight", None)
        own_linear = "Linear" in classes and id(weight) not in tied
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            rule, targets = _rule_of(quantization, name, classes)
            if own_linear or name in targets:  # a tied head is stored as the embedding: where that is named
                met |= targets
                stored |= {n: _stored(n, weight.shape, rule) for n in (f"{name}.weight",) if rule}
        for leaf, parts in _EXPERT_PARTS.items():
            weight = getattr(module, leaf, None)
            if isinstance(weight, nn.Parameter) and weight.dim() == 3:
                each = [f"{name}.{e}.{part}" for e in range(weight.shape[0]) for part in parts]
                found = [_rule_of(quantization, f"{name}.{leaf}", set())]
                if f"{name}.{leaf}" not in found[0][1]:  # a GGUF file names all of them as one
                    found = [_rule_of(quantization, one, {"Linear", "Module"}) for one in each]
                met |= {target for _, targets in found for target in targets}
                if any(rule is not found[0][0] for rule, _ in found):
                    raise ValueError(f"quantization_config: experts of {name} are not all stored alike; wanted so")
                if (rule := found[0][0]) is not None:
                    stored[f"{name}.{leaf}"] = _stored(f"{name}.{leaf}", weight.shape, rule, len(parts))
    for target in [t for rule in quantization.rules for t in rule.targets if t not in met]:
        raise ValueError(f"quantization_config: target {target!r} names no linear layer of {type(model).__name__}")
    return stored


def _rule_of(quantization: Quantization, name: str, classes: set[str]) -> tuple[Rule | None, set[str]]:
    """Return the rule that holds for a layer, if any, and every target that names it."""
    if any(_specific(one, name, classes) for one in quantization.ignored):
        return None, set()
    named = [(_specific(t, name, classes), rule, t) for rule in quantization.rules for t in rule.targets]
    named = [one for one in named if one[0]]
    return max(named, key=lambda one: one[0])[1] if named else None, {target for _, _, target in named}


def _specific(target: str, name: str, classes: set[str]) -> int:
    """Return how specifically a target names a module: 3 by its name, 2 by a pattern, 1 by its class, 0 not at all."""
    if target.startswith("re:"):
        return 2 * bool(re.match(target.removeprefix("re:"), name))
    return 3 if target == name else int(target in classes)


def _shared(model: nn.Module) -> set[int]:
    """Return the ids of parameters that several modules share: a tied head is the embedding."""
    owners = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    return {one for one in owners if owners.count(one) > 1} if len(set(owners)) < len(owners) else set()


def _stored(name: str, shape: torch.Size, rule: Rule, parts: int = 1) -> StoredWeight:
    """Return how a weight (N, K), or experts' (E, N, K) of `parts` projections each, is held.

    Raises ValueError where stacked experts cannot be.
    """
    (*experts, N, K), scheme = shape, rule.scheme
    rows, columns, packed = scheme.rows, scheme.columns, scheme.format == "int4"
    words = 8 if rule.has_zero and packed else 1  # rows of zero points in a word
    if experts and (rule.has_input_scale or not rows or N // parts % math.lcm(rows, words)):
        raise ValueError(
            f"quantization_config: {name}, experts of {N // parts} rows in {rule}, is not served; wanted channels,"
            " groups, or blocks and words of zero points that divide the rows, and no input scales"
        )
    scales = (*experts, -(-N // rows) if rows else 1, -(-K // columns) if columns else 1) if rows or columns else (1,)
    zero = None
    if rule.has_offset:
        zero = Held(f"{name}_offset", scales, torch.float32)
    elif rule.has_zero:
        form = ((*experts, -(-N // 8), scales[-1]), torch.int32) if packed else (scales, torch.int8)
        zero = Held(f"{name}_zero_point", *form)
    return StoredWeight(
        scheme=scheme,
        stored=Held(f"{name}{rule.stored}", (*experts, N, -(-K // 8) if packed else K), _DTYPES[scheme.format]),
        scale=Held(f"{name}{rule.scale}", scales),
        zero=zero,
        input_scale=Held(f"{name.removesuffix('weight')}input_scale", (1,)) if rule.has_input_scale else None,
        quantizes_input=rule.quantizes_input,
    )
