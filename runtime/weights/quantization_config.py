"""A config.json's `quantization_config`, read into rules: which layers' weights are stored how, and the KV cache.

fp8                 weight float8_e4m3fn and weight_scale_inv, blocks of weight_block_size (DeepSeek-V3, Qwen3-FP8)
compressed-tensors  int8 or float8_e4m3fn: weight, weight_scale, and input_scale where inputs have a fixed one;
                    4 bits: weight_packed int32, weight_scale; asymmetric: weight_zero_point (llm-compressor)
mxfp4               gpt-oss's experts, which its definition reads as they are

Every option is in effect or refused. A tensor weight_shape is not read: it repeats what config.json says.
Source: https://github.com/vllm-project/compressed-tensors, quant_args.py and quant_config.py; transformers'
FineGrainedFP8Config, https://huggingface.co/docs/transformers/quantization/finegrained_fp8.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from seamwise.model_defs.hf_config import Reader
from seamwise.passes import Scheme
from seamwise.runtime.weights.gguf.quants import PACKED

from .compressed_tensors import has_kv_scales, read_compressed_tensors
from .published_layouts import Published
from .quantization_rules import Quantization, Rule, read_block, read_names, refuse_unknown

_FP8_OPTIONS = {
    "quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt", "modules_to_not_convert",
    "ignored_layers", "dequantize",
}  # fmt: skip
_AWQ_OPTIONS = {
    "quant_method", "bits", "w_bit", "group_size", "q_group_size", "version", "zero_point", "modules_to_not_convert",
    "backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse",
}  # fmt: skip
# What GPTQ's tools write down of how a checkpoint was made, and what its options mean to a loader.
_GPTQ_OPTIONS = {
    "quant_method", "bits", "group_size", "sym", "desc_act", "checkpoint_format", "lm_head", "dynamic", "static_groups",
    "modules_in_block_to_quantize", "damp_percent", "true_sequential", "model_name_or_path", "model_file_base_name",
    "is_marlin_format", "quantizer", "pack_dtype", "meta", "dataset", "tokenizer", "backend", "use_cuda_fp16",
    "model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size", "pad_token_id",
    "use_exllama", "max_input_length", "exllama_config", "cache_block_outputs", "damp_auto_increment", "mse", "format",
    "act_group_aware",
}  # fmt: skip


def read_quantization(raw: Mapping[str, Any], where: str) -> Quantization | None:
    """Read a config.json; None where nothing is left to a loader. Raises ValueError for what is not served."""
    if raw.get("quantization_config") is None:
        return None
    read = Reader(Reader(raw, where).part("quantization_config"), f"{where}: quantization_config")
    method = read.choice("quant_method", (*_METHODS, "mxfp4"))
    if method == "mxfp4":
        refuse_unknown(read, {"quant_method", "modules_to_not_convert"})
        return None
    return replace(_METHODS[method](read), holds_kv_scales=bool(raw.get("holds_kv_scales")))


def packed_gguf(raw: Mapping[str, Any]) -> Quantization:
    """Return how a GGUF file holds the linear layers, and a tied head, that kernels read as they are.

    Raises ValueError where there are none.
    """
    kinds = raw.get("gguf_kinds", {})
    if not (served := sorted({*kinds.values()} & {*PACKED})):
        found = ", ".join(sorted({*kinds.values()})) or "no GGUF file"
        raise ValueError(
            f"quantization='gguf': wanted linear layers in {', '.join(PACKED)}, which kernels read as they are; this"
            f" model is in {found}; leave the option out, and weights are dequantized"
        )
    return Quantization(rules=tuple(_gguf_rule(kinds, kind) for kind in served))


def warn_of_experts(raw: Mapping[str, Any], kept: Quantization | None) -> None:
    """Say what experts of a GGUF file take that are dequantized: those that no rule keeps packed."""
    names = {target for rule in kept.rules for target in rule.targets} if kept else set()
    if plain := [sizes for name, sizes in raw.get("gguf_experts", {}).items() if name not in names]:
        taken, held = (1e-9 * sum(several) for several in zip(*plain, strict=True))
        says = f"experts are dequantized at load: {taken:.3g} GB in 16 bits, {held:.3g} GB in the file"
        fix = f"quantization='gguf' keeps a layer's packed that are all in one of {', '.join(PACKED)}"
        warnings.warn(f"{says}; {fix}, in bfloat16 on a CPU", stacklevel=4)


def _gguf_rule(kinds: Mapping[str, str], kind: str) -> Rule:
    form, targets = PACKED[kind], tuple(name for name, one in kinds.items() if one == kind)
    scheme = Scheme(form.format, 1, form.group)
    return Rule(targets=targets, scheme=scheme, stored="_packed", has_offset=form.has_offset)


def _fp8(read: Reader) -> Quantization:
    refuse_unknown(read, _FP8_OPTIONS)
    read.choice("fmt", ("e4m3",), "e4m3")
    static = read.choice("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    read.choice("scale_fmt", ("float",), "float")
    if read.flag("dequantize"):
        raise ValueError(f"{read.where}: dequantize is true, wanted false: layers read the stored weights")
    whole = read.raw.get("weight_block_size") is None  # one scale a weight
    rows, columns = (0, 0) if whole else read_block(read, "weight_block_size")
    if static and not whole:
        raise ValueError(f"{read.where}: activation_scheme is 'static' with weights in blocks; wanted 'dynamic'")
    listed = read.raw.get("modules_to_not_convert") or read.raw.get("ignored_layers")
    # transformers' rule: an entry names a module, those inside it, or the end of a name; without a list the head stays.
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    ignored = [r"re:.*lm_head$"]
    if listed:
        ignored = [rf"re:(?:{n}){boundary}|.*{re.escape(n)}$" for n in read_names(read, listed)]
    scheme = Scheme("float8_e4m3fn", rows, columns)
    rule = Rule(
        targets=("Linear",), scheme=scheme, scale="_scale" if whole else "_scale_inv", quantizes_input=True,
        has_input_scale=static,
    )  # fmt: skip
    return Quantization(rules=(rule,), ignored=tuple(ignored))


def _awq(read: Reader) -> Quantization:
    refuse_unknown(read, _AWQ_OPTIONS)
    if _number(read, "bits", "w_bit") != 4:
        raise ValueError(f"{read.where}: bits is {read.raw.get('bits')!r}, wanted 4")
    if str(read.raw.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"{read.where}: version is {read.raw['version']!r}, wanted 'gemm'")
    if read.flag("zero_point", True) is False:
        raise ValueError(f"{read.where}: zero_point is false, wanted true")
    group = _number(read, "group_size", "q_group_size")
    listed = read_names(read, read.raw.get("modules_to_not_convert") or [])
    return _in_words(Published(method="awq", group=max(group, 0)), [re.escape(name) for name in listed])


def _gptq(read: Reader) -> Quantization:
    refuse_unknown(read, _GPTQ_OPTIONS)
    bits, group = read.size("bits"), _number(read, "group_size")
    if bits not in (4, 8):
        raise ValueError(f"{read.where}: bits is {bits}, wanted 4 or 8")
    for option in ("dynamic", "lm_head"):
        if read.raw.get(option):
            raise ValueError(f"{read.where}: {option} is {read.raw[option]!r}, which is not served; wanted null")
    layouts = [read.choice(n, ("gptq", "gptq_v2")) for n in ("checkpoint_format", "format") if read.raw.get(n)]
    if len({*layouts}) > 1:
        raise ValueError(f"{read.where}: checkpoint_format is {layouts[0]!r}, format {layouts[1]!r}; wanted one")
    listed = read.raw.get("modules_in_block_to_quantize")
    inside = [name for names in listed for name in (names if isinstance(names, list) else [names])] if listed else []
    published = Published(
        method="gptq", bits=bits, group=max(group, 0), symmetric=read.flag("sym", True), plain=read.flag("desc_act"),
        zeros_less_one="gptq_v2" not in layouts,
    )  # fmt: skip
    targets = tuple(rf"re:.*{re.escape(name)}$" for name in inside) or ("Linear",)
    return _in_words(published, [], targets)


def _in_words(published: Published, kept: list[str], targets: tuple[str, ...] = ("Linear",)) -> Quantization:
    """Return AWQ's and GPTQ's: integers packed in words, all linear layers but the head and those kept."""
    if published.plain:
        return Quantization(rules=(), published=published)
    packed = published.bits == 4
    rule = Rule(
        targets=targets, scheme=Scheme("int4" if packed else "int8", 1, published.group),
        stored="_packed" if packed else "", has_zero=not published.symmetric,
    )  # fmt: skip
    ignored = tuple(rf"re:.*{name}" for name in ("lm_head$", *kept))
    return Quantization(rules=(rule,), ignored=ignored, published=published)


def _bitsandbytes(read: Reader) -> Quantization:
    if not (read.flag("load_in_4bit") or read.flag("_load_in_4bit")):
        raise ValueError(f"{read.where}: load_in_4bit is not true; wanted bitsandbytes' 4-bit form, nf4 or fp4")
    return Quantization(rules=(), published=Published(method="bitsandbytes", plain=True))


def _modelopt(read: Reader) -> Quantization:
    inner = Reader(read.part("quantization") or read.raw, read.where)
    algorithm = inner.choice("quant_algo", ("FP8", "NVFP4"))
    scales = _modelopt_kv(inner)
    if algorithm == "NVFP4":
        return Quantization(rules=(), published=Published(method="nvfp4", group=16, plain=True), has_kv_scales=scales)
    listed = inner.raw.get("exclude_modules") or inner.raw.get("ignore") or []
    ignored = ["re:.*" + re.escape(name).replace(r"\*", ".*") + "$" for name in read_names(read, listed)]
    rule = Rule(targets=("Linear",), scheme=Scheme("float8_e4m3fn", 0, 0), quantizes_input=True, has_input_scale=True)
    return Quantization(rules=(rule,), ignored=("re:.*lm_head$", *ignored), has_kv_scales=scales)


def _modelopt_kv(read: Reader) -> bool:
    if read.raw.get("kv_cache_scheme") is not None:
        return has_kv_scales(read)
    algorithm = read.raw.get("kv_cache_quant_algo")
    if algorithm not in (None, "FP8"):
        raise ValueError(f"{read.where}: kv_cache_quant_algo is {algorithm!r}, wanted 'FP8' or null")
    return algorithm == "FP8"


def _number(read: Reader, *names: str) -> int:
    """Return a whole number under the first of its names that is there; -1 stands for all."""
    got = next((read.raw[name] for name in names if read.raw.get(name) is not None), None)
    if type(got) is not int or got < -1 or got == 0:
        raise ValueError(f"{read.where}: {names[0]} is {got!r}, wanted a whole number, or -1 for all")
    return got


_METHODS: dict[str, Callable[[Reader], Quantization]] = {
    "fp8": _fp8, "compressed-tensors": read_compressed_tensors, "awq": _awq, "gptq": _gptq,
    "bitsandbytes": _bitsandbytes, "modelopt": _modelopt,
}  # fmt: skip
