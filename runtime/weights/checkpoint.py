"""A model's weights, tensor by tensor, from any published format, checked against the model before any is read."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from seamwise.compile.parameter import Parameter

from . import machine_memory
from .experts import stack_experts, stacked_name
from .file_formats import check_load_format, find_tensors
from .files import StoredTensor
from .tied import differ

# What old checkpoints store though the model computes it: Llama's, saved by transformers before 4.31.
# What packed ones repeat: a layer's shape.
_COMPUTED_SUFFIXES = (".rotary_emb.inv_freq", ".weight_shape")
_KV_SCALE = re.compile(r"(.*\.self_attn)\.([kv])_scale")
# Every other published spelling of these: compressed-tensors' older one, ModelOpt's, AutoFP8's one for both.
_KV_SCALES = (
    (re.compile(r"(.*\.self_attn)\.(?:[kv]_proj|qkv_proj|attn)\.([kv])_scale"), ""),
    (re.compile(r"(.*\.self_attn)\.([kv])_proj\.output_scale"), ""),
    (re.compile(r"(.*\.self_attn)\.(?:attn\.)?kv_scale"), "kv"),
)
# How names of a multimodal model's text begin, and what a decoder has there; and Qwen-VL's images, beside "model.".
_TEXT_PREFIXES = {
    "language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "model.language_model.": "model.",
}  # fmt: skip
_OTHER_MODELS = ("visual.",)
_OTHER_SCALE = {"weight_scale_inv": "weight_scale", "weight_scale": "weight_scale_inv"}  # the same, multiplied with
_FLOATS = {None, torch.float64, torch.float32, torch.float16, torch.bfloat16}  # None: of any of these


Part = tuple[int, int, int]  # dimension, start, end
Convert = Callable[[Mapping[str, StoredTensor]], Mapping[str, StoredTensor]]


class Source(Protocol):
    """Where weights come from: tensors by name, whole or a part of one, read when they are asked for."""

    def read(self, name: str, *, dtype: torch.dtype, device: str, part: Part | None = None) -> Tensor: ...


def open_source(
    path: Path, parameters: Mapping[str, Parameter], *, dtype: torch.dtype, device: str, load_format: str = "auto",
    seed: int = 0, within: str = "", ranks: int = 1, convert: Convert | None = None, read: Convert | None = None,
) -> Source:  # fmt: skip
    """Open what gives a model with these parameters its weights; reads headers only.

    path         a directory, or one file
    parameters   by name, tied ones under one
    load_format  one of LOAD_FORMATS; "auto": the first format of FORMATS that the directory holds; "dummy": seeded
                 random weights
    within       the model is a part of the checkpoint: the tensors whose names begin so, and go on as parameters' do
    ranks        each of as many reads its part
    convert      what to make of the checkpoint's tensors where they do not fit as they are
    read         what they are read as, before anything else

    Raises ValueError when the checkpoint does not fit the model, or the model does not fit the machine.
    """
    check_load_format(load_format)
    needed = sum(math.prod(p.shape) * (p.own_dtype or dtype).itemsize for p in parameters.values()) // ranks
    memory = machine_memory.total_bytes(device)
    if needed > memory:
        raise ValueError(
            f"{path}: the model has {needed / 1e9:.1f} GB of weights in {dtype}, {device} has {memory / 1e9:.1f} GB of"
            " memory; use a smaller model or dtype"
        )
    if load_format == "dummy":
        return DummyCheckpoint(parameters, seed)
    return Checkpoint.open(path, parameters, load_format, within, convert, read)


def show_progress(items: Iterable[str], label: str) -> Iterable[str]:
    """Return the items, with a progress bar on stderr when that is a terminal."""
    from tqdm import tqdm

    return tqdm(items, desc=label, unit="tensor", leave=False, disable=None)


class Checkpoint:
    """Tensors by name. `open` raises one ValueError that lists every missing, extra and mis-shaped tensor."""

    def __init__(self, tensors: Mapping[str, StoredTensor], parameters: Mapping[str, Parameter]) -> None:
        self._tensors, self._parameters = tensors, parameters

    @classmethod
    def open(
        cls, path: Path, parameters: Mapping[str, Parameter], load_format: str = "auto", within: str = "",
        convert: Convert | None = None, read: Convert | None = None,
    ) -> Checkpoint:  # fmt: skip
        """Open a checkpoint for a model with these parameters, as open_source describes."""
        stored, problems, chosen = find_tensors(path, load_format)
        stored = {n.removeprefix(within): tensor for n, tensor in stored.items() if n.startswith(within)}
        stored = _text_of(stored, parameters)
        stored = stored if read is None else dict(read(stored))
        found, unfit = _fitted(stored, parameters)
        if convert is not None and (unfit or found.keys() != parameters.keys()):
            found, unfit = _fitted(convert(stored), parameters)
        if any(name.endswith(".eh_proj.weight") for name in parameters):
            found = {n: tensor for n, tensor in found.items() if n in parameters}  # the module's model has all else
        label = f"{path}: the checkpoint does not fit the model that its configuration describes"
        return cls.fitting(label, found, parameters, chosen.dtypes, problems + unfit)

    @classmethod
    def fitting(
        cls, label: str, found: Mapping[str, StoredTensor], parameters: Mapping[str, Parameter],
        dtypes: Iterable[Any], problems: list[str],
    ) -> Checkpoint:  # fmt: skip
        """Return the checkpoint of these tensors. Raises ValueError with all that does not fit, after the label."""
        for name, p in parameters.items():
            if name not in found:
                problems.append(f"missing {name}, shape {p.shape}")
            elif found[name].shape != p.shape:
                problems.append(f"shape of {name} is {found[name].shape}, wanted {p.shape}")
            elif not _fits(found[name].dtype, p.own_dtype):
                floats = "one of " + ", ".join(str(d).removeprefix("torch.") for d in dtypes)
                wanted = floats if p.own_dtype in _FLOATS else p.dtype
                problems.append(f"dtype of {name} is {found[name].stored_dtype}, wanted {wanted}")
        # Modules that predict further tokens (DeepSeek-V3) stand behind the last layer; a model may do without.
        left_out = tuple(n.removesuffix("eh_proj.weight") for n in found if n.endswith(".eh_proj.weight"))
        extra = [n for n in found if n not in parameters and not n.endswith(_COMPUTED_SUFFIXES)]
        extra = [n for n in extra if not (left_out and n.startswith(left_out))]
        extra = [n for n in extra if not _KV_SCALE.fullmatch(n)]  # which a cache that is not quantized does without
        problems += [f"extra {name}" for name in extra]
        if problems:
            shown = "\n  ".join(problems[:20]) + ("\n  …" if len(problems) > 20 else "")
            raise ValueError(f"{label} ({len(problems)} problems):\n  {shown}")
        return cls({name: found[name] for name in parameters}, parameters)

    def read(self, name: str, *, dtype: torch.dtype, device: str, part: Part | None = None) -> Tensor:
        """Read a tensor, or a part of it, into new memory, converted. Raises ValueError when the file is damaged."""
        stored = self._tensors[name]
        read = stored.load() if part is None else stored.load_part(*part)
        return read.to(device=device, dtype=self._parameters[name].read_as(dtype))


def _text_of(stored: dict[str, StoredTensor], parameters: Iterable[str]) -> dict[str, StoredTensor]:
    """Return the tensors of a multimodal checkpoint's text, by the names of a decoder; any other one's as they are."""
    if any(name.startswith(prefix) for name in parameters for prefix in (*_TEXT_PREFIXES, *_OTHER_MODELS)):
        return stored
    text = {
        new + name.removeprefix(prefix): tensor
        for name, tensor in stored.items()
        for prefix, new in _TEXT_PREFIXES.items()
        if name.startswith(prefix)
    }
    if text:
        return text | {name: tensor for name, tensor in stored.items() if name.startswith("lm_head.")}
    found = {name: tensor for name, tensor in stored.items() if not name.startswith(_OTHER_MODELS)}
    if any(n.startswith("model.") for n in found) or not any(n.startswith("model.layers.") for n in parameters):
        return found
    # Saved as the model without its head (Qwen3Model), whose names do not say which part they are of.
    return {name if name.startswith("lm_head.") else f"model.{name}": tensor for name, tensor in found.items()}


def _fitted(
    stored: Mapping[str, StoredTensor], parameters: Mapping[str, Parameter]
) -> tuple[dict[str, StoredTensor], list[str]]:
    wanted = {n: t for name, whole in stored.items() for n, t in _as_wanted(name, whole, parameters).items()}
    return by_parameter(wanted, parameters)


def by_parameter(
    found: Mapping[str, StoredTensor], parameters: Mapping[str, Parameter]
) -> tuple[dict[str, StoredTensor], list[str]]:
    """Return tensors by the model's names, experts stacked and tied ones under one name; and what does not fit."""
    tensors, problems = stack_experts(found, parameters)
    for alias, name in ((alias, name) for name, p in parameters.items() for alias in p.aliases):
        if (other := tensors.pop(alias, None)) is not None and differ(other, tensors.setdefault(name, other)):
            problems.append(f"{alias} differs from {name}, which is the same tensor in this model")
    return tensors, problems


