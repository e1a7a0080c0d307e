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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from seamwise.model_defs.hf_config import Reader
from seamwise.passes import Scheme
from seamwise.runtime.weights.gguf.quants import PACKED

from .published import Published

_FORMATS = {("int", 8): "int8", ("float", 8): "float8_e4m3fn", ("int", 4): "int4"}
_LAYOUTS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
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
# Keys with no bearing on a compressed checkpoint's meaning: how it was made, and by which version.
_CT_INFORMS = {"version", "quantization_status", "global_compression_ratio", "quant_method"}
_CT_UNSERVED = ("sparsity_config", "transform_config", "moe_sparsity_config")
_GROUP_OPTIONS = {"targets", "weights", "input_activations", "output_activations", "format"}
_WEIGHT_OPTIONS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How the weights of the layers that a target names are stored.

    targets  names of modules, "re:" and a pattern that their start matches, or names of classes
    stored, scale  how the names of what is stored and of its scale end, after the weight's
    has_zero, has_offset  whether there are zero points, or offsets
    """

    targets: tuple[str, ...]
    scheme: Scheme
    stored: str = ""
    scale: str = "_scale"
    has_zero: bool = False
    has_offset: bool = False
    quantizes_input: bool = False
    has_input_scale: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Rules, of which the most specific that names a layer holds; and what is ignored, named alike.

    has_kv_scales  whether each attention has k_scale and v_scale, for a KV cache of float8_e4m3fn
    holds_kv_scales  whether it has them though its configuration asks for no such cache
    published  how files hold that, where their layout is another
    """

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...] = ()
    has_kv_scales: bool = False
    holds_kv_scales: bool = False
    published: Published | None = None


def read_quantization(raw: Mapping[str, Any], where: str) -> Quantization | None:
    """Read a config.json; None where nothing is left to a loader. Raises ValueError for what is not served."""
    if raw.get("quantization_config") is None:
        return None
    read = Reader(Reader(raw, where).part("quantization_config"), f"{where}: quantization_config")
    method = read.choice("quant_method", (*_METHODS, "mxfp4"))
    if method == "mxfp4":
        _refuse_unknown(read, {"quant_method", "modules_to_not_convert"})
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


def _gguf_rule(kinds: Mapping[str, str], kind: str) -> Rule:
    form, targets = PACKED[kind], tuple(name for name, one in kinds.items() if one == kind)
    scheme = Scheme(form.format, 1, form.group)
    return Rule(targets=targets, scheme=scheme, stored="_packed", has_offset=form.has_offset)


def _fp8(read: Reader) -> Quantization:
    _refuse_unknown(read, _FP8_OPTIONS)
    read.choice("fmt", ("e4m3",), "e4m3")
    static = read.choice("activation_scheme", ("dynamic", "static"), "dynamic") == "static"
    read.choice("scale_fmt", ("float",), "float")
    if read.flag("dequantize"):
        raise ValueError(f"{read.where}: dequantize is true, wanted false: layers read the stored weights")
    whole = read.raw.get("weight_block_size") is None  # one scale a weight
    rows, columns = (0, 0) if whole else _block(read, "weight_block_size")
    if static and not whole:
        raise ValueError(f"{read.where}: activation_scheme is 'static' with weights in blocks; wanted 'dynamic'")
    listed = read.raw.get("modules_to_not_convert") or read.raw.get("ignored_layers")
    # transformers' rule: an entry names a module, those inside it, or the end of a name; without a list the head stays.
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    ignored = [r"re:.*lm_head$"]
    if listed:
        ignored = [rf"re:(?:{n}){boundary}|.*{re.escape(n)}$" for n in _names(read, listed)]
    scheme = Scheme("float8_e4m3fn", rows, columns)
    rule = Rule(
        targets=("Linear",), scheme=scheme, scale="_scale" if whole else "_scale_inv", quantizes_input=True,
        has_input_scale=static,
    )  # fmt: skip
    return Quantization(rules=(rule,), ignored=tuple(ignored))


