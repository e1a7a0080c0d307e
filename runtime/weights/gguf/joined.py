"""What a GGUF file holds in other pieces than Hugging Face: DeepSeek's expansion of latents, gpt-oss's experts.

H heads, N columns of a key without position, V of a value, C latent; E experts, D model width, I an expert's width.
Source: modify_tensors of llama.cpp's conversion scripts, which these undo.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seamwise.runtime.weights.files import StoredTensor


def join(found: dict[str, StoredTensor], where: str) -> dict[str, StoredTensor]:
    """Return tensors, those in place of their pieces that they are made of; a piece without the others stays.

    Raises ValueError for pieces that do not fit each other.
    """
    for (first, *others), whole in _WHOLES.items():
        for name in [one for one in found if one.endswith(first)]:
            outer = name.removesuffix(first)
            names = [name, *(f"{outer}{other}" for other in others)]
            if all(one in found for one in names):
                pieces = [found.pop(one) for one in names]
                made = _expansion(*pieces) if whole.endswith("kv_b_proj.weight") else _experts(pieces)
                if made is None:
                    shapes = ", ".join(f"{one} {piece.shape}" for one, piece in zip(names, pieces, strict=True))
                    raise ValueError(f"{where}: {shapes} are no pieces of {outer}{whole}; download it again")
                found[f"{outer}{whole}"] = made
    return found


_WHOLES = {
    ("self_attn.k_b_proj.weight", "self_attn.v_b_proj.weight"): "self_attn.kv_b_proj.weight",
    ("mlp.experts.gate_proj.weight", "mlp.experts.up_proj.weight"): "mlp.experts.gate_up_proj",
    ("mlp.experts.gate_proj.bias", "mlp.experts.up_proj.bias"): "mlp.experts.gate_up_proj_bias",
    ("mlp.experts.down_proj.weight",): "mlp.experts.down_proj",
    ("mlp.experts.down_proj.bias",): "mlp.experts.down_proj_bias",
}


def _expansion(keys: StoredTensor, values: StoredTensor) -> StoredTensor | None:
    """Return (H·(N + V), C) of (H, C, N), which llama.cpp multiplies queries with, and (H, V, C)."""
    if len(keys.shape) != 3 or len(values.shape) != 3 or keys.shape[:2] != (values.shape[0], values.shape[2]):
        return None
    H, C, N = keys.shape
    return StoredTensor(
        shape=(H * (N + values.shape[1]), C), stored_dtype=keys.stored_dtype, dtype=_dtype([keys, values]),
        load=lambda: torch.cat((keys.load().transpose(1, 2), values.load()), 1).flatten(0, 1),
    )  # fmt: skip


def _experts(pieces: list[StoredTensor]) -> StoredTensor | None:
    """Return experts' weights (E, I, D) as (E, D, P·I), rows of the P pieces in turns; biases (E, I) as (E, P·I)."""
    if len({p.shape for p in pieces}) > 1 or len(pieces[0].shape) not in (2, 3):
        return None
    E, I, *columns = pieces[0].shape

    def rows(several: list[StoredTensor]) -> Tensor:
        return torch.stack([p.load() for p in several], 2).flatten(1, 2)

    def in_blocks(end: str) -> StoredTensor:  # MXFP4's, which are not transposed
        parts = [p.packed[end] for p in pieces]
        return StoredTensor(
            shape=(E, len(parts) * I, *parts[0].shape[2:]), stored_dtype=parts[0].stored_dtype, dtype=parts[0].dtype,
            load=lambda: rows(parts),
        )  # fmt: skip

    return StoredTensor(
        shape=(E, *columns, len(pieces) * I), stored_dtype=pieces[0].stored_dtype, dtype=_dtype(pieces),
        load=lambda: rows(pieces).transpose(1, -1).contiguous(),
        packed={end: in_blocks(end) for end in pieces[0].packed if all(end in p.packed for p in pieces)},
    )  # fmt: skip


def _dtype(pieces: list[StoredTensor]) -> torch.dtype | None:
    """Return what pieces are read as; float32 where they differ, and None where one is not read."""
    dtypes = {piece.dtype for piece in pieces}
    return None if None in dtypes else dtypes.pop() if len(dtypes) == 1 else torch.float32