def holds_kv_scales(path: Path) -> bool:
    """Return whether a checkpoint has scales of keys and values, in any published spelling; reads its header."""
    found, _, _ = find_tensors(path, "auto")
    patterns = (_KV_SCALE, *(pattern for pattern, _ in _KV_SCALES))
    return any(pattern.fullmatch(name) for name in found for pattern in patterns)


class DummyCheckpoint:
    """Seeded random weights, the same for a name whatever else is read: norms and single scales are ones,
    the rest small normal.

    Bytes are drawn so that they are small numbers as floats of 4 bits and as exponents alike (MXFP4).
    """

    def __init__(self, parameters: Mapping[str, Parameter], seed: int) -> None:
        self._parameters, self._seed = parameters, seed

    def read(self, name: str, *, dtype: torch.dtype, device: str, part: Part | None = None) -> Tensor:
        if part is not None:
            dim, start, end = part
            return self.read(name, dtype=dtype, device=device).narrow(dim, start, end - start).clone()
        shape, dtype = self._parameters[name].shape, self._parameters[name].own_dtype or dtype
        if len(shape) == 1 and name.endswith(("weight", "_scale")):
            return torch.ones(shape, dtype=dtype, device=device)
        seed = int.from_bytes(hashlib.sha256(f"{self._seed}:{name}".encode()).digest()[:7], "little")
        generator = torch.Generator(device).manual_seed(seed)
        if dtype == torch.uint8:
            return torch.randint(112, 120, shape, generator=generator, dtype=dtype, device=device)
        if not dtype.is_floating_point:
            draw = torch.randint(-127, 128, (*shape, dtype.itemsize), generator=generator, device=device)
            return draw.to(torch.int8).view(dtype).squeeze(-1)
        wide = torch.float32 if dtype.itemsize == 1 else dtype
        return torch.empty(shape, dtype=wide, device=device).normal_(0.0, 0.02, generator=generator).to(dtype)


