"""The text model of a multimodal one: its configuration as a decoder of its own. Images and sound are not served.

Text alone has equal positions in all of M-RoPE's dimensions, which then is plain RoPE (Qwen-VL).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Class of a whole model -> the decoder that its text is, by text_config's model_type where that may be several.
_DECODERS: dict[str, str | Mapping[str, str]] = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Gemma4ForConditionalGeneration": "Gemma4ForCausalLM",
    "Gemma4UnifiedForConditionalGeneration": "Gemma4UnifiedForCausalLM",
    "GotOcr2ForConditionalGeneration": "Qwen2ForCausalLM",
    "Llama4ForConditionalGeneration": "Llama4ForCausalLM",
    "LlavaForConditionalGeneration": {
        "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    },
    "Mistral3ForConditionalGeneration": {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
    "Qwen2VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2ForCausalLM",
    "Qwen3VLForConditionalGeneration": "Qwen3ForCausalLM",
}  # fmt: skip
_OWN_DEFAULTS = ("gemma3_text", "llama", "mistral", "qwen2")  # of a text_config: those of the decoder's class
_OF_THE_WHOLE = ("dtype", "torch_dtype", "quantization_config", "tie_word_embeddings", "eos_token_id", "bos_token_id")


def text_part(raw: dict[str, Any], where: str) -> dict[str, Any]:
    """Return the config.json that a multimodal model's text alone would have; any other one as it is.

    Imports transformers where a text_config has defaults of its own. Raises ValueError for text that is not served.
    """
    (name,) = raw["architectures"]
    if name not in _DECODERS:
        return raw
    inner, decoder = raw.get("text_config"), _DECODERS[name]
    kind = inner.get("model_type") if isinstance(inner, dict) else None
    if not isinstance(decoder, str):
        if not isinstance(kind, str) or kind not in decoder:
            raise ValueError(f"{where}: text_config.model_type is {kind!r}, wanted one of {', '.join(decoder)}")
        decoder = decoder[kind]
    if inner is None or kind not in _OWN_DEFAULTS:  # older Qwen-VL files have no text_config
        from transformers import CONFIG_MAPPING

        inner = CONFIG_MAPPING[raw["model_type"]].from_dict(raw).get_text_config().to_dict()
    whole = {key: raw[key] for key in _OF_THE_WHOLE if raw.get(key) is not None}
    text = {key: value for key, value in inner.items() if key not in ("architectures", "model_type")}
    return {**text, **whole, "architectures": [decoder]}