def _awq(read: Reader) -> Quantization:
    _refuse_unknown(read, _AWQ_OPTIONS)
    if _number(read, "bits", "w_bit") != 4:
        raise ValueError(f"{read.where}: bits is {read.raw.get('bits')!r}, wanted 4")
    if str(read.raw.get("version", "gemm")).lower() != "gemm":
        raise ValueError(f"{read.where}: version is {read.raw['version']!r}, wanted 'gemm'")
    if read.flag("zero_point", True) is False:
        raise ValueError(f"{read.where}: zero_point is false, wanted true")
    group = _number(read, "group_size", "q_group_size")
    listed = _names(read, read.raw.get("modules_to_not_convert") or [])
    return _in_words(Published(method="awq", group=max(group, 0)), [re.escape(name) for name in listed])


def _gptq(read: Reader) -> Quantization:
    _refuse_unknown(read, _GPTQ_OPTIONS)
    bits, group = read.size("bits"), _number(read, "group_size")
    if bits not in (4, 8):
        raise ValueError(f"{read.where}: bits is {bits}, wanted 4 or 8")
    for option in ("dynamic", "lm_head"):
        if read.raw.get(option):
            raise ValueError(f"{read.where}: {option} is {read.raw[option]!r}, which is not served; wanted null")
    layout = read.choice("checkpoint_format", ("gptq", "gptq_v2"), "gptq")
    listed = read.raw.get("modules_in_block_to_quantize")
    inside = [name for names in listed for name in (names if isinstance(names, list) else [names])] if listed else []
    published = Published(
        method="gptq", bits=bits, group=max(group, 0), symmetric=read.flag("sym", True), plain=read.flag("desc_act"),
        zeros_less_one=layout == "gptq",
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
    ignored = ["re:.*" + re.escape(name).replace(r"\*", ".*") + "$" for name in _names(read, listed)]
    rule = Rule(targets=("Linear",), scheme=Scheme("float8_e4m3fn", 0, 0), quantizes_input=True, has_input_scale=True)
    return Quantization(rules=(rule,), ignored=("re:.*lm_head$", *ignored), has_kv_scales=scales)


def _modelopt_kv(read: Reader) -> bool:
    if read.raw.get("kv_cache_scheme") is not None:
        return _has_kv_scales(read)
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


def _compressed_tensors(read: Reader) -> Quantization:
    _refuse_unknown(read, {"config_groups", "format", "ignore", "kv_cache_scheme", *_CT_INFORMS, *_CT_UNSERVED})
    for option in _CT_UNSERVED:
        if read.raw.get(option):
            raise ValueError(f"{read.where}: {option} is {read.raw[option]!r}, which is not served; wanted null")
    if str(read.raw.get("format")).startswith("nvfp4"):
        return Quantization(rules=(), published=Published(method="nvfp4", group=16, plain=True))
    groups = read.part("config_groups")
    if not groups:
        raise ValueError(f"{read.where}: config_groups is empty, wanted how weights are stored")
    rules = []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise ValueError(f"{read.where}: {name} is {group!r}, wanted an object with targets and weights")
        set_ = {key: given for key, given in group.items() if given is not None}
        rules.append(_rule(Reader({"format": read.raw.get("format"), **set_}, f"{read.where}: {name}")))
    ignored = tuple(_names(read, read.raw.get("ignore") or []))
    return Quantization(rules=tuple(rules), ignored=ignored, has_kv_scales=_has_kv_scales(read))


def _has_kv_scales(read: Reader) -> bool:
    scheme = Reader(read.part("kv_cache_scheme"), f"{read.where}: kv_cache_scheme")
    _refuse_unknown(scheme, _WEIGHT_OPTIONS)
    served = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    given = served | {"type": "int"} | {name: scheme.raw[name] for name in served if name in scheme.raw}
    if scheme.raw and (given != served or scheme.raw.get("group_size") is not None):
        raise ValueError(f"{scheme.where}: {dict(scheme.raw)} is not served; wanted {served}")
    return bool(scheme.raw)


def _rule(read: Reader) -> Rule:
    """Read one of compressed-tensors' config_groups."""
    _refuse_unknown(read, _GROUP_OPTIONS)
    layout = read.choice("format", _LAYOUTS)
    if read.raw.get("output_activations"):
        raise ValueError(f"{read.where}: output_activations is not served, wanted null")
    weights = Reader(read.part("weights"), f"{read.where}: weights")
    _refuse_unknown(weights, _WEIGHT_OPTIONS)
    format, symmetric = _format(weights), weights.flag("symmetric", True)
    if (format == "int4") != (layout == "pack-quantized"):
        raise ValueError(
            f"{weights.where}: {format} in format {layout!r} is not served; wanted int4 in 'pack-quantized'"
        )
    if format == "float8_e4m3fn" and not symmetric:
        raise ValueError(f"{weights.where}: symmetric is false, wanted true for float weights")
    if weights.raw.get("dynamic") or weights.raw.get("actorder") not in (None, False, "weight", "static"):
        raise ValueError(
            f"{weights.where}: dynamic {weights.raw.get('dynamic')!r}, actorder {weights.raw.get('actorder')!r}; wanted"
            " stored weights in the order of their columns: dynamic false, actorder null or 'weight'"
        )
    scheme = Scheme(format, *_weight_blocks(weights, format))
    inputs = Reader(read.part("input_activations"), f"{read.where}: input_activations")
    return Rule(
        targets=tuple(_names(read, read.raw.get("targets"))), scheme=scheme,
        stored="_packed" if format == "int4" else "", has_zero=not symmetric, quantizes_input=bool(inputs.raw),
        has_input_scale=bool(inputs.raw) and _has_input_scale(inputs, scheme),
    )  # fmt: skip


def _weight_blocks(read: Reader, format: str) -> tuple[int, int]:
    """Return the rows and columns that share a scale, 0 for all."""
    group = read.raw.get("group_size")
    inferred = "tensor" if group is None else "channel" if group == -1 else "group"
    known = ("channel", "group") if format == "int4" else ("tensor", "channel", "group", "block")
    strategy = read.choice("strategy", known, inferred)
    if strategy == "block":
        return _block(read, "block_structure")
    return {"tensor": (0, 0), "channel": (1, 0)}[strategy] if strategy != "group" else (1, read.size("group_size"))


def _has_input_scale(read: Reader, scheme: Scheme) -> bool:
    """Return whether a layer's input has a stored scale. Raises ValueError for inputs that no kernel quantizes so."""
    _refuse_unknown(read, _WEIGHT_OPTIONS)
    dynamic, strategy = read.flag("dynamic"), read.raw.get("strategy")
    blocks = scheme.rows > 1 and scheme.columns > 1
    wanted = ("group" if blocks else "token") if dynamic else "tensor"
    problems = {
        "num_bits and type": _format(read) != scheme.format or scheme.format == "int4",
        "symmetric": not read.flag("symmetric", True),
        "strategy": (strategy or ("tensor" if not dynamic else None)) != wanted or (blocks and not dynamic),
        "group_size": blocks and read.raw.get("group_size") != scheme.columns,
    }
    if wrong := [name for name, bad in problems.items() if bad]:
        shown = {n: read.raw.get(n) for n in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")}
        raise ValueError(
            f"{read.where}: {shown} with {scheme.format} weights is not served ({', '.join(wrong)}); wanted null or"
            f" symmetric 8 bits of the weights' type, dynamic for each token (each group where weights are in blocks),"
            " or one stored scale"
        )
    return not dynamic


def _format(read: Reader) -> str:
    kind = (read.choice("type", ("int", "float"), "int"), read.size("num_bits", 8))
    if kind not in _FORMATS:
        raise ValueError(f"{read.where}: {kind[1]} bits of type {kind[0]!r}; wanted 8 bits of either, or 4 of 'int'")
    return _FORMATS[kind]


def _block(read: Reader, name: str) -> tuple[int, int]:
    given = read.raw.get(name)
    if not isinstance(given, list) or len(given) != 2 or any(type(n) is not int or n < 1 for n in given):
        raise ValueError(f"{read.where}: {name} is {given!r}, wanted the rows and columns of a block, like [128, 128]")
    return given[0], given[1]


def _names(read: Reader, given: Any) -> list[str]:
    if not isinstance(given, list) or not all(isinstance(n, str) for n in given):
        raise ValueError(f"{read.where}: {given!r} is not a list of names or patterns of modules")
    for name in given:
        try:
            re.compile(name.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"{read.where}: {name!r} is not a pattern of modules: {error}") from error
    return given


def _refuse_unknown(read: Reader, known: set[str]) -> None:
    if unknown := sorted({*read.raw} - known):
        raise ValueError(f"{read.where}: {', '.join(unknown)} would be ignored; wanted only {', '.join(sorted(known))}")


_METHODS: dict[str, Callable[[Reader], Quantization]] = {
    "fp8": _fp8, "compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq, "bitsandbytes": _bitsandbytes,
    "modelopt": _modelopt,
}  # fmt: skip
