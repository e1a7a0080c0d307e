"""From a configuration to a compiled program, and from a checkpoint to the weights it reads."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from seamwise.compile.derive import evaluate, parameters_of
from seamwise.compile.program import Program
from seamwise.compile.startup_times import Ledger
from seamwise.runtime.weights.checkpoint import (
    Convert,
    Source,
    kept_dtypes,
    open_source,
    parameter_shapes,
    show_progress,
)
from seamwise.runtime.weights.files import StoredTensor
from seamwise.runtime.weights.foreign import as_transformers_reads
from seamwise.runtime.weights.quantized_checkpoint import stored_weights

from .drawn_steps import draw_steps
from .hidden_states import return_hidden_states, without_head
from .kv_spec import KVCacheSpec
from .model_config import ModelConfig
from .runner_config import RunnerConfig
from .step import capture_dims, example_arguments

if TYPE_CHECKING:
    from seamwise.compile.capture import Captured
    from seamwise.passes import Report, StoredWeight, Structure

_LOG = logging.getLogger(__name__)
_TRIM_BYTES = 32 << 20  # of weights read between two returns of freed memory


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturedModel:
    """A traced model: its graph, what its structure promises, its computed buffers; of what a checkpoint holds, shapes,
    tied names, and the dtypes that are not the model's; what was done to read weights that are stored quantized; its
    own plan for ranks to share it; what it caches."""

    captured: Captured
    structure: Structure
    buffers: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    kept_dtypes: dict[str, torch.dtype | None]
    reports: list[Report]
    plan: dict[str, str] | None
    kv_spec: KVCacheSpec


def capture_model(config: ModelConfig, options: RunnerConfig, ledger: Ledger) -> CapturedModel:
    """Build the module without weights and trace it on fake tensors."""
    with ledger.stage("import compiler"):
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        from seamwise.compile.kv_groups import group_caches
        from seamwise.compile.structure import structure_of
        from seamwise.model_defs import build_model
    with ledger.stage("build model"):
        model = build_model(config.architecture, config.raw, entry=options.entry, max_model_len=options.max_model_len)
        shapes, tied = parameter_shapes(model)
        buffers = {name: b for name, b in model.named_buffers() if name not in shapes}
        structure = structure_of(model, foreign=options.entry == "transformers")
        if options.return_hidden_states or options.pooler is not None:
            return_hidden_states(model, alone=options.pooler is not None)
        if options.pooler is not None:
            shapes, tied = without_head(shapes), without_head(tied)
        fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
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
        captured=captured, structure=structure, buffers=buffers, shapes=shapes, tied=tied,
        kept_dtypes={**kept_dtypes(model)}, reports=[],
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
    count, s = passes.promised(stored), model.structure
    every = count == s.linears - 2 * s.attentions - s.latent_attentions - s.gate_up_pairs
    dense = not any(len(shape) == 3 for shape in model.shapes.values())  # a router reads what experts do, as it is
    inputs = every and dense and all(weight.quantizes_input for weight in stored.values())
    return replace(
        model,
        structure=replace(s, quantized_linears=count, quantized_activations=inputs),
        shapes={n: shape for n, shape in model.shapes.items() if n not in stored} | {t.name: t.shape for t in held},
        kept_dtypes=model.kept_dtypes | {t.name: t.dtype for t in held},
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
        structure=replace(model.structure, quantized_caches=True),
        buffers=model.buffers | ({} if has_scales else {name: torch.ones(1) for name in scales}),
        shapes=model.shapes | (dict.fromkeys(scales, (1,)) if has_scales else {}),
        kept_dtypes=model.kept_dtypes | (dict.fromkeys(scales, torch.float32) if has_scales else {}),
        reports=[*model.reports, report],
    )


def compile_model(config: ModelConfig, options: RunnerConfig, ledger: Ledger) -> tuple[Program, dict[str, Tensor]]:
    """Capture a model and run the pipeline; return the program and the buffers that its weights read."""
    from seamwise.compile.check.validate import Validator
    from seamwise.compile.pipeline import compile_graph

    model = capture_model(config, options, ledger)
    pipeline, validator = options.pipeline, None
    if pipeline.parallel is not None and pipeline.parallel.plan is None:
        pipeline = replace(pipeline, parallel=replace(pipeline.parallel, plan=model.plan))
    if pipeline.validate:
        with ledger.stage("validate"):
            cases = draw_steps(config, model.kv_spec, adapters=pipeline.max_loras > 0)
            validator = Validator(model.captured, cases, model.buffers)
    program = compile_graph(model.captured, model.structure, pipeline, ledger, validator)
    program.parameters, program.tied = {name: list(shape) for name, shape in model.shapes.items()}, model.tied
    program.kept_dtypes = {
        n: None if d is None else str(d).removeprefix("torch.") for n, d in model.kept_dtypes.items()
    }
    cached = (name.split("_") for name in program.inputs if name.startswith("kv_caches"))
    layers = sorted({int(name[2]) for name in cached})  # of this stage
    program.kv_layers = [[[*shape] for shape in model.kv_spec.layers[layer]] for layer in layers]
    program.kv_groups = list(model.kv_spec.groups)
    program.reports = [*model.reports, *program.reports]
    needed = {name for recipe in program.recipes.values() for name in parameters_of(recipe)}
    return program, {name: b for name, b in model.buffers.items() if name in needed}


def load_step_weights(
    path: Path, options: RunnerConfig, program: Program, buffers: dict[str, Tensor],
    given: Mapping[str, Tensor] | None = None,
) -> list[Tensor]:  # fmt: skip
    """Evaluate every recipe of the program over the checkpoint, one at a time: memory is the model plus one recipe.

    given  weights, by their recipes' names, that are there already
    """
    shapes = {name: tuple(shape) for name, shape in program.parameters.items()}
    source = open_source(
        path, shapes, program.tied, dtype=options.dtype, device=options.device, load_format=options.load_format,
        seed=options.seed, kept_dtypes={n: getattr(torch, d) if d else None for n, d in program.kept_dtypes.items()},
        ranks=options.num_ranks, convert=converting(path, options, shapes),
        read=reading(options, shapes),
    )  # fmt: skip
    readers = readers_of(source, buffers, options)
    weights: dict[str, Tensor] = {**(given or {})}
    freed_bytes = 0  # about as much is freed as is kept

    def size(name: str) -> int:
        return sum(math.prod(shapes.get(read, ())) for read in parameters_of(program.recipes[name]))

    with torch.inference_mode():  # the largest first: what is read and then freed comes beside little else
        missing = program.recipes.keys() - weights.keys()
        for name in show_progress(sorted(missing, key=size, reverse=True), "loading weights"):
            weights[name] = evaluate(program.recipes[name], *readers).to(options.device)
            freed_bytes += weights[name].nbytes
            if freed_bytes > _TRIM_BYTES:
                freed_bytes = 0
                _return_freed_memory()
    _return_freed_memory()
    return [weights[name] for name in program.recipes]


def reading(options: RunnerConfig, shapes: Mapping[str, tuple[int, ...]]) -> Convert | None:
    """Return what reads a checkpoint's own quantized layout as the one that layers read, and what pools without a head;
    None where it is that."""
    published = None if options.stored is None else options.stored.published
    read = None if published is None else partial(published.read, parameters=shapes, dtype=options.dtype)
    if options.pooler is None:
        return read
    return without_head if read is None else lambda found: read(without_head(found))


def converting(path: Path, options: RunnerConfig, shapes: Mapping[str, tuple[int, ...]]) -> Convert | None:
    """Return what fits a published checkpoint's tensors to a transformers class; our own definitions need nothing."""
    if options.entry != "transformers":
        return None

    def convert(found: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
        config = ModelConfig.from_directory(path, options.hf_overrides)
        return as_transformers_reads(found, shapes, config.architecture, config.raw)

    return convert


def _return_freed_memory() -> None:
    """Give the system back what glibc keeps between what is in use: 96 MiB after loading SmolLM2-135M's 257."""
    if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def readers_of(
    source: Source, buffers: Mapping[str, Tensor], options: RunnerConfig
) -> tuple[Callable[[str], Tensor], Callable[[str, int, int, int], Tensor]]:
    """Return what `evaluate` reads with: a parameter or buffer by name, whole, and a range of one."""

    def parameter(name: str) -> Tensor:
        if name in buffers:
            return buffers[name].to(options.device)
        return source.read(name, dtype=options.dtype, device=options.device)

    def part(name: str, dim: int, start: int, end: int) -> Tensor:
        if name in buffers:
            return buffers[name].narrow(dim, start, end - start).to(options.device)
        return source.read(name, dtype=options.dtype, device=options.device, part=(dim, start, end))

    return parameter, part


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
