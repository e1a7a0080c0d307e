"""Quantized files of other layouts, read as the ones that kernels have: tensor by tensor, as each is asked for.

AWQ, GPTQ          qweight, qzeros, scales -> weight_packed, weight_scale, weight_zero_point of compressed-tensors
GPTQ, act-order    the same and g_idx -> weight: columns whose group lies anywhere have no kernel
bitsandbytes       weight uint8, absmax, … -> weight
NVFP4              weight uint8, weight_scale float8, weight_scale_2 -> weight
Sources: https://github.com/casper-hansen/AutoAWQ (awq/utils/packing_utils.py), https://github.com/AutoGPTQ/AutoGPTQ
(nn_modules/qlinear), https://github.com/bitsandbytes-foundation/bitsandbytes (functional.py, QuantState),
https://github.com/NVIDIA/TensorRT-Model-Optimizer (NVFP4), https://github.com/vllm-project/compressed-tensors.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from seamwise.kernels.linear.mxfp4_linear import E2M1

from .files import StoredTensor

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of columns in a word's nibbles
Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """How files hold what their layers' rules name otherwise.

    method  "awq", "gptq", "bitsandbytes" or "nvfp4"
    bits    of a weight; group: columns that share a scale, 0 for all
    plain   weights are dequantized at load: no kernel reads the form
    symmetric  zero points are all the middle, and not read
    zeros_less_one  they are stored less one (GPTQ's first format)
    """

    method: str
    bits: int = 4
    group: int = 0
    plain: bool = False
    symmetric: bool = False
    zeros_less_one: bool = False

    def read(self, found: Tensors, parameters: Container[str], dtype: torch.dtype) -> dict[str, StoredTensor]:
        """Return a checkpoint's tensors by the names of the layouts that are read. Raises ValueError naming a layer.

        parameters  of the model: GPTQ's files have biases of zeros for layers without
        dtype       of the model: a warning says what weights take that are dequantized
        """
        tensors = _READERS[self.method](self, found)
        if self.plain:
            made = {n: t for n, t in tensors.items() if t is not found.get(n)}
            stored = [t for n, t in found.items() if n in made or n not in tensors]
            held, taken = (
                sum(math.prod(t.shape) * (of or t.dtype or torch.uint8).itemsize for t in several) / 1e9
                for several, of in ((stored, None), (made.values(), dtype))
            )
            warnings.warn(
                f"{self.method}: no kernel reads this form; {len(made)} weights are dequantized at load and take"
                f" {taken:.3g} GB in {dtype}, {held:.3g} GB in the files",
                stacklevel=2,
            )
        for name in [n.removesuffix(".qweight") + ".bias" for n in found if n.endswith(".qweight")]:
            if name in tensors and name not in parameters and not tensors[name].load().any():
                del tensors[name]
        return tensors


def _read_words(p: Published, found: Tensors) -> dict[str, StoredTensor]:
    """AWQ and GPTQ."""
    tensors = dict(found)
    for name in [n for n in found if n.endswith(".qweight")]:
        layer = name.removesuffix(".qweight")
        held = {end: tensors.pop(f"{layer}.{end}", None) for end in ("qweight", "qzeros", "scales", "g_idx")}
        if missing := [end for end in ("qweight", "qzeros", "scales") if held[end] is None]:
            raise ValueError(f"{layer}: has a qweight and no {', '.join(missing)}; download the checkpoint again")
        tensors |= _layer(p, layer, {end: t for end, t in held.items() if t is not None})
    return tensors


def _layer(p: Published, layer: str, held: Tensors) -> dict[str, StoredTensor]:
    scale = held["scales"]
    per_word, (groups, rows) = 32 // p.bits, scale.shape
    wanted = {"awq": (rows // per_word,), "gptq": (rows,)}[p.method]
    if held["qweight"].shape[1:] != wanted or held["qzeros"].shape != (groups, -(-rows // per_word)):
        raise ValueError(
            f"{layer}: qweight is {held['qweight'].shape}, qzeros {held['qzeros'].shape}, scales {scale.shape}; wanted"
            f" {p.method.upper()}'s layout of {p.bits} bits"
        )
    columns = held["qweight"].shape[0] * (1 if p.method == "awq" else per_word)

    def made(shape: tuple[int, ...], dtype: torch.dtype | None, load: Callable[[], Tensor]) -> StoredTensor:
        return StoredTensor(shape=shape, stored_dtype=p.method, dtype=dtype, load=load)

    if p.plain:
        return {f"{layer}.weight": made((rows, columns), scale.dtype, partial(_dequantized, p, layer, held))}
    weight = partial(_packed_weight, p, layer, held)
    packed = p.bits == 4
    dtype = torch.int32 if packed else torch.int8
    parts = {
        "weight_packed" if packed else "weight": made((rows, columns // 8 if packed else columns), dtype, weight),
        "weight_scale": made((rows, groups), scale.dtype, lambda: scale.load().T.contiguous()),
    }
    if not p.symmetric:
        shape = (-(-rows // 8), groups) if packed else (rows, groups)
        parts["weight_zero_point"] = made(shape, dtype, partial(_packed_zeros, p, layer, held))
    return {f"{layer}.{end}": part for end, part in parts.items()}


def _packed_weight(p: Published, layer: str, held: Tensors) -> Tensor:
    """Return int32 (N, K/8), nibbles along K, the first in the lowest bits; or int8 (N, K)."""
    if "g_idx" in held:
        index = held["g_idx"].load()
        if not torch.equal(index.long(), torch.arange(len(index)) // (p.group or len(index))):
            raise ValueError(
                f"{layer}: g_idx is not in the order of columns, config.json has desc_act false; set it true"
            )
    if p.symmetric:
        _zeros(p, layer, held)  # which are the middle then, and not read again
    values = _values(p, held)
    return (values - 128).to(torch.int8).T.contiguous() if p.bits == 8 else _pack_nibbles(values.T)


def _packed_zeros(p: Published, layer: str, held: Tensors) -> Tensor:
    """Return int32 (⌈N/8⌉, G), nibbles along N; or int8 (N, G)."""
    zeros_GN = _zeros(p, layer, held)
    return ((zeros_GN - 128).to(torch.int8).T if p.bits == 8 else _pack_nibbles(zeros_GN).T).contiguous()


def _dequantized(p: Published, layer: str, held: Tensors) -> Tensor:
    """Return the weight (N, K) in the scales' dtype, each column by its own group."""
    scales_GN, zeros_GN = held["scales"].load(), _zeros(p, layer, held)
    values_KN = _values(p, held)
    index = torch.arange(len(values_KN)) // (p.group or len(values_KN))
    if "g_idx" in held:
        index = held["g_idx"].load().long()
    return ((values_KN - zeros_GN[index]).to(scales_GN.dtype) * scales_GN[index]).T.contiguous()


def _values(p: Published, held: Tensors) -> Tensor:
    """Return the stored integers (K, N), int32 from 0 up."""
    words = held["qweight"].load()
    return _nibbles_of_awq(words) if p.method == "awq" else _unpacked(words.T, p.bits).T


def _zeros(p: Published, layer: str, held: Tensors) -> Tensor:
    """Return the zero points (G, N), int32. Raises ValueError for others than the middle where all are that (sym)."""
    words = held["qzeros"].load()
    if p.method == "awq":
        return _nibbles_of_awq(words)
    zeros = _unpacked(words, p.bits)[:, : held["scales"].shape[1]]
    zeros = (zeros + p.zeros_less_one) & ((1 << p.bits) - 1)
    if p.symmetric and not (zeros == 1 << (p.bits - 1)).all():
        raise ValueError(f"{layer}: config.json has sym true, and its zero points are not all {1 << (p.bits - 1)}")
    return zeros


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Return the integers (R, C · 32/bits) of int32 words (R, C), the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _nibbles_of_awq(words: Tensor) -> Tensor:
    nibbles = _unpacked(words, 4).unflatten(1, (-1, 8))
    return nibbles[..., torch.tensor(_AWQ_ORDER).argsort()].flatten(1)


def _pack_nibbles(values: Tensor) -> Tensor:
    """Pack integers 0 … 15 (R, C) into int32 (R, ⌈C/8⌉), the first in the lowest bits; what is over is 8, for 0."""
    padded = torch.nn.functional.pad(values, (0, -values.shape[1] % 8), value=8).unflatten(1, (-1, 8))
    shifts = torch.arange(0, 32, 4, dtype=torch.int32)
    return (padded.to(torch.int32) << shifts).sum(-1, dtype=torch.int32)


def _read_bitsandbytes(p: Published, found: Tensors) -> dict[str, StoredTensor]:
    tensors = dict(found)
    for name in [n for n in found if ".quant_state.bitsandbytes__" in n]:
        weight = name.partition(".quant_state.")[0]
        state = json.loads(bytes(found[name].load().tolist()).decode())
        held = {n.removeprefix(weight): tensors.pop(n) for n in [n for n in tensors if n.startswith(weight)]}
        dtype = getattr(torch, state["dtype"])
        tensors[weight] = StoredTensor(
            shape=tuple(state["shape"]), stored_dtype=state["quant_type"], dtype=dtype,
            load=partial(_of_quant_state, state, held),
        )  # fmt: skip
    return tensors


def _of_quant_state(state: Mapping[str, object], held: Tensors) -> Tensor:
    """Return the weight of 4-bit indices into a table, times the largest magnitude of each block."""
    absmax = held[".absmax"].load()
    if ".nested_absmax" in held:  # themselves quantized, by a table of 256
        table, scale = held[".nested_quant_map"].load(), held[".nested_absmax"].load()
        every = scale.repeat_interleave(int(state["nested_blocksize"]))[: len(absmax)]  # type: ignore[call-overload]
        absmax = table[absmax.int()] * every + float(state["nested_offset"])  # type: ignore[arg-type]
    codes = held[""].load().flatten().view(torch.uint8)  # bnb_4bit_quant_storage may call its bytes floats
    indices = torch.stack((codes >> 4, codes & 15), 1).flatten()
    shape: tuple[int, ...] = tuple(state["shape"])  # type: ignore[arg-type]
    count = torch.Size(shape).numel()
    values = held[".quant_map"].load()[indices[:count].int()]
    largest = absmax.float().repeat_interleave(int(state["blocksize"]))[:count]  # type: ignore[call-overload]
    return (values * largest).to(getattr(torch, str(state["dtype"]))).view(shape)


def _read_nvfp4(p: Published, found: Tensors) -> dict[str, StoredTensor]:
    """By ModelOpt's names (weight, weight_scale_2), or compressed-tensors' (weight_packed, weight_global_scale)."""
    tensors = dict(found)
    for name in [n for n in found if n.endswith((".weight_scale_2", ".weight_global_scale"))]:
        divides = name.endswith(".weight_global_scale")
        layer = name.rpartition(".")[0]
        held = {
            "codes": tensors.pop(f"{layer}.{'weight_packed' if divides else 'weight'}"),
            "scale": tensors.pop(f"{layer}.weight_scale"), "whole": tensors.pop(name),
        }  # fmt: skip
        for end in ("input_scale", "input_global_scale"):  # inputs stay as they are
            tensors.pop(f"{layer}.{end}", None)
        rows, half = held["codes"].shape
        tensors[f"{layer}.weight"] = StoredTensor(
            shape=(rows, 2 * half), stored_dtype="nvfp4", dtype=torch.float32, load=partial(_of_nvfp4, held, divides)
        )
    return tensors


def _of_nvfp4(held: Tensors, divides: bool) -> Tensor:
    """Return the weight float32 (N, K) of e2m1 floats, two a byte, in groups of 16 columns with e4m3 scales."""
    codes, whole = held["codes"].load(), held["whole"].load().float().reshape(())
    scale = held["scale"].load().float()
    scale = scale / whole if divides else scale * whole
    table = torch.tensor([*E2M1, *(-v for v in E2M1)])
    values = table[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
    return (values.unflatten(-1, (-1, 16)) * scale.unsqueeze(-1)).flatten(-2)


_READERS: dict[str, Callable[[Published, Tensors], dict[str, StoredTensor]]] = {
    "awq": _read_words, "gptq": _read_words, "bitsandbytes": _read_bitsandbytes, "nvfp4": _read_nvfp4,
}  # fmt: skip
