"""The `quantization_config` of compressed-tensors: groups of layers, each with a form of its weights and its inputs.

Source: https://github.com/vllm-project/compressed-tensors, quant_args.py and quant_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from seamwise.model_defs.hf_config import Reader
from seamwise.passes import Scheme

from .published_layouts import Published
from .quantization_rules import Quantization, Rule, read_block, read_names, refuse_unknown

_FORMATS = {("int", 8): "int8", ("float", 8): "float8_e4m3fn", ("int", 4): "int4"}
_LAYOUTS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
# Keys with no bearing on a compressed checkpoint's meaning: how it was made, and by which version.
_CT_INFORMS = {"version", "quantization_status", "global_compression_ratio", "quant_method"}
_CT_UNSERVED = ("sparsity_config", "transform_config", "moe_sparsity_config")
_GROUP_OPTIONS = {"targets", "weights", "input_activations", "output_activations", "format"}
_WEIGHT_OPTIONS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip


def read_compressed_tensors(read: Reader) -> Quantization:
    """Return what config_groups say. Raises ValueError for what is not served."""
    refuse_unknown(read, {"config_groups", "format", "ignore", "kv_cache_scheme", *_CT_INFORMS, *_CT_UNSERVED})
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
    ignored = tuple(read_names(read, read.raw.get("ignore") or []))
    return Quantization(rules=tuple(rules), ignored=ignored, has_kv_scales=has_kv_scales(read))


def has_kv_scales(read: Reader) -> bool:
    """Return whether keys and values have scales, by kv_cache_scheme. Raises ValueError for another scheme."""
    scheme = Reader(read.part("kv_cache_scheme"), f"{read.where}: kv_cache_scheme")
    refuse_unknown(scheme, _WEIGHT_OPTIONS)
    served = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    given = served | {"type": "int"} | {name: scheme.raw[name] for name in served if name in scheme.raw}
    if scheme.raw and (given != served or scheme.raw.get("group_size") is not None):
        raise ValueError(f"{scheme.where}: {dict(scheme.raw)} is not served; wanted {served}")
    return bool(scheme.raw)


def _rule(read: Reader) -> Rule:
    """Read one of compressed-tensors' config_groups."""
    refuse_unknown(read, _GROUP_OPTIONS)
    layout = read.choice("format", _LAYOUTS)
    if read.raw.get("output_activations"):
        raise ValueError(f"{read.where}: output_activations is not served, wanted null")
    weights = Reader(read.part("weights"), f"{read.where}: weights")
    refuse_unknown(weights, _WEIGHT_OPTIONS)
    format, symmetric = _format(weights), weights.flag("symmetric", True)
    if (format == "int4") != (layout == "pack-quantized"):
        raise ValueError(
            f"{weights.where}: {format} in format {layout!r} is not served; wanted int4 in 'pack-quantized'"
        )
    if format == "float8_e4m3fn" and not symmetric:
        raise ValueError(f"{weights.where}: symmetric is false, wanted true for float weights")
    scheme = Scheme(format, *_weight_blocks(weights, format))
    reordered = scheme.columns and weights.raw.get("actorder") not in (
        None,
        False,
        "weight",
        "static",
    )  # in groups only
    if weights.raw.get("dynamic") or reordered:
        raise ValueError(
            f"{weights.where}: dynamic {weights.raw.get('dynamic')!r}, actorder {weights.raw.get('actorder')!r}; wanted"
            " stored weights in the order of their columns: dynamic false, actorder null or 'weight'"
        )
    inputs = Reader(read.part("input_activations"), f"{read.where}: input_activations")
    return Rule(
        targets=tuple(read_names(read, read.raw.get("targets"))), scheme=scheme,
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
        return read_block(read, "block_structure")
    return {"tensor": (0, 0), "channel": (1, 0)}[strategy] if strategy != "group" else (1, read.size("group_size"))


def _has_input_scale(read: Reader, scheme: Scheme) -> bool:
    """Return whether a layer's input has a stored scale. Raises ValueError for inputs that no kernel quantizes so."""
    refuse_unknown(read, _WEIGHT_OPTIONS)
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
