"""Contracts, one file an op, and the kernels that provide them; each is callable on its own."""

# With the repository's root on sys.path, transformers takes this folder for the Hub's package `kernels`, for which it
# probes; under that name nothing is defined, so that no op is registered twice.
if __name__ != "kernels":
    from .activation.gelu_mul import gelu_mul as gelu_mul
    from .activation.silu_mul import silu_mul as silu_mul
    from .activation.silu_mul_quant import silu_mul_quant as silu_mul_quant
    from .activation.swiglu_clamped import swiglu_clamped as swiglu_clamped
    from .attn.attention import attention as attention
    from .attn.attention_partial import attention_partial as attention_partial
    from .attn.attention_quant import attention_quant as attention_quant
    from .attn.kv_append import kv_append as kv_append
    from .attn.merge_states import merge_states as merge_states
    from .attn.mla_append import mla_append as mla_append
    from .attn.mla_decode import mla_decode as mla_decode
    from .attn.mla_prefill import mla_prefill as mla_prefill
    from .attn.rope_kv_write import rope_kv_write as rope_kv_write
    from .comm.allreduce_rms_norm import allreduce_rms_norm as allreduce_rms_norm
    from .comm.allreduce_rms_norm_quant import allreduce_rms_norm_quant as allreduce_rms_norm_quant
    from .comm.ep_dispatch import ep_combine as ep_combine
    from .comm.ep_dispatch import ep_dispatch as ep_dispatch
    from .comm.ep_dispatch import ep_dispatch_quant as ep_dispatch_quant
    from .comm.norm_between_linears import norm_between_linears as norm_between_linears
    from .comm.reduce_scatter_rms_norm import reduce_scatter_rms_norm as reduce_scatter_rms_norm
    from .linear.gather_packed_rows import gather_packed_rows as gather_packed_rows
    from .linear.gather_rows import gather_rows as gather_rows
    from .linear.linear import linear_packed as linear_packed
    from .linear.linear import pack_linear as pack_linear
    from .linear.linear_int import linear_int as linear_int
    from .linear.linear_int import pack_group_values as pack_group_values
    from .linear.linear_int import pack_int_panels as pack_int_panels
    from .linear.lora import lora_expand as lora_expand
    from .linear.lora import lora_shrink as lora_shrink
    from .linear.mxfp4_linear import mxfp4_linear as mxfp4_linear
    from .linear.scaled_linear import scaled_linear as scaled_linear
    from .linear.w4a16_linear import w4a16_linear as w4a16_linear
    from .moe.count_experts import count_experts as count_experts
    from .moe.grouped_linear import grouped_linear as grouped_linear
    from .moe.grouped_linear_int import grouped_linear_int as grouped_linear_int
    from .moe.grouped_linear_packed import grouped_linear_packed as grouped_linear_packed
    from .moe.grouped_mxfp4_linear import grouped_mxfp4_linear as grouped_mxfp4_linear
    from .moe.grouped_scaled_linear import grouped_scaled_linear as grouped_scaled_linear
    from .moe.moe_align import moe_align as moe_align
    from .moe.moe_route import moe_route as moe_route
    from .moe.moe_route_quant import moe_route_quant as moe_route_quant
    from .moe.moe_sum import moe_sum as moe_sum
    from .moe.place_experts import place_experts as place_experts
    from .norm.add_rms_norm import add_rms_norm as add_rms_norm
    from .norm.add_rms_norm_quant import add_rms_norm_quant as add_rms_norm_quant
    from .norm.layer_norm import layer_norm as layer_norm
    from .norm.rms_norm import rms_norm as rms_norm
    from .norm.rms_norm_quant import rms_norm_quant as rms_norm_quant
    from .position.qk_norm_rope import qk_norm_rope as qk_norm_rope
    from .position.rope import rope as rope
    from .position.rope_table import rope_table as rope_table
    from .quant.dequantize_weight import dequantize_weight as dequantize_weight
    from .quant.quantize import quantize as quantize
    from .quant.quantize_weight import quantize_weight as quantize_weight
    from .quant.quantize_weight import weight_scale as weight_scale
    from .sampling.gumbel_sample import gumbel_sample as gumbel_sample
    from .sampling.logprobs import logprobs as logprobs
    from .sampling.penalize import penalize as penalize
    from .sampling.truncate_logits import truncate_logits as truncate_logits

    # Providers in files of their own register themselves; nothing is compiled before the first call.
    from .cpu import attention_cpu  # noqa: F401  isort: skip
    from .attn import attention_triton  # noqa: F401  isort: skip
    from .moe import grouped_linear_torch  # noqa: F401  isort: skip
    from .cpu import linear_cpu  # noqa: F401  isort: skip
    from .cpu import lora_cpu  # noqa: F401  isort: skip
    from .attn import mla_decode_triton  # noqa: F401  isort: skip
    from .linear import scaled_linear_torch  # noqa: F401  isort: skip
    from .cpu import tokenwise_cpu  # noqa: F401  isort: skip
