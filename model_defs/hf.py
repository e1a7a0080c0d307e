"""Any transformers decoder, through its own class: attention and experts are replaced by the contracts, nothing else.

Source: AttentionInterface, https://huggingface.co/docs/transformers/attention_interface.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from seamwise.kernels import attention, kv_append

from . import hf_experts

_IMPLEMENTATION = "seamwise"
_BY_LENGTH = ("longrope", "dynamic")  # kinds of RoPE whose table transformers chooses anew at each step
_SERVED = ("full_attention", "sliding_attention")  # kinds of layers
# Keyword arguments that attention functions are given and that leave causal attention as it is. Any other one that is
# set (position_bias, …) would change the result: it is refused, not ignored.
_HARMLESS = {
    "position_ids", "position_embeddings", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits",
}  # fmt: skip


@dataclass(slots=True, kw_only=True)
class _Step:
    """A step's tensors, handed through the model's own code to its attention.

    slides    whether each layer has a sliding window; attended: the layers that came
    """

    slides: Sequence[bool]
    kv_caches: Sequence[Sequence[Tensor]]
    slot_mapping: Tensor
    spans: tuple[Tensor, Tensor, Tensor]
    attended: list[int] = field(default_factory=list)


class HuggingFaceDecoder(nn.Module):
    """A causal language model of transformers with the step's signature; parameter names stay the checkpoint's.

    Raises ValueError for an architecture that transformers does not have, or whose attention is not plain and causal.
    """

    def __init__(self, architecture: str, raw: Mapping[str, Any]) -> None:
        super().__init__()
        from transformers import AttentionInterface

        AttentionInterface.register(_IMPLEMENTATION, _attend)
        hf_experts.register()
        # No mask function is registered under this name: transformers then builds no mask.
        model_class = _class_of(architecture)
        config = _config_of(model_class, raw)
        config._attn_implementation = _IMPLEMENTATION
        config._experts_implementation = hf_experts.IMPLEMENTATION
        with _parameters_on_meta():
            model = model_class(config).eval()
        for module in model.modules():
            _fix_rope(module, config)
        # The children are registered here under the checkpoint's names; the model itself only lends its forward.
        for name, child in model.named_children():
            self.add_module(name, child)
        assert {n for n, _ in model.named_parameters()} == {n for n, _ in self.named_parameters()}
        self.architecture = architecture
        self.slides = _sliding_layers(config)
        self.tp_plan = {**model.tp_plan}
        self._call: Callable[..., Any] = model.__call__  # a bound method: no child of this module
        self.eval()

    def forward(
        self, token_ids: Tensor, positions: Tensor, kv_caches: Sequence[Sequence[Tensor]], slot_mapping: Tensor,
        block_table: Tensor, seq_lens: Tensor, query_starts: Tensor, logit_rows: Tensor,
    ) -> Tensor:  # fmt: skip
        spans = (block_table, seq_lens, query_starts)
        step = _Step(slides=self.slides, kv_caches=kv_caches, slot_mapping=slot_mapping, spans=spans)
        logits_1LV = self._call(
            input_ids=token_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False,
            logits_to_keep=logit_rows, seamwise_step=step,
        ).logits  # fmt: skip
        if step.attended != list(range(len(self.slides))):
            raise ValueError(
                f"{self.architecture}: attention of layers {step.attended} came through transformers'"
                f" attention interface, wanted each of its {len(self.slides)} layers once, in order"
            )
        return logits_1LV.squeeze(0)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, is_causal: bool | None = None,
    sliding_window: int | None = None, softcap: float | None = None, s_aux: Tensor | None = None,
    seamwise_step: _Step | None = None, **others: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention function for transformers: query (1, H, T, E), key (1, K, T, E), value (1, K, T, V) -> (1, T, H, V)."""
    name = type(module).__name__
    if seamwise_step is None:
        raise ValueError(f"{name}: attn_implementation={_IMPLEMENTATION!r} needs a step; call it through seamwise")
    refused = {k: v for k, v in others.items() if v is not None and v is not False and k not in _HARMLESS}
    refused |= {"attention_mask": attention_mask} if attention_mask is not None else {}
    refused |= {"dropout": dropout} if dropout else {}
    refused |= {"is_causal": False} if is_causal is False or not getattr(module, "is_causal", True) else {}
    if refused:
        plain = (int, float, str)
        shown = ", ".join(f"{k}={v if isinstance(v, plain) else type(v).__name__}" for k, v in refused.items())
        raise ValueError(f"{name}: {shown} is not served; wanted plain causal attention")
    layer = module.layer_idx
    assert isinstance(layer, int)
    if (sliding_window is not None) != seamwise_step.slides[layer]:
        wanted = "a sliding window" if seamwise_step.slides[layer] else "none"
        raise ValueError(f"{name}: layer {layer} has sliding_window={sliding_window}, its configuration wants {wanted}")
    k_cache, v_cache = seamwise_step.kv_caches[layer]
    width = value.shape[3]
    if width < key.shape[3]:  # the caches are alike; expanded latents have narrower values
        value = F.pad(value, (0, key.shape[3] - width))
    for what, x, cache in (("key", key, k_cache), ("value", value, v_cache)):
        if (x.shape[1], x.shape[3]) != (cache.shape[1], cache.shape[3]):
            raise ValueError(
                f"{name}: layer {layer}'s {what} has {x.shape[1]} heads of width {x.shape[3]}, the KV cache"
                f" {cache.shape[1]} of {cache.shape[3]} (num_key_value_heads and head_dim of config.json)"
            )
    seamwise_step.attended.append(layer)
    q_THE, k_TKE, v_TKE = (x[0].transpose(0, 1) for x in (query, key, value))
    kv_append(k_TKE, v_TKE, k_cache, v_cache, seamwise_step.slot_mapping)
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    spans, limits = seamwise_step.spans, (sliding_window or 0, softcap or 0.0, s_aux)
    return attention(q_THE, k_cache, v_cache, *spans, scale, *limits)[..., :width].unsqueeze(0), None


