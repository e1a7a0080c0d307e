"""Any transformers decoder, through its own class: attention and experts are replaced by the contracts, nothing else.

Source: AttentionInterface, https://huggingface.co/docs/transformers/attention_interface.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from . import hf_attention, hf_experts, hf_positions
from .hf_attention import Step
from .hf_masks import mask_in

# Of layers, by transformers' names: what begins so keeps more of a request than keys and values; what has neither.
_STATES = ("linear", "hybrid", "compressed", "heavily_compressed")
_NO_ATTENTION = {"moe", "mlp", "dense", "sparse"}
_BY_LENGTH = ("longrope", "dynamic")  # kinds of RoPE whose table transformers chooses anew at each step


class HuggingFaceDecoder(nn.Module):
    """A causal language model of transformers with the step's signature; parameter names stay the checkpoint's.

    Raises ValueError for an architecture that transformers does not have, or whose attention is not plain and causal.
    """

    def __init__(self, architecture: str, raw: Mapping[str, Any]) -> None:
        super().__init__()
        hf_attention.register()
        hf_experts.register()
        model_class, config = class_and_config(architecture, raw)
        # A class that does not use transformers' attention interface calls scaled_dot_product_attention, or spells out
        # what it computes.
        own = "sdpa" if model_class._supports_sdpa else "eager"
        through = hf_attention.IMPLEMENTATION if _uses_interface(model_class) else own
        _set_implementation(config, through)
        with _parameters_on_meta():
            model = _built(model_class, config)
        for module in model.modules():
            _fix_rope(module, config)
            _fix_masks(module)
            _fix_indexer(module, config)
        # The children are registered here under the checkpoint's names; the model itself only lends its forward.
        for name, child in model.named_children():
            self.add_module(name, child)
        if own_ones := {n for n, _ in model.named_parameters()} - {n for n, _ in self.named_parameters()}:
            raise ValueError(
                f"{architecture}: parameters beside its modules ({', '.join(sorted(own_ones))}) are not served"
            )
        self.architecture = architecture
        self.longest = getattr(config, "max_model_len", 1)
        self.tp_plan = {**model.tp_plan}
        if self.tp_plan and isinstance(getattr(model.base_model, "embed_tokens", None), nn.Embedding):
            embedding = {f"{model.base_model_prefix}.embed_tokens": "embedding_rowwise"}  # as transformers from 5.23 on
            self.tp_plan = embedding | self.tp_plan
        self._call: Callable[..., Any] = model.__call__  # a bound method: no child of this module
        self._own = through is not hf_attention.IMPLEMENTATION
        takes = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in takes
        self._alibi = hf_positions.alibi_makers(sys.modules[model_class.__module__])
        placed = hf_positions.place(model, self._takes_positions)
        hf_positions.tune(model)
        if not (self._takes_positions or self._alibi or placed):
            raise ValueError(f"{architecture}: its forward takes no position_ids, which requests in one step need")
        self.keeps_logits = "logits_to_keep" in takes
        self.eval()

    def forward(
        self, token_ids: Tensor, positions: Tensor, kv_caches: Sequence[Sequence[Tensor]], slot_mapping: Tensor,
        block_table: Tensor, seq_lens: Tensor, query_starts: Tensor, logit_rows: Tensor,
    ) -> Tensor:  # fmt: skip
        spans = (block_table, seq_lens, query_starts)
        step = Step(
            kv_caches=kv_caches, slot_mapping=slot_mapping, spans=spans, longest=self.longest,
            tokens=token_ids.shape[0], own=self._own,
        )  # fmt: skip
        logits_LV = self._run(step, token_ids, positions, logit_rows)
        if len(step.called) != len(kv_caches):
            raise ValueError(
                f"{self.architecture}: attention came {len(step.called)} times through transformers' attention"
                f" interface, wanted {len(kv_caches)}, once for each KV cache"
            )
        return logits_LV

    def attended(self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor) -> list[tuple[int, int]]:
        """Return the heads and the width of the keys in each call of attention, in order; computes nothing else."""
        nothing = token_ids.new_zeros(1)
        step = Step(
            kv_caches=None, slot_mapping=nothing, spans=(nothing,) * 3, longest=self.longest, tokens=token_ids.shape[0]
        )
        self._run(step, token_ids, positions, logit_rows)
        return step.called

    def _run(self, step: Step, token_ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        """Call the model on one row of all requests' tokens; return logits (L, V) of the wanted rows."""
        given: dict[str, Any] = {"input_ids": token_ids.unsqueeze(0), "use_cache": False}
        if self._takes_positions:
            given["position_ids"] = positions.unsqueeze(0)
        if self.keeps_logits:
            given["logits_to_keep"] = logit_rows
        with hf_positions.placing(positions, self._alibi), hf_attention.Attending(step):
            logits_1LV: Tensor = self._call(**given).logits
        return logits_1LV.squeeze(0) if self.keeps_logits else logits_1LV[0, logit_rows]


