"""How a published checkpoint's tensors become the parameters of a transformers class, by transformers' own rules.

Files keep the names, and the tensors, that a class had when they were published: renames, base-model prefixes, experts
one by one, joined projections. transformers undoes that when it loads, and so do we, with its own functions, tensor by
tensor as each is asked for.
Source: transformers/conversion_mapping.py and core_model_loading.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hf import class_and_config

Load = Callable[[str], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A parameter as it follows from tensors of a checkpoint. make: None where it is the one tensor as it is."""

    sources: tuple[str, ...]
    make: Callable[[Load], Tensor] | None


def made_by_transformers(
    architecture: str, raw: Mapping[str, Any], names: Iterable[str]
) -> tuple[dict[str, Made], set[str]]:
    """Return how a class's parameters follow from a checkpoint's tensors of these names, and which it ignores.

    A tensor that it knows no parameter for keeps its name.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    model_class, config = class_and_config(architecture, raw)
    with torch.device("meta"):
        model = model_class(config)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    ignore = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())]
    made: dict[str, Made] = {}
    collected: dict[str, tuple[Any, list[tuple[str, str]]]] = {}  # first parameter -> rule, (tensor, pattern) each
    ignored: set[str] = set()
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target not in state and pattern is not None:  # before 5.23 a converter takes names that go on, as _packed
            target, pattern = rename_source_key(name, renamings, [], prefix, state)
        if target in state and pattern is not None:
            collected.setdefault(target, (by_pattern[pattern], []))[1].append((name, pattern))
        elif target in state or not any(re.search(one, name) or re.search(one, target) for one in ignore):
            made[target] = Made(sources=(name,), make=None)
        else:
            ignored.add(name)
    for target, (rule, parts) in collected.items():
        for one in _targets(target, rule):
            made[one] = Made(
                sources=tuple(name for name, _ in parts), make=_converting(rule, target, one, parts, model)
            )
    return made, ignored


def _targets(first: str, rule: Any) -> list[str]:
    """Return the parameters that a rule makes at once: its patterns stand where the first one's does."""
    patterns = rule.target_patterns
    at = next((p for p in patterns if p in first), None)
    return [first] if at is None else [first.replace(at, one) for one in patterns]


def _converting(
    rule: Any, first: str, wanted: str, parts: list[tuple[str, str]], model: Any
) -> Callable[[Load], Tensor]:
    def make(load: Load) -> Tensor:
        fresh = deepcopy(rule)
        for name, pattern in parts:
            fresh.add_tensor(first, name, pattern, lambda name=name: load(name))
        results = fresh.convert(first, model=model, config=model.config)
        found = results[wanted]
        return found[0] if isinstance(found, list) else found

    return make
