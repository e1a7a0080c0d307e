"""From a configuration to the graph of one step: the module is built without weights and traced on fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seamwise.caches import name_nameless_user
from seamwise.compile.parameter import Parameter, dtype_name, parameters_in
from seamwise.compile.startup_times import Ledger
from seamwise.runtime.weights.quantized_checkpoint import stored_weights

from .hidden_states import return_hidden_states, without_head
from .kv_spec import KVCacheSpec
from .model_config import ModelConfig
from .runner_config import RunnerConfig
from .step import capture_dims, example_arguments

if TYPE_CHECKING:
    from seamwise.compile.capture import Captured
    from seamwise.passes import Report, StoredWeight, Structure

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedModel:
    """A traced model: its graph, what its structure promises, its computed buffers; what a checkpoint holds of it; what
    was done to read weights that are stored quantized; its own plan for ranks to share it; what it caches."""

    captured: Captured
    structure: Structure
    buffers: dict[str, Tensor]
    parameters: dict[str, Parameter]
    reports: list[Report]
    plan: dict[str, str] | None
    kv_spec: KVCacheSpec


def capture_model(config: ModelConfig, options: RunnerConfig, ledger: Ledger) -> CapturedModel:
    """Build the module without weights and trace it on fake tensors."""
    with ledger.stage("import compiler"):
        name_nameless_user()
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        from seamwise.compile.group_caches import group_caches
        from seamwise.compile.structure import structure_of
        from seamwise.model_defs import build_model
    with ledger.stage("build model"):
        model = build_model(config.architecture, config.raw, entry=options.entry, max_model_len=options.max_model_len)
        parameters = parameters_in(model)
        buffers = {name: b for name, b in model.named_buffers() if name not in parameters}
        structure = structure_of(model, foreign=options.entry == "transformers")
        if options.return_hidden_states or options.pooler is not None:
            return_hidden_states(model, alone=options.pooler is not None)
        if options.pooler is not None:
            parameters = without_head(parameters)
        fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        fake.cache_enabled = False  # keeping results on symbolic sizes takes longer than computing them again
        with fake:
            _make_fake(model, options)
    with ledger.stage("capture"):
        with fake:
            spec = _kv_spec(model, config, options)
            arguments = example_arguments(spec.layers, spec.dtype, options.device)
        captured = _captured(model, arguments, spec)
        buffers |= captured.constants
        padded = options.data_parallel_size > 1 or options.pipeline_parallel_size > 1  # by rows of one group, or cut
        if not (padded or options.disable_hybrid_kv_cache_manager):
            captured, groups = group_caches(captured, len(spec.layers))
            spec = replace(spec, groups=tuple(groups))
    made = CapturedModel(
        captured=captured, structure=structure, buffers=buffers, parameters=parameters, reports=[],
        plan=getattr(model, "tp_plan", None), kv_spec=spec,
    )  # fmt: skip
    if options.pipeline.max_loras:
        made = replace(made, captured=_with_adapters(captured, options))
    if options.stored is not None:
        stored = stored_weights(options.stored, model)
        if options.pipeline.max_loras and (found := [n for n, weight in stored.items() if weight.quantizes_input]):
            raise ValueError(
                f"enable_lora: the input of {found[0]} is quantized, adapters read it as it is; leave it out"
            )
        made = _stored_quantized(made, stored)
    if options.kv_cache_dtype == options.dtype:
        return made
    return _quantized_kv(
        made, options.stored is not None and (options.stored.has_kv_scales or options.stored.holds_kv_scales)
    )


def _with_adapters(captured: Captured, options: RunnerConfig) -> Captured:
    """Give the step an input that says which adapter each of its rows has, for the pass that reads it."""
    from seamwise.passes import AdapterRoom
    from seamwise.passes.add_adapters import INPUT

    for node in captured.graph.find_nodes(op="placeholder"):
        node.meta["parameter"] = captured.weights.get(node.name, "")  # the pass knows layers by their weights' names
    (ids,) = (n for n in captured.graph.find_nodes(op="placeholder") if n.name == "token_ids")
    room = AdapterRoom(max_loras=options.pipeline.max_loras, max_rank=options.pipeline.max_lora_rank)
    return captured.with_input(INPUT, torch.empty_like(ids.meta["val"], dtype=torch.int32), adapters=room)


def _captured(model: nn.Module, arguments: Mapping[str, Any], spec: KVCacheSpec) -> Captured:
    """Trace a model: of our decoders one layer of each kind, of transformers' classes all layers."""
    from seamwise.compile.capture import capture
    from seamwise.compile.repeat_layers import CannotRepeat, capture_repeated
    from seamwise.model_defs.blocks import Decoder

    dims, decoder = capture_dims(spec.layers), getattr(model, "model", None)
    if isinstance(decoder, Decoder):
        kinds = [(kind, shapes) for kind, shapes in zip(decoder.kinds(), spec.layers, strict=True)]
        try:
            return capture_repeated(
                model, arguments, dims, path="model.layers", kinds=kinds, only=decoder.only, per_layer="kv_caches"
            )
        except CannotRepeat as error:
            _LOG.warning("All layers of %s are traced, which takes longer: %s", type(model).__name__, error)
    return capture(model, arguments, dims)


