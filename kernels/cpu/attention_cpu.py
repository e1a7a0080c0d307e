"""The CPU providers of the seam ops, in C++ (attention_cpu.cpp, kv_append_cpu.cpp), compiled at the first call."""

from __future__ import annotations

import struct
import sys

import torch
from torch import Tensor

from seamwise.kernels.attn.attention import attention
from seamwise.kernels.attn.kv_append import kv_append

from .tape import Kernel, empty, launch

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SINKS = (torch.float32, torch.bfloat16)
_ATTENTION = Kernel("attention_cpu.cpp", "seamwise_attention", seam=True)
_KV_APPEND = Kernel("kv_append_cpu.cpp", "seamwise_kv_append", seam=True)


def _refuses_system() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"it takes its threads from the libgomp of torch's Linux builds, this is {sys.platform}"
    return None


def _refuses_attention(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, sinks_H: Tensor | None,
    alibi_slopes_H: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None,
) -> str | None:  # fmt: skip
    if alibi_slopes_H is not None or k_scale is not None or v_scale is not None:
        return "it serves neither ALiBi's slopes nor scaled caches"
    if sinks_H is not None and sinks_H.dtype not in _SINKS:
        return f"sinks must be float32 or bfloat16, got {sinks_H.dtype}"
    dtypes = (q_THD.dtype, k_cache.dtype, v_cache.dtype)
    if len(set(dtypes)) > 1 or q_THD.dtype not in _DTYPES:
        return f"q, k_cache and v_cache must all be float32, bfloat16 or float16, got {dtypes}"
    if q_THD.shape[2] % 16:
        return f"it needs a head dim that is a multiple of 16, got q {tuple(q_THD.shape)}"
    if not scale > 0:
        return f"scale must be positive, got {scale}"
    return _refuses_system()


@attention.provider("cpp", devices=("cpu",), refuses=_refuses_attention, launches=True)
def attention_cpp(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor, scale: float, window: int = 0, softcap: float = 0.0, sinks_H: Tensor | None = None,
    alibi_slopes_H: Tensor | None = None, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute attention in C++. Raises ValueError when a value in the index tensors points outside its range."""
    tokens, heads, dim = q_THD.shape
    num_blocks, kv_heads, block_size, _ = k_cache.shape
    requests, table_width = block_table_RB.shape
    out_THD = empty(q_THD.shape, q_THD.dtype)
    error = launch(
        _ATTENTION, _DTYPES[q_THD.dtype], out_THD.data_ptr(), q_THD.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        block_table_RB.data_ptr(), seq_lens_R.data_ptr(), query_starts_S.data_ptr(),
        tokens, heads, kv_heads, num_blocks, block_size, dim, requests, table_width, block_table_RB.stride(0),
        *q_THD.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2], window,
        *struct.unpack("i", struct.pack("f", softcap)), 0 if sinks_H is None else sinks_H.data_ptr(),
        int(sinks_H is not None and sinks_H.dtype == torch.bfloat16), scale, torch.get_num_threads(),
    )  # fmt: skip
    if error:
        raise _attention_error(error, tokens, num_blocks, block_size, block_table_RB, seq_lens_R, query_starts_S)
    return out_THD


def _attention_error(
    error: int, tokens: int, num_blocks: int, block_size: int, block_table_RB: Tensor, seq_lens_R: Tensor,
    query_starts_S: Tensor,
) -> Exception:  # fmt: skip
    if error < 0:
        return RuntimeError("attention: this CPU has no float16 conversion; load the model with dtype=torch.float32")
    kind, r = divmod(error, 1 << 32)
    first, last = query_starts_S[r : r + 2].tolist()
    if kind == 1:
        wanted = f"query_starts must begin at 0, never fall and stay within the {tokens} rows of q"
        return ValueError(f"attention: {wanted}, got {first}, {last} for request {r}")
    if kind == 2:
        room = block_table_RB.shape[1] * block_size
        wanted = f"it must lie between its {last - first} queries and the {room} tokens of its blocks"
        return ValueError(f"attention: seq_lens[{r}] is {int(seq_lens_R[r])}, {wanted}")
    row = block_table_RB[r].tolist()
    return ValueError(f"attention: block_table[{r}] names blocks outside 0..{num_blocks - 1} of the cache: {row}")


def _refuses_kv_append(
    k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> str | None:
    if k_scale is not None or v_scale is not None:
        return "it copies bytes, and serves no scales"
    dtypes = (k_TKD.dtype, v_TKD.dtype, k_cache.dtype, v_cache.dtype)
    if len(set(dtypes)) > 1:
        return f"k, v and the caches must share a dtype, got {dtypes}"
    return _refuses_system()


@kv_append.provider("cpp", devices=("cpu",), refuses=_refuses_kv_append, launches=True)
def kv_append_cpp(
    k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping_T: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Scatter in C++. Raises ValueError when a slot lies beyond the cache."""
    tokens, kv_heads, dim = k_TKD.shape
    num_blocks, _, block_size, _ = k_cache.shape
    size = k_TKD.element_size()
    strides = (*k_TKD.stride()[:2], *v_TKD.stride()[:2], *k_cache.stride()[:2], *v_cache.stride()[:2])
    error = launch(
        _KV_APPEND, k_TKD.data_ptr(), v_TKD.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        slot_mapping_T.data_ptr(), tokens, kv_heads, dim * size, num_blocks, block_size, *[s * size for s in strides],
        torch.get_num_threads(),
    )  # fmt: skip
    if error:
        slot, slots = int(slot_mapping_T[error - 1]), num_blocks * block_size
        raise ValueError(f"kv_append: slot_mapping[{error - 1}] is {slot}, the cache has slots 0..{slots - 1}")
