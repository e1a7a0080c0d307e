"""Contracts, one file an op, and the kernels that provide them; each is callable on its own."""

# With the repository's root on sys.path, transformers takes this folder for the Hub's package `kernels`, for which it
# probes; under that name nothing is defined, so that no op is registered twice.
if __name__ != "kernels":
    from .add_rms_norm import add_rms_norm
    from .add_rms_norm_quant import add_rms_norm_quant
    from .allreduce_rms_norm import allreduce_rms_norm
    from .allreduce_rms_norm_quant import allreduce_rms_norm_quant
    from .attention import attention
    from .attention_cascade import attention_cascade
    from .attention_partial import attention_partial
    from .attention_quant import attention_quant
    from .dequantize_weight import dequantize_weight
    from .dual_rms_norm import dual_rms_norm
    from .ep_dispatch import ep_combine, ep_dispatch
    from .gather_rows import gather_rows
    from .gelu_mul import gelu_mul
    from .grouped_linear import grouped_linear
    from .grouped_mxfp4_linear import grouped_mxfp4_linear
    from .grouped_scaled_linear import grouped_scaled_linear
    from .gumbel_sample import gumbel_sample
    from .kv_append import kv_append
    from .kv_copy_blocks import kv_copy_blocks
    from .layer_norm import layer_norm
    from .linear import linear_packed, pack_linear
    from .linear_int import linear_int, pack_group_values, pack_int_panels
    from .logprobs import logprobs
    from .lora import lora_expand, lora_shrink
    from .merge_states import merge_states
    from .mla_append import mla_append
    from .mla_decode import mla_decode
    from .mla_prefill import mla_prefill
    from .moe_align import moe_align
    from .moe_route import moe_route
    from .moe_route_quant import moe_route_quant
    from .moe_sum import moe_sum
    from .mxfp4_linear import mxfp4_linear
    from .norm_between_linears import norm_between_linears
    from .penalize import penalize
    from .qk_norm_rope import qk_norm_rope
    from .quantize import quantize
    from .quantize_mxfp4 import quantize_mxfp4
    from .quantize_weight import quantize_weight, weight_scale
    from .reduce_scatter_rms_norm import reduce_scatter_rms_norm
    from .rms_norm import rms_norm
    from .rms_norm_quant import rms_norm_quant
    from .rope import rope
    from .rope_kv_write import rope_kv_write
    from .rope_table import rope_table
    from .scaled_linear import scaled_linear
    from .silu_mul import silu_mul
    from .silu_mul_mxfp4 import silu_mul_mxfp4
    from .silu_mul_quant import silu_mul_quant
    from .speculative_reject import speculative_reject
    from .swiglu_clamped import swiglu_clamped
    from .truncate_logits import truncate_logits
    from .w4a16_linear import w4a16_linear

    # Providers in files of their own register themselves; nothing is compiled before the first call.
    from . import attention_cpu, attention_triton, grouped_linear_torch, linear_cpu  # noqa: F401  isort: skip
    from . import mla_decode_triton, scaled_linear_torch, tokenwise_cpu  # noqa: F401  isort: skip

__all__ = [
    "add_rms_norm",
    "add_rms_norm_quant",
    "allreduce_rms_norm",
    "allreduce_rms_norm_quant",
    "attention",
    "attention_cascade",
    "attention_partial",
    "attention_quant",
    "dequantize_weight",
    "dual_rms_norm",
    "ep_combine",
    "ep_dispatch",
    "gather_rows",
    "gelu_mul",
    "grouped_linear",
    "grouped_mxfp4_linear",
    "grouped_scaled_linear",
    "gumbel_sample",
    "kv_append",
    "kv_copy_blocks",
    "layer_norm",
    "linear_int",
    "linear_packed",
    "logprobs",
    "lora_expand",
    "lora_shrink",
    "merge_states",
    "mla_append",
    "mla_decode",
    "mla_prefill",
    "moe_align",
    "moe_route",
    "moe_route_quant",
    "moe_sum",
    "mxfp4_linear",
    "norm_between_linears",
    "pack_group_values",
    "pack_int_panels",
    "pack_linear",
    "penalize",
    "qk_norm_rope",
    "quantize",
    "quantize_mxfp4",
    "quantize_weight",
    "reduce_scatter_rms_norm",
    "rms_norm",
    "rms_norm_quant",
    "rope",
    "rope_kv_write",
    "rope_table",
    "scaled_linear",
    "silu_mul",
    "silu_mul_mxfp4",
    "silu_mul_quant",
    "speculative_reject",
    "swiglu_clamped",
    "truncate_logits",
    "w4a16_linear",
    "weight_scale",
]
