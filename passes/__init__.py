"""Named, counted, explained rewrites of the whole graph; one file a pass.

Each pass's file starts with the graph before and after it. The order they run in is compile/pipeline.py.
"""

from .add_adapters import ADD_ADAPTERS as ADD_ADAPTERS
from .add_adapters import AdapterRoom as AdapterRoom
from .cancel_views import CANCEL_VIEWS as CANCEL_VIEWS
from .canonicalize import canonicalize as canonicalize
from .cse import CSE as CSE
from .fusion.fuse_add_rms_norm import FUSE_ADD_RMS_NORM as FUSE_ADD_RMS_NORM
from .fusion.fuse_allreduce_rms_norm import FUSE_ALLREDUCE_RMS_NORM as FUSE_ALLREDUCE_RMS_NORM
from .fusion.fuse_gate_up import FUSE_GATE_UP as FUSE_GATE_UP
from .fusion.fuse_moe_route_quant import FUSE_MOE_ROUTE_QUANT as FUSE_MOE_ROUTE_QUANT
from .fusion.fuse_moe_silu_mul_quant import FUSE_MOE_SILU_MUL_QUANT as FUSE_MOE_SILU_MUL_QUANT
from .fusion.fuse_qk_norm_rope import FUSE_QK_NORM_ROPE as FUSE_QK_NORM_ROPE
from .fusion.fuse_qkv import FUSE_QKV as FUSE_QKV
from .fusion.fuse_quant import FUSE_ADD_RMS_NORM_QUANT as FUSE_ADD_RMS_NORM_QUANT
from .fusion.fuse_quant import FUSE_ALLREDUCE_RMS_NORM_QUANT as FUSE_ALLREDUCE_RMS_NORM_QUANT
from .fusion.fuse_quant import FUSE_ATTENTION_QUANT as FUSE_ATTENTION_QUANT
from .fusion.fuse_quant import FUSE_RMS_NORM_QUANT as FUSE_RMS_NORM_QUANT
from .fusion.fuse_quant import FUSE_SILU_MUL_QUANT as FUSE_SILU_MUL_QUANT
from .fusion.fuse_rope_kv_write import FUSE_ROPE_KV_WRITE as FUSE_ROPE_KV_WRITE
from .matcher import Match as Match
from .matcher import Miss as Miss
from .matcher import Pattern as Pattern
from .pack_linear import PACK_LINEAR as PACK_LINEAR
from .quantization.quantize_experts import QUANTIZE_EXPERTS as QUANTIZE_EXPERTS
from .quantization.quantize_kv import quantize_kv as quantize_kv
from .quantization.quantize_linear import QUANTIZE_LINEAR as QUANTIZE_LINEAR
from .quantization.quantize_weights import KEPT as KEPT
from .quantization.quantize_weights import SCHEMES as SCHEMES
from .quantization.quantize_weights import Scheme as Scheme
from .quantization.quantize_weights import quantize_weights as quantize_weights
from .quantization.stored_weights import Held as Held
from .quantization.stored_weights import StoredWeight as StoredWeight
from .quantization.stored_weights import stored_weights as stored_weights
from .raising.raise_gather import RAISE_GATHER as RAISE_GATHER
from .raising.raise_layer_norm import RAISE_LAYER_NORM as RAISE_LAYER_NORM
from .raising.raise_moe import RAISE_MOE as RAISE_MOE
from .raising.raise_rms_norm import RAISE_RMS_NORM as RAISE_RMS_NORM
from .raising.raise_rope import RAISE_ROPE as RAISE_ROPE
from .raising.raise_swiglu import RAISE_SWIGLU as RAISE_SWIGLU
from .rewrite import Parallel as Parallel
from .rewrite import Pass as Pass
from .rewrite import Report as Report
from .rewrite import Structure as Structure
from .rewrite import pattern_pass as pattern_pass
from .shard.async_tp import ASYNC_TP as ASYNC_TP
from .shard.balance_experts import balance_experts as balance_experts
from .shard.begin_exchanges import BEGIN_EXCHANGES as BEGIN_EXCHANGES
from .shard.quantize_dispatch import QUANTIZE_DISPATCH as QUANTIZE_DISPATCH
from .shard.sequence_parallel import SEQUENCE_PARALLEL as SEQUENCE_PARALLEL
from .shard.shard import shard as shard
