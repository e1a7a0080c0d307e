"""Named, counted, explained rewrites of the whole graph; one file a pass.

Each pass's file starts with the graph before and after it. The order they run in is compile/pipeline.py.
"""

from .async_tp import ASYNC_TP
from .cancel_views import CANCEL_VIEWS
from .canonicalize import canonicalize
from .cse import CSE
from .fuse_add_rms_norm import FUSE_ADD_RMS_NORM
from .fuse_add_rms_norm_quant import FUSE_ADD_RMS_NORM_QUANT
from .fuse_allreduce_rms_norm import FUSE_ALLREDUCE_RMS_NORM
from .fuse_allreduce_rms_norm_quant import FUSE_ALLREDUCE_RMS_NORM_QUANT
from .fuse_attention_quant import FUSE_ATTENTION_QUANT
from .fuse_gate_up import FUSE_GATE_UP
from .fuse_moe_route_quant import FUSE_MOE_ROUTE_QUANT
from .fuse_moe_silu_mul_quant import FUSE_MOE_SILU_MUL_QUANT
from .fuse_qk_norm_rope import FUSE_QK_NORM_ROPE
from .fuse_qkv import FUSE_QKV
from .fuse_rms_norm_quant import FUSE_RMS_NORM_QUANT
from .fuse_rope_kv_write import FUSE_ROPE_KV_WRITE
from .fuse_silu_mul_quant import FUSE_SILU_MUL_QUANT
from .matcher import Match, Miss, Pattern
from .pack_linear import PACK_LINEAR
from .quantize_experts import QUANTIZE_EXPERTS
from .quantize_kv import quantize_kv
from .quantize_linear import QUANTIZE_LINEAR, promised
from .quantize_weights import KEPT, SCHEMES, Scheme, quantize_weights
from .raise_gather import RAISE_GATHER
from .raise_layer_norm import RAISE_LAYER_NORM
from .raise_moe import RAISE_MOE
from .raise_rms_norm import RAISE_RMS_NORM
from .raise_rope import RAISE_ROPE
from .raise_swiglu import RAISE_SWIGLU
from .rewrite import Parallel, Pass, Report, Structure, pattern_pass
from .sequence_parallel import SEQUENCE_PARALLEL
from .shard import shard
from .stored_weights import Held, StoredWeight, stored_weights

__all__ = [
    "ASYNC_TP",
    "CANCEL_VIEWS",
    "CSE",
    "FUSE_ADD_RMS_NORM",
    "FUSE_ADD_RMS_NORM_QUANT",
    "FUSE_ALLREDUCE_RMS_NORM",
    "FUSE_ALLREDUCE_RMS_NORM_QUANT",
    "FUSE_ATTENTION_QUANT",
    "FUSE_GATE_UP",
    "FUSE_MOE_ROUTE_QUANT",
    "FUSE_MOE_SILU_MUL_QUANT",
    "FUSE_QKV",
    "FUSE_QK_NORM_ROPE",
    "FUSE_RMS_NORM_QUANT",
    "FUSE_ROPE_KV_WRITE",
    "FUSE_SILU_MUL_QUANT",
    "KEPT",
    "PACK_LINEAR",
    "QUANTIZE_EXPERTS",
    "QUANTIZE_LINEAR",
    "RAISE_GATHER",
    "RAISE_LAYER_NORM",
    "RAISE_MOE",
    "RAISE_RMS_NORM",
    "RAISE_ROPE",
    "RAISE_SWIGLU",
    "SCHEMES",
    "SEQUENCE_PARALLEL",
    "Held",
    "Match",
    "Miss",
    "Parallel",
    "Pass",
    "Pattern",
    "Report",
    "Scheme",
    "StoredWeight",
    "Structure",
    "canonicalize",
    "pattern_pass",
    "promised",
    "quantize_kv",
    "quantize_weights",
    "shard",
    "stored_weights",
]
