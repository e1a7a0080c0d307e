"""A tiny module, its random parameters, and writers of every checkpoint format by the format's own library."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from plain_modules import load_weights
from safetensors.torch import save_file
from torch import Tensor, nn

from seamwise.compile.parameter import parameters_in
from seamwise.runtime.weights.file_formats import FORMATS


class Tiny(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.register_buffer("speeds", torch.arange(2.0, device="cpu"), persistent=False)
        if tied:
            self.head.weight = self.embed.weight


def on_meta(tied: bool = False) -> Tiny:
    with torch.device("meta"):
        return Tiny(tied)


def draw(tied: bool = False, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(p.shape, generator=generator).to(dtype) for n, p in parameters_in(Tiny(tied)).items()}


def load(path: Path, module: nn.Module | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    module = on_meta() if module is None else module
    load_weights(module, path, dtype=dtype, device="cpu", **options)
    return module


def as_numpy(tensor: Tensor) -> np.ndarray:
    """What np.savez makes of an ml_dtypes bfloat16 array is two opaque bytes a value."""
    return tensor.view(torch.int16).numpy().view("V2") if tensor.dtype == torch.bfloat16 else tensor.numpy()


def save_gguf(tensors: dict[str, Tensor], path: Path) -> None:
    writer = GGUFWriter(path, "llama")
    if part := re.search(r"-(\d{5})-of-(\d{5})\.gguf$", path.name):
        writer.add_uint16("split.no", int(part[1]) - 1)
        writer.add_uint16("split.count", int(part[2]))
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16:
            writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "safetensors": lambda tensors, path: save_file(tensors, path),
    "pt": lambda tensors, path: torch.save(tensors, path),
    "npz": lambda tensors, path: np.savez(path, **{n: as_numpy(t) for n, t in tensors.items()}),
    "gguf": save_gguf,
}


def save(directory: Path, tensors: dict[str, Tensor], format: str = "safetensors", name: str | None = None) -> None:
    WRITERS[format](tensors, directory / (name or FORMATS[format].file))


def save_shards(directory: Path, *shards: dict[str, Tensor], format: str = "safetensors") -> dict[str, str]:
    stem, _, suffix = FORMATS[format].file.rpartition(".")
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.{suffix}" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save(directory, tensors, format, name)
    weight_map = {t: name for name, tensors in zip(names, shards, strict=True) for t in tensors}
    write_index(directory, weight_map, format)
    return weight_map


def write_index(directory: Path, weight_map: Any, format: str = "safetensors") -> None:
    index = directory / f"{FORMATS[format].file}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
