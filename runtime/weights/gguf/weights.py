"""A GGUF file as a checkpoint: Hugging Face's names, values dequantized or packed, rows in Hugging Face's order.

Source: the names and the order of rows that llama.cpp's converter writes,
https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/constants.py and convert_hf_to_gguf.py.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seamwise.runtime.weights.files import StoredTensor

from .file import GgufHeader, GgufTensor, read_gguf_header
from .quants import KINDS, PACKED

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_IN_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
# Gemma norms what attention and MLP give, and its norms multiply by 1 + w, which is what a file holds.
_GEMMA = {
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_ONE_MORE = ("gemma2", "gemma3")
_NAME = re.compile(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"  # part of the configuration, not a weight
# Whose q and k rows the converter puts in the order of rotated pairs: first of each half, second of each half, …
_PAIRED = ("llama",)


def read_gguf(path: Path) -> dict[str, StoredTensor]:
    """Open a GGUF file by Hugging Face's names; a tensor without one keeps its own.

    Raises ValueError naming the file for a damaged one, or for one part of several.
    """
    header = read_gguf_header(path)
    if (parts := header.metadata.get("split.count", 0)) not in (0, 1):
        raise ValueError(f"{path}: is one of {parts} parts; join them with llama-gguf-split --merge")
    kind = header.metadata.get("general.architecture")
    return {huggingface_name(n, kind): _stored(header, n, t) for n, t in header.tensors.items() if n != ROPE_FACTORS}


def huggingface_name(name: str, architecture: Any) -> str:
    """Return Hugging Face's name of an architecture's tensor, or the name itself where there is none."""
    if not (found := _NAME.fullmatch(name)):
        return name
    layer, part, leaf = found.groups()
    in_layer = _IN_LAYER | (_GEMMA if architecture in _ONE_MORE else {})
    known = (_OUTER if layer is None else in_layer).get(part)
    outer = "" if layer is None else f"model.layers.{layer}."
    return name if known is None else f"{outer}{known}.{leaf}"


def _stored(header: GgufHeader, name: str, tensor: GgufTensor) -> StoredTensor:
    kind, form = KINDS.get(tensor.kind), PACKED.get(tensor.kind)
    heads = _paired_heads(header.metadata, name)
    if heads is not None and (type(heads) is not int or heads < 1 or tensor.shape[0] % (2 * heads)):
        raise ValueError(f"{header.path}: {name} has {tensor.shape[0]} rows, which {heads!r} heads do not divide")

    def read() -> Tensor:
        raw = tensor.where.read()
        if heads is None:
            return raw
        return raw.view(heads, -1, 2, len(raw) // tensor.shape[0]).transpose(1, 2).flatten()

    less = 1 if header.metadata.get("general.architecture") in _ONE_MORE and name.endswith("norm.weight") else 0

    def load() -> Tensor:
        assert kind is not None
        values = kind.values(read()).view(tensor.shape)
        return values - less if less else values

    def load_packed(part: int) -> Tensor:
        assert kind is not None and form is not None
        return form.parts(read().view(-1, kind.num_bytes))[part].view(tensor.shape[0], -1)

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
    return StoredTensor(
        shape=tensor.shape, stored_dtype=tensor.kind, dtype=None if kind is None else kind.dtype, load=load,
        packed=packed,
    )  # fmt: skip


def _paired_heads(metadata: dict[str, Any], name: str) -> Any:
    """Return how many heads' rows of this tensor are in the order of pairs; None where they are not."""
    architecture = metadata.get("general.architecture")
    found = re.fullmatch(r"blk\.\d+\.attn_(q|k)\.(weight|bias)", name)
    if architecture not in _PAIRED or found is None:
        return None
    heads = metadata.get(f"{architecture}.attention.head_count")
    return heads if found[1] == "q" else metadata.get(f"{architecture}.attention.head_count_kv", heads)
