"""A GGUF file as a checkpoint: Hugging Face's names, values dequantized or packed, rows in Hugging Face's order.

Source: the names and the order of rows that llama.cpp's converter writes,
https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py and convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seamwise.runtime.weights.files import StoredTensor

from .families import Family, family_of
from .file import GgufHeader, GgufTensor, read_gguf_header
from .joined import join
from .quants import KINDS, MXFP4_BLOCK, PACKED, mxfp4_parts

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
_EXPERT = re.compile(r"blk\.(\d+)\.(ffn_\w+)\.(\d+)\.weight")  # of files of early 2024: a tensor for each
_MOST_EXPERTS = 1 << 12  # of a layer: nothing real comes near, a damaged file may
# Part of the configuration, not weights.
ROPE_FACTORS = "rope_freqs.weight"
LONGROPE_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")


def read_gguf(path: Path) -> dict[str, StoredTensor]:
    """Open a GGUF file by Hugging Face's names; a tensor without one keeps its own.

    Raises ValueError naming the file for a damaged one, or for a model that is not served.
    """
    header = read_gguf_header(path)
    family = family_of(header.metadata, str(path))
    found: dict[str, StoredTensor] = {}
    for stored, tensor in header.tensors.items():
        if stored in (ROPE_FACTORS, *LONGROPE_FACTORS):
            continue
        name = huggingface_name(stored, family)
        for one, piece in _experts(name, tensor) or [(stored if "*" in name else name, tensor)]:
            found[one] = _stored(header, family, stored, piece)
    return join(found, str(path))


def huggingface_name(name: str, family: Family) -> str:
    """Return Hugging Face's name of a family's tensor, with a * for the number of an expert where it holds all of a
    layer's one after the other, or the name itself where there is none."""
    if (one := _EXPERT.fullmatch(name)) and "*" in (stacked := family.layer.get(f"{one[2]}_exps", "")):
        return f"model.layers.{one[1]}.{stacked.replace('*', one[3])}.weight"
    if not (found := _NAME.fullmatch(name)):
        return name
    layer, part, leaf = found.groups()
    known = (_OUTER if layer is None else family.layer).get(part)
    outer = "" if layer is None else f"model.layers.{layer}."
    if (whole := family.layer.get(f"{part}.{leaf}")) is not None:
        return f"{outer}{whole}"
    return name if known is None else f"{outer}{known}.{leaf}"


def _experts(name: str, tensor: GgufTensor) -> list[tuple[str, GgufTensor]]:
    """Return the experts that are stacked in a tensor, gate and up by themselves; none where it is no such one."""
    parts = ("gate_proj", "up_proj") if "gate_up_proj" in name else ("down_proj",)
    if "*" not in name or len(tensor.shape) != 3 or tensor.shape[1] % len(parts):
        return []
    E, rows, columns = tensor.shape
    each = replace(tensor, shape=(E * len(parts), rows // len(parts), columns))
    return [
        (name.replace("*", str(e)).replace("gate_up_proj", part), _slice(each, e * len(parts) + i))
        for e in range(min(E, _MOST_EXPERTS))
        for i, part in enumerate(parts)
    ]


def _slice(tensor: GgufTensor, i: int) -> GgufTensor:
    """Return one of the tensors that are stacked in another."""
    one = tensor.where.num_bytes // tensor.shape[0]
    where = replace(tensor.where, start=tensor.where.start + i * one, num_bytes=one)
    return replace(tensor, shape=tensor.shape[1:], where=where)


def _stored(header: GgufHeader, family: Family, name: str, tensor: GgufTensor) -> StoredTensor:
    kind, form = KINDS.get(tensor.kind), PACKED.get(tensor.kind)
    heads = _paired_heads(header.metadata, name) if family.paired else None
    if "ffn_gate_inp_shexp" in name and len(tensor.shape) == 1:
        tensor = replace(tensor, shape=(1, *tensor.shape))
    if heads is not None and (type(heads) is not int or heads < 1 or tensor.shape[0] % (2 * heads)):
        raise ValueError(f"{header.path}: {name} has {tensor.shape[0]} rows, which {heads!r} heads do not divide")

    def read() -> Tensor:
        raw = tensor.where.read()
        if heads is None:
            return raw
        return raw.view(heads, -1, 2, len(raw) // tensor.shape[0]).transpose(1, 2).flatten()

    less = 1 if family.one_more and name.endswith("norm.weight") else 0

    def load() -> Tensor:
        assert kind is not None
        values = kind.values(read()).view(tensor.shape)
        return values - less if less else values

    def load_packed(part: int) -> Tensor:
        assert kind is not None and form is not None
        return form.parts(read().view(-1, kind.num_bytes))[part].view(tensor.shape[0], -1)

    def load_mxfp4(part: int, shape: tuple[int, ...]) -> Tensor:
        return mxfp4_parts(read())[part].view(shape)

    packed = {}
    if form is not None and len(tensor.shape) == 2:
        stored = (torch.int32, 8) if form.format == "int4" else (torch.int8, 1)
        floats = (torch.float32, form.group)
        ends = {"_packed": stored, "_scale": floats} | ({"_offset": floats} if form.has_offset else {})
        for part, (end, (dtype, values)) in enumerate(ends.items()):
            packed[end] = StoredTensor(
                shape=(tensor.shape[0], tensor.shape[1] // values), stored_dtype=tensor.kind, dtype=dtype,
                load=partial(load_packed, part),
            )  # fmt: skip
    if tensor.kind == "MXFP4":
        scales = (*tensor.shape[:-1], tensor.shape[-1] // MXFP4_BLOCK)
        for part, (end, shape) in enumerate({"_blocks": (*scales, MXFP4_BLOCK // 2), "_scales": scales}.items()):
            packed[end] = StoredTensor(
                shape=shape, stored_dtype=tensor.kind, dtype=torch.uint8, load=partial(load_mxfp4, part, shape)
            )
    return StoredTensor(
        shape=tensor.shape, stored_dtype=tensor.kind, dtype=None if kind is None else kind.dtype, load=load,
        packed=packed,
    )  # fmt: skip


def _paired_heads(metadata: dict[str, Any], name: str) -> Any:
    """Return how many heads' rows of this tensor are in the order of pairs; None where they are not."""
    architecture = metadata.get("general.architecture")
    found = re.fullmatch(r"blk\.\d+\.attn_(q|k)\.(weight|bias)", name)
    if found is None:
        return None
    heads = metadata.get(f"{architecture}.attention.head_count")
    return heads if found[1] == "q" else metadata.get(f"{architecture}.attention.head_count_kv", heads)