def _sliding_layers(config: Any) -> list[bool]:
    """Return whether each layer has a sliding window: transformers tells its masks, of which none is built here."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [getattr(config, "sliding_window", None) is not None] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in kinds]


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


def _table(config: Any, kind: str, **layer: str) -> Tensor:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    speeds_F: Tensor = ROPE_INIT_FUNCTIONS[kind](config, "cpu", seq_len=getattr(config, "max_model_len", 1), **layer)[0]
    return speeds_F


def _class_of(architecture: str) -> Any:
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ValueError(
            f"architecture {architecture!r}: transformers {transformers.__version__} has no such causal language model;"
            " wanted a class name like 'LlamaForCausalLM' (code inside a checkpoint is never run)"
        )
    model_class = getattr(transformers, architecture)
    if not model_class._supports_attention_backend:
        raise ValueError(f"architecture {architecture!r}: its class does not use transformers' attention interface")
    return model_class


def _config_of(model_class: Any, raw: Mapping[str, Any]) -> Any:
    name, wanted = model_class.__name__, model_class.config_class.model_type
    if raw.get("model_type", wanted) != wanted:
        raise ValueError(f"{name}: model_type is {raw['model_type']!r}, wanted {wanted!r}")
    if (raw.get("quantization_config") or {}).get("quant_method") == "mxfp4":
        raise ValueError(f"{name}: only Seamwise's own definition reads experts in MXFP4; use entry='own'")
    # The module stays plain: how weights are stored is no part of its equations.
    config = model_class.config_class.from_dict({k: v for k, v in raw.items() if k != "quantization_config"})
    unserved = {
        "is_encoder_decoder": config.is_encoder_decoder,
        "layer_types": [t for t in getattr(config, "layer_types", None) or () if t not in _SERVED],
        "attention_chunk_size": getattr(config, "attention_chunk_size", None),
    }
    for option, found in unserved.items():
        if found:
            raise ValueError(f"{name}: {option} has {found!r}, which is not served; wanted plain causal attention")
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