def _as_wanted(name: str, tensor: StoredTensor, parameters: Mapping[str, Parameter]) -> dict[str, StoredTensor]:
    """Return a tensor by the name that the model has for it, or what it may be read as where the model wants that."""
    for pattern, both in _KV_SCALES:
        if name not in parameters and (match := pattern.fullmatch(name)):
            return {f"{match[1]}.{kind}_scale": _single(tensor) for kind in both or match[2]}
    if name not in parameters and (other := _OTHER_SCALE.get(name.rpartition(".")[2])) is not None:
        name = f"{name.rpartition('.')[0]}.{other}" if f"{name.rpartition('.')[0]}.{other}" in parameters else name
    packed = {f"{name}{end}": part for end, part in tensor.packed.items()}
    if any(one in parameters or stacked_name(one)[0] in parameters for one in packed):
        return packed
    return {name: _single(tensor) if name in parameters and parameters[name].shape == (1,) else tensor}


def _single(tensor: StoredTensor) -> StoredTensor:
    """Return a scale of shape () as (1,)."""
    if tensor.shape != ():
        return tensor
    return replace(tensor, shape=(1,), load=lambda: tensor.load().reshape(1), read_part=None)


def _fits(stored: torch.dtype | None, kept: torch.dtype | None) -> bool:
    """Return whether a tensor may be read: any float as any float; what is quantized as nothing else."""
    return stored is not None and (stored == kept or {stored, kept} <= _FLOATS)