def _built(model_class: Any, config: Any) -> Any:
    try:
        return model_class(config).eval()
    except KeyError as error:  # a class with a table of its own attentions (GIT)
        if error.args != (config._attn_implementation,):
            raise
        raise ValueError(
            f"{model_class.__name__}: takes no other attention than its own, by name; wanted transformers' attention"
            " interface, scaled_dot_product_attention, or attention spelled out"
        ) from error


def _fix_rope(module: nn.Module, config: Any) -> None:
    """Make a rotary embedding the same at every length: its table is chosen by the longest request there may be."""
    kinds: Any = getattr(module, "rope_type", None)
    if isinstance(kinds, dict):  # one for each kind of layer
        for layer_type, kind in kinds.items():
            if kind in _BY_LENGTH:
                setattr(module, f"{layer_type}_inv_freq", _table(config, kind, layer_type=layer_type))
                kinds[layer_type] = "default"
    elif kinds in _BY_LENGTH:
        module.inv_freq = _table(config, kinds)
        module.rope_type = "default"  # type: ignore[assignment]  # which transformers does not update


def _fix_masks(module: nn.Module) -> None:
    """Make a causal table that a module keeps what it means; its rows would be positions of one request's tokens."""
    for name, table in list(module.named_buffers(recurse=False)):
        if (mask := mask_in(table)) is not None:
            delattr(module, name)
            setattr(module, name, mask)


def _fix_indexer(module: nn.Module, config: Any) -> None:
    """Make an indexer (DeepSeek's sparse attention) choose every key, as it does while there are not more than it may.

    Raises ValueError where a request may have more.
    """
    if not type(module).__name__.endswith("Indexer"):
        return
    most, longest = getattr(module, "index_topk", 0), getattr(config, "max_model_len", 1)
    if longest > most:
        raise ValueError(
            f"{type(module).__name__}: attention to {most} chosen keys is plain up to as many; pass"
            f" max_model_len={most}"
        )
    module.forward = lambda *args, **options: hf_attention.EVERY_KEY


def _table(config: Any, kind: str, **layer: str) -> Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    speeds_F: Tensor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=getattr(config, "max_model_len", 1), **layer)[0]
    return speeds_F


def class_and_config(architecture: str, raw: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return transformers' class and its configuration. Raises ValueError for what is not served."""
    model_class = _class_of(architecture)
    return model_class, _config_of(model_class, raw)


def _class_of(architecture: str) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(
            f"architecture {architecture!r}: transformers {transformers.__version__} has no such causal language model;"
            " wanted a class name like 'LlamaForCausalLM' (code inside a checkpoint is never run)"
        )
    model_class = getattr(transformers, architecture)
    return model_class


def _uses_interface(model_class: Any) -> bool:
    return hasattr(sys.modules[model_class.__module__], "ALL_ATTENTION_FUNCTIONS")


def _set_implementation(config: Any, attention: str) -> None:
    """Have a configuration, and those within it, choose our experts and this attention."""
    config._attn_implementation = attention
    config._experts_implementation = hf_experts.IMPLEMENTATION


def _config_of(model_class: Any, raw: Mapping[str, Any]) -> Any:
    name, wanted = model_class.__name__, model_class.config_class.model_type
    if raw.get("model_type", wanted) != wanted:
        raise ValueError(f"{name}: model_type is {raw['model_type']!r}, wanted {wanted!r}")
    if (raw.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        raise ValueError(f"{name}: only Seamwise's own definition reads experts in MXFP4; use entry='own'")
    # The module stays plain: how weights are stored is no part of its equations.
    given = {k: v for k, v in raw.items() if k != "quantization_config"}
    try:
        config = model_class.config_class.from_dict(given)
    except Exception as error:  # of whatever kind: what transformers has against a value
        raise ValueError(f"{name}: transformers refuses its configuration: {error}") from error
    kinds = getattr(config.get_text_config(), "layer_types", None) or []
    if other := sorted({kind for kind in kinds if "attention" not in kind or kind.startswith(_STATES)} - _NO_ATTENTION):
        raise ValueError(
            f"{name}: its layers of {', '.join(other)} are not served; wanted attention to keys and values"
        )
    if model_class._is_stateful and not kinds:
        raise ValueError(f"{name}: it keeps a state for each request, which is not served; wanted attention alone")
    if config.is_encoder_decoder:
        raise ValueError(f"{name}: is_encoder_decoder is true, which is not served; wanted a decoder alone")
    return config


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within this context, parameters that this thread's modules register go to the meta device; buffers stay real.

    torch.device("meta") would take the buffers along: RoPE frequencies, which no checkpoint holds, would be lost.
    """
    owner = threading.get_ident()

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        if threading.get_ident() != owner or parameter.is_meta:  # a tied one is registered twice and stays one
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]  # may return
    try:
        yield
    finally:
        hook.remove()
