"""AWQ, GPTQ, static fp8, bitsandbytes and NVFP4: dequantized weights are the formats', bit for bit.

Files are written here after the formats' own descriptions, in numpy, value by value.
"""

from __future__ import annotations

import copy
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quantized_checkpoints import REQUESTS, SIZES, dequantized, load, logits
from safetensors.torch import load_file, save_file
from shared_traces import sharing_traces
from tiny_models import assert_within_budget, save_tiny
from torch import Tensor, nn

traces = sharing_traces()
Held = dict[str, Tensor]
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
# Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def words(values: np.ndarray, bits: int, order: list[int] | None = None) -> Tensor:
    """Pack integers along the last dimension into int32, the first in the lowest bits, or in an order."""
    per = 32 // bits
    order = list(range(per)) if order is None else order
    out = np.zeros((*values.shape[:-1], values.shape[-1] // per), dtype=np.uint32)
    for i in range(per):
        out |= values[..., order[i] :: per].astype(np.uint32) << np.uint32(bits * i)
    return torch.from_numpy(out.view(np.int32))


def integers(weight: Tensor, bits: int, group: int, symmetric: bool, index: np.ndarray) -> tuple[Any, Any, Tensor]:
    """Return integers (K, N), zero points (G, N) and scales float16 (G, N) of groups by the columns' index."""
    wide, top = weight.T.double().numpy(), 2**bits - 1
    groups = [wide[index == g] for g in range(index.max() + 1)]
    if symmetric:
        scale = np.stack([2 * np.abs(g).max(0) / top for g in groups])
        zero = np.full(scale.shape, 1 << (bits - 1))
    else:
        low, high = (np.stack([f(g) for g in groups]) for f in (lambda g: g.min(0), lambda g: g.max(0)))
        scale = (high - low) / top
        zero = np.round(-low / scale).clip(0, top)
    scales = torch.from_numpy(scale).half()
    every = scales.double().numpy()[index]
    return np.round(wide / every + zero[index]).clip(0, top).astype(np.int64), zero.astype(np.int64), scales


def gptq(weight: Tensor, bits: int = 4, group: int = 64, sym: bool = False, act: bool = False, v2: bool = False) -> Any:
    columns = weight.shape[1]
    index = np.arange(columns) // (group if group > 0 else columns)
    if act:
        index = np.random.default_rng(0).permutation(index)
    q, z, s = integers(weight, bits, group, sym, index)
    plain = torch.from_numpy(q - z[index]).half() * s[torch.from_numpy(index)]
    held = {
        "qweight": words(q.T, bits).T.contiguous(), "qzeros": words(z if v2 else (z - 1) % 2**bits, bits),
        "scales": s, "g_idx": torch.from_numpy(index).int(), "bias": torch.zeros(weight.shape[0]).half(),
    }  # fmt: skip
    return held, plain.T


def awq(weight: Tensor, group: int = 64) -> tuple[Held, Tensor]:
    index = np.arange(weight.shape[1]) // group
    q, z, s = integers(weight, 4, group, False, index)
    held = {"qweight": words(q, 4, AWQ_ORDER), "qzeros": words(z, 4, AWQ_ORDER), "scales": s}
    return held, (torch.from_numpy(q - z[index]).half() * s[torch.from_numpy(index)]).T


def fp8(weight: Tensor, static: bool = True) -> tuple[Held, Tensor]:
    scale = (weight.abs().amax().float() / 448).to(weight.dtype)
    stored = (weight.double() / scale.double()).to(torch.float8_e4m3fn)
    held = {"weight": stored, "weight_scale": scale} | ({"input_scale": torch.tensor(0.03).to(scale)} if static else {})
    return held, stored.to(scale.dtype) * scale  # scales of shape ()


def bitsandbytes(weight: Tensor, nested: bool = True) -> tuple[Held, Tensor]:
    flat, table = weight.float().flatten(), torch.tensor(NF4)
    blocks = flat.view(-1, 64)
    absmax = blocks.abs().amax(1)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [*weight.shape]}
    held = {"weight.quant_map": table}
    if nested:
        offset = absmax.mean()
        code = torch.linspace(-1, 1, 256)
        pad = nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        largest = pad.abs().amax(1)
        ints = ((pad / largest[:, None]).unsqueeze(-1) - code).abs().argmin(-1).flatten()[: len(absmax)]
        held |= {
            "weight.nested_absmax": largest,
            "weight.nested_quant_map": code,
            "weight.absmax": ints.to(torch.uint8),
        }
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
        absmax = code[ints] * largest.repeat_interleave(256)[: len(ints)] + float(offset)
    else:
        held["weight.absmax"] = absmax
    index = ((blocks / absmax[:, None]).unsqueeze(-1) - table).abs().argmin(-1).flatten()
    held["weight"] = (index[::2] << 4 | index[1::2]).to(torch.uint8).unsqueeze(1)
    held["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return held, (table[index] * absmax.repeat_interleave(64)).bfloat16().view(weight.shape)


def nf4_in_bfloat16(weight: Tensor) -> tuple[Held, Tensor]:
    held, plain = bitsandbytes(weight)
    return held | {"weight": held["weight"].flatten().view(torch.bfloat16).unsqueeze(1)}, plain


def nvfp4(weight: Tensor, modelopt: bool = True) -> tuple[Held, Tensor]:
    table = torch.tensor([*E2M1, *(-v for v in E2M1)])
    groups = weight.float().unflatten(1, (-1, 16))
    whole = weight.abs().amax().float() / (6 * 448)
    given = whole if modelopt else 1 / whole
    scale = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    every = scale.float() * given if modelopt else scale.float() / given
    index = ((groups / every.unsqueeze(-1)).unsqueeze(-1) - table).abs().argmin(-1).flatten(1)
    packed = (index[:, ::2] | index[:, 1::2] << 4).to(torch.uint8)
    plain = (table[index].unflatten(1, (-1, 16)) * every.unsqueeze(-1)).flatten(1)
    if modelopt:
        return {
            "weight": packed,
            "weight_scale": scale,
            "weight_scale_2": given,
            "input_scale": torch.tensor(0.1),
        }, plain
    held = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": given.reshape(1)}
    return held | {"input_global_scale": torch.ones(1)}, plain


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "sym": False, "desc_act": False, "damp_percent": 0.1}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm", "zero_point": True}
FP8 = {"quant_method": "fp8", "activation_scheme": "static"}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
# quantization_config, how a weight is stored, layers that read what is stored (0: dequantized at load)
PUBLISHED: dict[str, tuple[dict[str, Any], Any, int]] = {
    "gptq": (GPTQ, gptq, 8),
    "gptq, symmetric": (GPTQ | {"sym": True}, lambda w: gptq(w, sym=True), 8),
    "gptq, one group": (GPTQ | {"group_size": -1}, lambda w: gptq(w, group=-1), 8),
    "gptq, version 2": (GPTQ | {"checkpoint_format": "gptq_v2"}, lambda w: gptq(w, v2=True), 8),
    "gptq, version 2 in GPTQModel's word": (GPTQ | {"format": "gptq_v2"}, lambda w: gptq(w, v2=True), 8),
    "gptq, 8 bits": (GPTQ | {"bits": 8}, lambda w: gptq(w, bits=8), 8),
    "gptq, act-order": (GPTQ | {"desc_act": True}, lambda w: gptq(w, act=True), 0),
    "awq": (AWQ, awq, 8),
    "fp8, static": (FP8, fp8, 8),
    "fp8, no blocks": (FP8 | {"activation_scheme": "dynamic"}, lambda w: fp8(w, static=False), 8),
    "fp8 of ModelOpt": ({"quant_method": "modelopt", "quant_algo": "FP8"}, fp8, 8),
    "nf4": (BNB, bitsandbytes, 0),
    "nf4, stored as bfloat16": (BNB | {"bnb_4bit_quant_storage": "bfloat16"}, nf4_in_bfloat16, 0),
    "nf4, plain scales": (BNB, lambda w: bitsandbytes(w, nested=False), 0),
    "nvfp4 of ModelOpt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, nvfp4, 0),
    "nvfp4": (
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, lambda w: nvfp4(w, modelopt=False), 0
    ),
}  # fmt: skip


def save_published(directory: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Save a tiny Llama in a published layout; return the model that it means, in `dtype`."""
    described, store, _ = PUBLISHED[name]
    means = copy.deepcopy(save_tiny(directory, "LlamaForCausalLM", **SIZES).to(dtype))
    tensors = {n: t.to(dtype) for n, t in load_file(directory / "model.safetensors").items()}
    for path, module in means.named_modules():
        if isinstance(module, nn.Linear) and path != "lm_head":
            held, plain = store(tensors.pop(f"{path}.weight"))
            tensors |= {f"{path}.{end}": t.contiguous() for end, t in held.items()}
            module.weight.data = plain.to(dtype)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"quantization_config": described, "dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config))
    return means


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_the_formats_bit_for_bit(name: str, tmp_path: Path) -> None:
    means = save_published(tmp_path, name)
    served = PUBLISHED[name][2]
    if served:
        found = dequantized(tmp_path, torch.bfloat16)
        assert len(found) == 14
    else:
        found = plain_weights(tmp_path)
    for parameter, weight in found.items():
        assert torch.equal(weight, means.get_parameter(parameter)), parameter


def plain_weights(directory: Path) -> Held:
    """Return what is read of a checkpoint that no kernel reads as it is stored."""
    from seamwise.compile.parameter import parameters_in
    from seamwise.model_defs import build_model
    from seamwise.runtime.build.model_config import ModelConfig
    from seamwise.runtime.weights.checkpoint import open_source
    from seamwise.runtime.weights.quantization_config import read_quantization

    config = ModelConfig.from_directory(directory)
    wanted = parameters_in(build_model(config.architecture, config.raw))
    published: Any = read_quantization(config.raw, "test").published  # type: ignore[union-attr]
    linears = [math.prod(p.shape) for name, p in wanted.items() if "_proj.weight" in name]
    say = f"{len(linears)} weights are dequantized at load and take {2 * sum(linears) / 1e9:.3g} GB in torch.bfloat16, "
    read = partial(published.read, parameters=wanted, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match=say) as told:
        source = open_source(directory, wanted, dtype=torch.bfloat16, device="cpu", read=read)
    held = float(str(told[0].message).rpartition(", ")[2].split()[0])
    assert 0.25 < held / (2 * sum(linears) / 1e9) < 0.5  # 4 bits and their scales
    return {n: source.read(n, dtype=torch.bfloat16, device="cpu") for n in wanted}


@pytest.mark.parametrize("name", ["gptq", "gptq, act-order", "awq", "fp8, static", "nf4", "nvfp4"])
def test_layers_read_what_is_stored(name: str, tmp_path: Path) -> None:
    means = save_published(tmp_path, name)
    runner = load(tmp_path, torch.bfloat16)
    (report,) = [r for r in runner.program.reports if r.name == "quantize_linear"]
    assert report.matched == PUBLISHED[name][2]
    got = logits(runner)
    if name == "fp8, static":
        assert all(part.isfinite().all() for part in got)  # inputs are rounded, as this model's hooks are not
        return
    assert_within_budget(got, means, REQUESTS)


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("awq", {"bits": 3}, "bits is 3, wanted 4"),
        ("awq", {"version": "gemv"}, "version is 'gemv', wanted 'gemm'"),
        ("awq", {"zero_point": False}, "zero_point is false"),
        ("awq", {"group_size": 0}, "group_size is 0"),
        ("gptq", {"bits": 3}, "bits is 3, wanted 4 or 8"),
        ("gptq", {"dynamic": {"-:.*": {}}}, "dynamic is"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ("gptq", {"something": 1}, "something would be ignored"),
        ("gptq", {"sym": True}, "config.json has sym true, and its zero points are not all 8"),
        ("gptq", {"format": "marlin"}, "format is 'marlin'"),
        ("gptq", {"checkpoint_format": "gptq", "format": "gptq_v2"}, "checkpoint_format is 'gptq', format 'gptq_v2'"),
        ("gptq, act-order", {"desc_act": False}, "g_idx is not in the order of columns"),
        ("nf4", {"load_in_4bit": False}, "load_in_4bit is not true"),
        ("fp8, static", {"weight_block_size": [128, 128]}, "activation_scheme is 'static' with weights in blocks"),
        ("fp8 of ModelOpt", {"quant_algo": "W4A8"}, "quant_algo is 'W4A8'"),
    ],
)
def test_what_is_not_served_is_named(name: str, change: dict[str, Any], named: str, tmp_path: Path) -> None:
    save_changed(tmp_path, name, change)
    with pytest.raises(ValueError, match=named):
        dequantized(tmp_path, torch.bfloat16)


def test_zero_points_are_no_others_than_the_configuration_says_where_weights_are_dequantized(tmp_path: Path) -> None:
    save_changed(tmp_path, "gptq, act-order", {"sym": True})
    with pytest.raises(ValueError, match="has sym true, and its zero points are not all 8"):
        plain_weights(tmp_path)


def save_changed(directory: Path, name: str, change: dict[str, Any]) -> None:
    """Save a published layout whose config.json says something else."""
    save_published(directory, name)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= change
    (directory / "config.json").write_text(json.dumps(config))


KV_NAMES = [
    ("self_attn.k_scale", "self_attn.v_scale"),
    ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"),
    ("self_attn.k_proj.output_scale", "self_attn.v_proj.output_scale"),
    ("self_attn.attn.k_scale", "self_attn.attn.v_scale"),
    ("self_attn.kv_scale", "self_attn.kv_scale"),
]


@pytest.mark.parametrize("names", KV_NAMES, ids=str)
@pytest.mark.parametrize("asked", [False, True], ids=["model's cache", "fp8 cache"])
def test_scales_of_keys_and_values_in_every_spelling(names: tuple[str, str], asked: bool, tmp_path: Path) -> None:
    from seamwise.compile.startup_times import Ledger
    from seamwise.runtime.build.compile_model import compile_model
    from seamwise.runtime.build.loading import load_step_weights
    from seamwise.runtime.build.model_config import ModelConfig
    from seamwise.runtime.build.runner_config import RunnerConfig

    save_published(tmp_path, "fp8, static")
    tensors = load_file(tmp_path / "model.safetensors")
    scales = {f"model.layers.{i}.{name}": torch.tensor(0.25 * (i + 1)) for i in range(2) for name in names}
    save_file(tensors | scales, tmp_path / "model.safetensors", {"format": "pt"})
    config = ModelConfig.from_directory(tmp_path)
    options = RunnerConfig.for_model(
        config, dtype="bfloat16", device="cpu", pack_dir=None, kv_cache_dtype="fp8" if asked else "auto"
    )
    program, buffers = compile_model(config, options, Ledger())
    weights = dict(zip(program.recipes, load_step_weights(tmp_path, options, program, buffers), strict=True))
    read = [w.item() for n, w in weights.items() if n.startswith("scale_of_kv_caches")]
    assert sorted(read) == ([0.25, 0.25, 0.5, 0.5] if asked else [])