def _kv_spec(model: nn.Module, config: ModelConfig, options: RunnerConfig) -> KVCacheSpec:
    """Return what a model caches: of transformers' classes what their attention is called with, on fake tensors."""
    attended = getattr(model, "attended", None)
    if attended is None:
        return KVCacheSpec.of(config, options)
    ids, rows = (torch.zeros(n, dtype=torch.int64, device=options.device) for n in (7, 2))
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    try:
        with torch.no_grad():
            return KVCacheSpec.of_calls(attended(ids, ids, rows), options)
    except GuardOnDataDependentSymNode as error:
        raise ValueError(
            f"{config.architecture} computes with values of tensors on the host, which a recorded step cannot: {error}"
        ) from error


def _stored_quantized(model: CapturedModel, stored: dict[str, StoredWeight]) -> CapturedModel:
    """Let a model read weights as its checkpoint stores them."""
    from seamwise import passes

    report = passes.stored_weights(stored, model.captured.weights).apply(model.captured.module, model.structure)
    held = [tensor for weight in stored.values() for tensor in weight.tensors.values()]
    return replace(
        model,
        parameters={n: p for n, p in model.parameters.items() if n not in stored}
        | {t.name: Parameter(shape=t.shape, dtype=dtype_name(t.dtype)) for t in held},
        reports=[report],
    )


def _quantized_kv(model: CapturedModel, has_scales: bool) -> CapturedModel:
    """Let a model cache in float8, by scales that its checkpoint has, else ones."""
    from seamwise import passes

    weights = model.captured.weights
    before = {*weights.values()}
    report = passes.quantize_kv(weights).apply(model.captured.module, model.structure)
    scales = [name for name in weights.values() if name not in before]
    if has_scales and (other := [name for name in scales if name.endswith(".cache_scale")]):
        raise ValueError(
            f"kv_cache_scheme: its scales are of keys and values, this model caches latents ({other[0]}); use"
            " entry='transformers', which expands them"
        )
    return replace(
        model,
        buffers=model.buffers | ({} if has_scales else {name: torch.ones(1) for name in scales}),
        parameters=model.parameters
        | (dict.fromkeys(scales, Parameter(shape=(1,), dtype="float32")) if has_scales else {}),
        reports=[*model.reports, report],
    )


def _make_fake(model: nn.Module, options: RunnerConfig) -> None:
    """Give parameters fake tensors of the runner's dtype and device, tied ones the same, and buffers fake ones too."""
    fakes: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) not in fakes:
                fake = torch.empty(p.shape, dtype=options.dtype, device=options.device)
                fakes[id(p)] = nn.Parameter(fake, requires_grad=False)
            setattr(module, name, fakes[id(p)])
        for name, b in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(b.shape, dtype=b.dtype, device=options.device))
