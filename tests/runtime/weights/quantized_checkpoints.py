"""Tiny checkpoints in the published quantized layouts, and the model that each one means: plain torch, nothing of ours.

Weights follow compressed-tensors' compressors and DeepSeek-V3's blocks; that model has the dequantized weights, and
hooks that quantize every quantized layer's input there and back.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from step_inputs import run_runner
from tiny_models import save_tiny
from torch import Tensor, nn

from seamwise import ModelRunner, caches
from seamwise.compile.derive import parameters_of
from seamwise.compile.pipeline import PipelineConfig, ordered_passes
from seamwise.compile.startup_times import Ledger
from seamwise.runtime.build.compile_model import compile_model
from seamwise.runtime.build.loading import load_step_weights
from seamwise.runtime.build.model_config import ModelConfig
from seamwise.runtime.build.runner_config import RunnerConfig

REQUESTS = [[5, 77, 3, 18, 44, 9, 60, 61, 62], [7, 8, 90]]
NO_PASSES = tuple(one.name for group in ordered_passes() for one in group)
LIMITS = {"int8": 127.0, "float8": 448.0}
SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Layout:
    """kind: "int8", "float8" or "int4"; inputs: None, "dynamic" or "static"; method: of config.json.

    rows, columns  of the weights that share a scale; 0: all
    """

    kind: str
    rows: int = 1
    columns: int = 0
    inputs: str | None = None
    asymmetric: bool = False
    method: str = "compressed-tensors"
    ignore: tuple[str, ...] = ("lm_head",)

    def config(self) -> dict[str, Any]:
        """Return config.json's quantization_config."""
        if self.method == "fp8":
            block = [self.rows, self.columns]
            return {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": block}
        blocks = self.rows > 1
        strategy = "block" if blocks else "group" if self.columns else "channel" if self.rows else "tensor"
        number = {"num_bits": 4 if self.kind == "int4" else 8, "type": "float" if self.kind == "float8" else "int"}
        weights = number | {
            "symmetric": not self.asymmetric, "strategy": strategy, "dynamic": False,
            "block_structure": [self.rows, self.columns] if blocks else None, "actorder": None, "observer": "minmax",
        }  # fmt: skip
        weights["group_size"] = self.columns if strategy == "group" else None
        each = "group" if blocks else "token" if self.inputs == "dynamic" else "tensor"
        inputs = number | {"symmetric": True, "strategy": each, "dynamic": self.inputs == "dynamic"}
        inputs["group_size"] = self.columns if blocks else None
        group = {
            "targets": ["Linear"], "weights": weights, "output_activations": None,
            "input_activations": inputs if self.inputs else None,
        }  # fmt: skip
        names = {"int4": "pack-quantized", "int8": "int-quantized", "float8": "float-quantized"}
        return {
            "quant_method": "compressed-tensors", "format": names[self.kind], "quantization_status": "compressed",
            "config_groups": {"group_0": group}, "ignore": list(self.ignore), "kv_cache_scheme": None,
            "sparsity_config": {}, "transform_config": {}, "global_compression_ratio": None, "version": "0.12.2",
        }  # fmt: skip


LAYOUTS = {
    "fp8 blocks": Layout(kind="float8", rows=128, columns=128, inputs="dynamic", method="fp8"),
    "FP8_BLOCK": Layout(kind="float8", rows=128, columns=128, inputs="dynamic"),
    "W8A8 int8": Layout(kind="int8", inputs="dynamic"),
    "W8A8 int8 static": Layout(kind="int8", inputs="static"),
    "FP8_DYNAMIC": Layout(kind="float8", inputs="dynamic"),
    "FP8": Layout(kind="float8", rows=0, inputs="static"),
    "W4A16": Layout(kind="int4", columns=128),
    "W4A16_ASYM": Layout(kind="int4", columns=64, asymmetric=True),
    "W4A16 channel": Layout(kind="int4"),
    "W8A16 groups": Layout(kind="int8", columns=64),
    "W8A16_ASYM": Layout(kind="int8", asymmetric=True),
}
UNSERVED = {  # no kernel reads them: layers keep dequantized weights
    "W8A16 float8": Layout(kind="float8"),
    "W8A8 small blocks": Layout(kind="float8", rows=64, columns=64, inputs="dynamic", method="fp8"),
    "W8A8 asymmetric": Layout(kind="int8", inputs="dynamic", asymmetric=True),
}


def save_quantized(
    directory: Path, layout: Layout, dtype: torch.dtype, architecture: str = "LlamaForCausalLM", **changes: Any
) -> Any:
    """Save a tiny model in a layout and return the model that it means, in `dtype`, which scales have too."""
    model = save_tiny(directory, architecture, **(SIZES | changes)).to(dtype)
    tensors = {n: t.to(dtype) for n, t in load_file(directory / "model.safetensors").items()}
    means = copy.deepcopy(model)
    means.config._experts_implementation = "batched_mm"  # which has one gate for all, and runs in float64 too
    largest = _largest_inputs(model) if layout.inputs == "static" else {}
    for name, module in means.named_modules():
        ignored = any(re.fullmatch(one.removeprefix("re:"), name) for one in ("lm_head", *layout.ignore))
        if not isinstance(module, nn.Linear) or ignored:
            continue
        held, plain = quantized(tensors.pop(f"{name}.weight"), layout)
        static = (largest[name] / LIMITS[layout.kind]).reshape(1).to(dtype) if largest else None
        if static is not None:
            held["input_scale"] = static
        tensors |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in held.items()}
        module.weight.data = plain
        if layout.inputs:
            module.register_forward_pre_hook(_there_and_back(layout, static))
    tensors = _quantize_experts(means, tensors, layout)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config |= {"quantization_config": layout.config(), "dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config))
    return means


def _quantize_experts(means: Any, tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with experts quantized one by one; `means` gets what they mean, stacked."""
    kept = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match is None:
            kept[name] = tensor
            continue
        held, plain = quantized(tensor, layout)
        kept |= {f"{name.removesuffix('.weight')}.{suffix}": t.contiguous() for suffix, t in held.items()}
        experts, expert = means.get_submodule(match[1]), int(match[2])
        stacked = experts.down_proj if match[3] == "down" else experts.gate_up_proj
        half = len(plain) * (match[3] == "up")
        stacked.data[expert, half : half + len(plain)] = plain
    for name, experts in means.named_modules():
        if layout.inputs and name.endswith(".experts"):
            hook = _there_and_back(layout, None)
            experts.register_forward_pre_hook(lambda module, inputs, hook=hook: (*hook(module, inputs), *inputs[1:]))
            gate = type(experts)._apply_gate
            experts._apply_gate = lambda x, gate=gate, module=experts, hook=hook: hook(module, (gate(module, x),))[0]
    return kept


def quantized(weight: Tensor, layout: Layout) -> tuple[dict[str, Tensor], Tensor]:
    """Return what a checkpoint holds for a weight, by the ends of names, and the weight that it means."""
    N, K = weight.shape
    rows, columns = layout.rows or N, layout.columns or K
    wide = weight.double()
    padded = nn.functional.pad(wide, (0, -K % columns, 0, -N % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # (down, rows, across, columns)
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    if layout.asymmetric:
        least, most = (-8, 7) if layout.kind == "int4" else (-128, 127)
        scale = ((high.clamp(min=0) - low.clamp(max=0)) / (most - least)).to(weight.dtype)
        zero = (least - low.clamp(max=0) / scale.double()).round().clamp(least, most)
    else:
        least, most = (-7, 7) if layout.kind == "int4" else (-LIMITS[layout.kind], LIMITS[layout.kind])
        scale, zero = (torch.maximum(high, -low) / most).to(weight.dtype), torch.zeros_like(low)

    def every(t: Tensor) -> Tensor:
        return t.repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]

    values = wide / every(scale.double())
    values = values.clamp(least, most) if layout.kind == "float8" else (values.round() + every(zero)).clamp(least, most)
    stored = values.to(torch.float8_e4m3fn if layout.kind == "float8" else torch.int8)
    plain = (stored.to(weight.dtype) - every(zero).to(weight.dtype)) * every(scale)
    held_scale = scale if layout.rows or layout.columns else scale.reshape(1)
    if layout.method == "fp8":  # DeepSeek's scales are float32 whatever the model's dtype
        scale32 = (torch.maximum(high, -low) / most).float()
        stored = (wide / every(scale32.double())).clamp(least, most).to(torch.float8_e4m3fn)
        return {"weight": stored, "weight_scale_inv": scale32}, (stored.float() * every(scale32)).to(weight.dtype)
    if layout.kind != "int4":
        held = {"weight": stored, "weight_scale": held_scale}
        return held | ({"weight_zero_point": zero.to(torch.int8)} if layout.asymmetric else {}), plain
    held = {"weight_packed": pack(stored), "weight_scale": held_scale, "weight_shape": torch.tensor([N, K])}
    return held | ({"weight_zero_point": pack(zero.T.to(torch.int8)).T} if layout.asymmetric else {}), plain


def pack(values: Tensor) -> Tensor:
    """Pack int8 values of 4 bits (N, K) into int32 (N, ⌈K/8⌉), each plus 8, the first in the lowest bits."""
    padded = nn.functional.pad(values.long() + 8, (0, -values.shape[1] % 8)).unflatten(1, (-1, 8))
    words = sum(padded[..., i] << (4 * i) for i in range(8))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _largest_inputs(model: Any) -> dict[str, Tensor]:
    """Return the largest magnitude of every linear layer's input over some tokens."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, inputs: seen.update({name: inputs[0].abs().amax().float()})

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():
        model(torch.arange(64)[None] + 16, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def _there_and_back(layout: Layout, static: Tensor | None) -> Any:
    limit = LIMITS[layout.kind]

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        x = inputs[0].to(torch.promote_types(inputs[0].dtype, torch.float32))
        width = layout.columns if layout.rows > 1 else x.shape[-1]
        groups = nn.functional.pad(x, (0, -x.shape[-1] % width)).unflatten(-1, (-1, width))
        scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / limit if static is None else static.to(x.dtype)
        ratio = (groups / scale).clamp(-limit, limit)
        there = ratio.round() if layout.kind == "int8" else ratio.to(torch.float8_e4m3fn).to(x.dtype)
        return ((there * scale).flatten(-2)[..., : x.shape[-1]].to(inputs[0].dtype),)

    return hook


def dequantized(
    directory: Path, dtype: torch.dtype, entry: str = "own", quantization: str | None = None
) -> dict[str, Tensor]:
    """Return the weights that a model reads where no pass rewrites its layers, by their place in the model."""
    config = ModelConfig.from_directory(directory)
    options = RunnerConfig.for_model(
        config, dtype=dtype, entry=entry, device="cpu", pack_dir=None, quantization=quantization,
        pipeline=PipelineConfig(disabled=NO_PASSES, inductor="never"),
    )  # fmt: skip
    program, buffers = compile_model(config, options, Ledger())
    program.recipes = {n: r for recipe in program.recipes.values() for n, r in dequantizations(recipe)}
    weights = load_step_weights(directory, options, program, buffers)
    return dict(zip(program.recipes, weights, strict=True))


def dequantizations(recipe: Any) -> Iterator[tuple[str, Any]]:
    """Yield the parameter and the recipe of each dequantized weight within a recipe; experts' are flat."""
    if isinstance(recipe, dict) and "dequantize_weight" in recipe.get("op", ""):
        (stored,) = parameters_of(recipe["args"][0])
        yield stored.removesuffix("_packed"), recipe
    elif isinstance(recipe, (dict, list)):
        for inner in recipe.get("args", ()) if isinstance(recipe, dict) else recipe:
            yield from dequantizations(inner)


def logits(runner: ModelRunner) -> list[Tensor]:
    """Run prefill in chunks of two requests, mixed with decode steps."""
    return run_runner(runner, REQUESTS, ({0: 6, 1: 1}, {0: 2, 1: 1}, {0: 1, 1: 1}))


def load(directory: Path, dtype: torch.dtype, **options: Any) -> ModelRunner:
    packs = caches.cache_dir() / "packs-of-quantized"  # apart from others', of which the oldest go
    return ModelRunner.load(directory, dtype=dtype, device="cpu", **{"pack_dir": packs, **options})
