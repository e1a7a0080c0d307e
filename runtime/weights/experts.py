"""Checkpoints that hold experts one by one, read as the stacked weights of a model.

stacked          model.layers.0.mlp.experts.gate_up_proj (E, 2·I, D) and .down_proj (E, D, I)
one by one       model.layers.0.mlp.experts.7.gate_proj.weight (I, D), .up_proj.weight, .down_proj.weight (D, I)
quantized        7.gate_proj.weight_scale and 7.up_proj.weight_scale are gate_up_proj_scale; so all parts
Mixtral's names  model.layers.0.block_sparse_moe.experts.7.w1.weight, .w3.weight, .w2.weight; .block_sparse_moe.gate
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from seamwise.compile.parameter import Parameter

from .files import StoredTensor

_EXPERT = re.compile(r"((?:.*\.)?experts)\.(\d+)\.(\w+)\.weight(|_scale|_scale_inv|_packed|_offset|_zero_point)")
_PARTS = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1), "down_proj": ("down_proj", 0)}
_OLDER_PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def stack_experts(
    found: Mapping[str, StoredTensor], parameters: Mapping[str, Parameter]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return a checkpoint's tensors with the model's stacked experts among them, and what is missing or does not fit.

    Tensors that no stacked parameter is made of stay as they are; so does a checkpoint that holds stacked experts.
    """
    kept: dict[str, StoredTensor] = {}
    parts: dict[str, dict[tuple[int, int], tuple[str, StoredTensor]]] = {}
    for stored_name, tensor in found.items():
        name = stored_name.replace(".block_sparse_moe.", ".mlp.")
        stacked, place = stacked_name(name)
        if stored_name in parameters or not (name in parameters or stacked in parameters):
            kept[stored_name] = tensor
        elif name in parameters:
            kept[name] = tensor
        else:
            parts.setdefault(stacked, {})[place] = (stored_name, tensor)
    problems: list[str] = []
    for stacked, pieces in parts.items():
        if wrong := _misfits(stacked, pieces, parameters[stacked].shape):
            problems += wrong
        kept[stacked] = _stack(pieces, parameters[stacked].shape)
    return kept, problems


def missing_experts(names: Iterable[str], parameters: Mapping[str, Parameter]) -> Iterator[tuple[list[str], list[str]]]:
    """Yield, of each stacked parameter that some of the names are parts of, these names and those that are missing."""
    parts: dict[str, dict[tuple[int, int], str]] = {}
    for name in names:
        stacked, place = stacked_name(name.replace(".block_sparse_moe.", ".mlp."))
        if name not in parameters and stacked in parameters:
            parts.setdefault(stacked, {})[place] = name
    for stacked, held in parts.items():
        yield (
            [*held.values()],
            [name for place, name in _wanted(stacked, parameters[stacked].shape).items() if place not in held],
        )


def _wanted(stacked: str, shape: tuple[int, ...]) -> dict[tuple[int, int], str]:
    """Return the names of the experts' weights that make up a stacked one, by expert and part."""
    owner, _, leaf = stacked.rpartition(".")
    named = [(n, part, leaf.removeprefix(into)) for n, (into, part) in _PARTS.items() if leaf.startswith(into)]
    return {(e, part): f"{owner}.{e}.{n}.weight{end}" for e in range(shape[0]) for n, part, end in named}


def stacked_name(name: str) -> tuple[str, tuple[int, int]]:
    """Return the stacked parameter that an expert's weight is part of, the expert, and which part it is."""
    match = _EXPERT.fullmatch(name)
    part = match and _PARTS.get(_OLDER_PARTS.get(match[3], match[3]))
    return (f"{match[1]}.{part[0]}{match[4]}", (int(match[2]), part[1])) if match and part else ("", (0, 0))


def _misfits(
    stacked: str, pieces: Mapping[tuple[int, int], tuple[str, StoredTensor]], shape: tuple[int, ...]
) -> list[str]:
    """Return why an expert's weights do not make up the stacked ones."""
    wanted = _wanted(stacked, shape)
    count = len(wanted) // shape[0]
    problems = [f"missing {name}, of {stacked}" for place, name in sorted(wanted.items()) if place not in pieces]
    one = (shape[1] // count, *shape[2:])
    first = next(iter(pieces.values()))[1]
    for place, (name, tensor) in pieces.items():
        if place not in wanted:
            problems.append(f"extra {name}")
        elif tensor.shape != one:
            problems.append(f"shape of {name} is {tensor.shape}, wanted {one}")
        elif tensor.dtype != first.dtype:
            problems.append(f"dtype of {name} is {tensor.stored_dtype}, other experts' is {first.stored_dtype}")
    return problems


def _stack(pieces: Mapping[tuple[int, int], tuple[str, StoredTensor]], shape: tuple[int, ...]) -> StoredTensor:
    first = next(iter(pieces.values()))[1]

    def read_part(dim: int, start: int, end: int) -> Tensor:
        part = torch.empty(*shape[:dim], end - start, *shape[dim + 1 :], dtype=first.dtype)
        for (expert, half), (_, tensor) in pieces.items():
            low, high = half * tensor.shape[0], (half + 1) * tensor.shape[0]
            if dim == 0 and start <= expert < end:
                part[expert - start, low:high] = tensor.load()
            elif dim == 1 and (top := max(start, low)) < (bottom := min(end, high)):
                part[expert, top - start : bottom - start] = tensor.load_part(0, top - low, bottom - low)
            elif dim == 2:
                part[expert, low:high] = tensor.load_part(1, start, end)
        return part

    return StoredTensor(
        shape=shape, stored_dtype=first.stored_dtype, dtype=first.dtype, load=lambda: read_part(0, 0, shape[0]),
        read_part=read_part,
    )  # fmt: skip
