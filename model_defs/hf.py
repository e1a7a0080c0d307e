"""Any transformers decoder, through its own class: its attention is replaced by the contracts, nothing else.

Source: AttentionInterface, https://huggingface.co/docs/transformers/attention_interface.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from seamwise.kernels import attention, kv_append

_IMPLEMENTATION = "seamwise"
# Attention features that would change the result and that the attention contract does not have yet.
_UNSERVED = ("sliding_window", "softcap", "s_aux", "head_mask", "position_bias")


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **step: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention function for transformers: query (1, H, T, E), key and value (1, K, T, E) -> (1, T, H, E)."""
    for name in _UNSERVED:
        if step.get(name) is not None:
            raise ValueError(
                f"{type(module).__name__}: {name}={step[name]!r} is not served; wanted plain causal attention"
            )
    q_THE, k_TKE, v_TKE = (x[0].transpose(0, 1) for x in (query, key, value))
    cache = step["kv_caches"][module.layer_idx]
    kv_append(k_TKE, v_TKE, *cache, step["slot_mapping"])
    scale = float(scaling) if scaling is not None else query.shape[-1] ** -0.5
    out_THE = attention(q_THE, *cache, step["block_table"], step["seq_lens"], step["query_starts"], scale)
    return out_THE.unsqueeze(0), None


class HuggingFaceDecoder(nn.Module):
    """A causal language model of transformers with the step's signature; parameter names stay the checkpoint's.

    Raises ValueError for an architecture transformers does not have, or that is not a causal decoder.
    """

    def __init__(self, architecture: str, raw: Mapping[str, Any]) -> None:
        super().__init__()
        import transformers
        from transformers import AutoConfig
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, _attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, lambda *args, **kwargs: None)
        model_class = getattr(transformers, architecture, None)
        if model_class is None or not architecture.endswith("ForCausalLM"):
            raise ValueError(
                f"architecture {architecture!r}: transformers {transformers.__version__} has no such causal LM"
            )
        config = AutoConfig.for_model(**raw)
        config._attn_implementation = _IMPLEMENTATION
        # On the meta device computed buffers would be lost, so only parameters are put there.
        with _ParametersOnMeta():
            model = model_class(config)
        self.model, self.lm_head = model.model, model.lm_head
        self.eval()

    def forward(
        self, token_ids: Tensor, positions: Tensor, kv_caches: Sequence[Sequence[Tensor]], slot_mapping: Tensor,
        block_table: Tensor, seq_lens: Tensor, query_starts: Tensor, logit_rows: Tensor,
    ) -> Tensor:  # fmt: skip
        hidden_1TD = self.model(
            input_ids=token_ids.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False,
            kv_caches=kv_caches, slot_mapping=slot_mapping, block_table=block_table, seq_lens=seq_lens,
            query_starts=query_starts,
        ).last_hidden_state  # fmt: skip
        return self.lm_head(hidden_1TD[0][logit_rows])


class _ParametersOnMeta:
    """Within this context, parameters that modules register go to the meta device; buffers stay real."""

    def __enter__(self) -> None:
        self._register = nn.Module.register_parameter

        def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            if parameter is not None and not parameter.is_meta:  # a tied one is registered twice and stays one
                parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
            self._register(module, name, parameter)

        nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]

    def __exit__(self, *_: object) -> None:
        nn.Module.register_parameter = self._register  # type: ignore[method-assign]
