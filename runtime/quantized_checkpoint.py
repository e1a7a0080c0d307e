"""Checkpoints that are published quantized: which weights config.json's `quantization_config` says are stored how.

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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from seamwise.model_defs.hf_config import Reader
from seamwise.passes import Held, Scheme, StoredWeight

_DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "int8": torch.int8}
_FORMATS = {("int", 8): "int8", ("float", 8): "float8_e4m3fn", ("int", 4): "int4"}
_LAYOUTS = ("int-quantized", "float-quantized", "naive-quantized", "pack-quantized")
_FP8_OPTIONS = {
    "quant_method", "fmt", "activation_scheme", "weight_block_size", "scale_fmt", "modules_to_not_convert",
    "ignored_layers", "dequantize",
}  # fmt: skip
# Keys with no bearing on a compressed checkpoint's meaning: how it was made, and by which version.
_CT_INFORMS = {"version", "quantization_status", "global_compression_ratio", "quant_method"}
_CT_UNSERVED = ("sparsity_config", "transform_config", "moe_sparsity_config", "kv_cache_scheme")
_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_GROUP_OPTIONS = {"targets", "weights", "input_activations", "output_activations", "format"}
_WEIGHT_OPTIONS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How the weights of the layers that a target names are stored.

    targets  names of modules, "re:" and a pattern that their start matches, or names of classes
    """

    targets: tuple[str, ...]
    scheme: Scheme
    scale_name: str
    has_zero: bool = False
    quantizes_input: bool = False
    has_input_scale: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantization:
    """Rules, of which the most specific that names a layer holds; and what is ignored, named alike."""

    rules: tuple[Rule, ...]
    ignored: tuple[str, ...]

    @classmethod
    def read(cls, raw: Mapping[str, Any], where: str) -> Quantization | None:
        """Read a config.json; None where nothing is left to a loader. Raises ValueError for what is not served."""
        found = raw.get("quantization_config")
        if found is None:
            return None
        read = Reader(Reader(raw, where).part("quantization_config"), f"{where}: quantization_config")
        method = read.choice("quant_method", ("fp8", "compressed-tensors", "mxfp4"))
        if method == "mxfp4":
            _refuse_unknown(read, {"quant_method", "modules_to_not_convert"})
            return None
        return _fp8(read) if method == "fp8" else _compressed_tensors(read)

    def stored_weights(self, model: nn.Module) -> dict[str, StoredWeight]:
        """Return name -> form of each weight of a model that its checkpoint holds quantized.

        Experts' weights are stacked in the model, and linear layers one by one to the configuration. Raises ValueError
        for a target that names no linear layer, and for experts that are not all stored alike, or not as blocks.
        """
        stored: dict[str, StoredWeight] = {}
        tied, met = _shared(model), set()
        for name, module in model.named_modules():
            classes = {c.__name__ for c in type(module).__mro__} | {getattr(module, "published_class", "Module")}
            weight = getattr(module, "weight", None)
            if "Linear" in classes and isinstance(weight, nn.Parameter) and id(weight) not in tied:
                rule, targets = self._rule_of(name, classes)
                met |= targets
                stored |= {f"{name}.weight": _stored(name, weight.shape, rule)} if rule else {}
            for leaf, parts in _EXPERT_PARTS.items():
                weight = getattr(module, leaf, None)
                if isinstance(weight, nn.Parameter) and weight.dim() == 3:
                    each = [f"{name}.{e}.{part}" for e in range(weight.shape[0]) for part in parts]
                    found = [self._rule_of(one, {"Linear", "Module"}) for one in each]
                    met |= {target for _, targets in found for target in targets}
                    if any(rule is not found[0][0] for rule, _ in found):
                        raise ValueError(f"quantization_config: experts of {name} are not all stored alike; wanted so")
                    if (rule := found[0][0]) is not None:
                        stored[f"{name}.{leaf}"] = _stored_experts(f"{name}.{leaf}", weight.shape, len(parts), rule)
        for target in [t for rule in self.rules for t in rule.targets if t not in met]:
            raise ValueError(f"quantization_config: target {target!r} names no linear layer of {type(model).__name__}")
        return stored

    def _rule_of(self, name: str, classes: set[str]) -> tuple[Rule | None, set[str]]:
        """Return the rule that holds for a layer, if any, and every target that names it."""
        if any(_specific(one, name, classes) for one in self.ignored):
            return None, set()
        named = [(_specific(t, name, classes), rule, t) for rule in self.rules for t in rule.targets]
        named = [one for one in named if one[0]]
        return max(named, key=lambda one: one[0])[1] if named else None, {target for _, _, target in named}


def _specific(target: str, name: str, classes: set[str]) -> int:
    """Return how specifically a target names a module: 3 by its name, 2 by a pattern, 1 by its class, 0 not at all."""
    if target.startswith("re:"):
        return 2 * bool(re.match(target.removeprefix("re:"), name))
    return 3 if target == name else int(target in classes)


def _shared(model: nn.Module) -> set[int]:
    """Return the ids of parameters that several modules share: a tied head is the embedding, which stays as it is."""
    owners = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    return {one for one in owners if owners.count(one) > 1} if len(set(owners)) < len(owners) else set()


def _stored(module: str, shape: torch.Size, rule: Rule) -> StoredWeight:
    N, K = shape
    rows, columns = rule.scheme.rows, rule.scheme.columns
    scales: tuple[int, ...] = (
        (-(-N // rows) if rows else 1, -(-K // columns) if columns else 1) if rows or columns else (1,)
    )
    packed = rule.scheme.format == "int4"
    weight = Held(f"{module}.weight", (N, K), None if packed else _DTYPES[rule.scheme.format])
    zero = None
    if packed:
        weight = Held(f"{module}.weight_packed", (N, -(-K // 8)), torch.int32)
    if rule.has_zero:
        zero_form = ((-(-N // 8), scales[1]), torch.int32) if packed else (scales, torch.int8)
        zero = Held(f"{module}.weight_zero_point", *zero_form)
    return StoredWeight(
        scheme=rule.scheme, stored=weight, scale=Held(f"{module}.{rule.scale_name}", scales), zero=zero,
        input_scale=Held(f"{module}.input_scale", (1,)) if rule.has_input_scale else None,
        quantizes_input=rule.quantizes_input,
    )  # fmt: skip


def _stored_experts(name: str, shape: torch.Size, parts: int, rule: Rule) -> StoredWeight:
    """Return how a stacked weight (E, N, K) of `parts` projections each is held. Raises ValueError where it cannot."""
    E, N, K = shape
    rows, columns = rule.scheme.rows, rule.scheme.columns
    if rule.has_zero or rule.has_input_scale or not rows or N // parts % rows:
        raise ValueError(
            f"quantization_config: {name}, experts of {N // parts} rows in {rule}, is not served; wanted channels,"
            " groups or blocks that divide the rows, no zero points and no input scales"
        )
    packed = rule.scheme.format == "int4"
    held = Held(name, (E, N, K), None if packed else _DTYPES[rule.scheme.format])
    if packed:
        held = Held(f"{name}_packed", (E, N, -(-K // 8)), torch.int32)
    scale = Held(f"{name}{rule.scale_name.removeprefix('weight')}", (E, N // rows, -(-K // columns) if columns else 1))
    return StoredWeight(scheme=rule.scheme, stored=held, scale=scale, quantizes_input=rule.quantizes_input)


def _fp8(read: Reader) -> Quantization:
    _refuse_unknown(read, _FP8_OPTIONS)
    read.choice("fmt", ("e4m3",), "e4m3")
    read.choice("activation_scheme", ("dynamic",), "dynamic")
    read.choice("scale_fmt", ("float",), "float")
    if read.flag("dequantize"):
        raise ValueError(f"{read.where}: dequantize is true, wanted false: layers read the stored weights")
    rows, columns = _block(read, "weight_block_size")
    listed = read.raw.get("modules_to_not_convert") or read.raw.get("ignored_layers")
    # transformers' rule: an entry names a module, those inside it, or the end of a name; without a list the head stays.
    boundary = r"(?:(?<=\.)|(?=\.|$))"
    ignored = [r"re:.*lm_head$"]
    if listed:
        ignored = [rf"re:(?:{n}){boundary}|.*{re.escape(n)}$" for n in _names(read, listed)]
    scheme = Scheme("float8_e4m3fn", rows, columns)
    rule = Rule(targets=("Linear",), scheme=scheme, scale_name="weight_scale_inv", quantizes_input=True)
    return Quantization(rules=(rule,), ignored=tuple(ignored))


def _compressed_tensors(read: Reader) -> Quantization:
    _refuse_unknown(read, {"config_groups", "format", "ignore", *_CT_INFORMS, *_CT_UNSERVED})
    for option in _CT_UNSERVED:
        if read.raw.get(option):
            raise ValueError(f"{read.where}: {option} is {read.raw[option]!r}, which is not served; wanted null")
    groups = read.part("config_groups")
    if not groups:
        raise ValueError(f"{read.where}: config_groups is empty, wanted how weights are stored")
    rules = []
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise ValueError(f"{read.where}: {name} is {group!r}, wanted an object with targets and weights")
        set_ = {key: given for key, given in group.items() if given is not None}
        rules.append(_rule(Reader({"format": read.raw.get("format"), **set_}, f"{read.where}: {name}")))
    return Quantization(rules=tuple(rules), ignored=tuple(_names(read, read.raw.get("ignore") or [])))


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
        targets=tuple(_names(read, read.raw.get("targets"))), scheme=scheme, scale_name="weight_scale",
        has_zero=not symmetric, quantizes_input=bool(inputs.raw),
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
