"""The CPU providers of the seam ops, in C++ (attention_cpu.cpp, kv_append_cpu.cpp), compiled at the first call."""

from __future__ import annotations

import struct
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from seamwise.kernels.attn.attention import attention
from seamwise.kernels.attn.kv_append import kv_append
from seamwise.kernels.attn.mla_decode import mla_decode

from .tape import Kernel, empty, launch

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SINKS = (torch.float32, torch.bfloat16)
_ATTENTION = Kernel("attention_cpu.cpp", "seamwise_attention", seam=True)
_KV_APPEND = Kernel("kv_append_cpu.cpp", "seamwise_kv_append", seam=True)
_FLOAT8 = 4  # added to a dtype's number: the caches are float8_e4m3fn


class _Cascade(threading.local):
    counter: Tensor | None = None


_cascade = _Cascade()


@contextmanager
def cascade(counter: Tensor | None) -> Iterator[None]:
    """Within the context, attention of this thread attends once to what several requests' block tables begin with.

    Results are the same in bits. counter, (1,) int64, gains the tiles of 64 keys that were not read again, at each call
    and each replay of what is recorded here; None: each request is attended to alone, as outside of the context.
    Source: Juravsky et al. 2024 (Hydragen), https://arxiv.org/abs/2402.05099.
    """
    before, _cascade.counter = _cascade.counter, counter
    try:
        yield
    finally:
        _cascade.counter = before


def _refuses_system() -> str | None:
    if not sys.platform.startswith("linux"):
        return f"it takes its threads from the libgomp of torch's Linux builds, this is {sys.platform}"
    return None


def _wrong_dtypes(names: str, dtype: torch.dtype, *caches: torch.dtype) -> str | None:
    if dtype in _DTYPES and {*caches} in ({dtype}, {torch.float8_e4m3fn}):
        return None
    dtypes = ", ".join(str(d) for d in (dtype, *caches))
    return f"{names} must be float32, bfloat16 or float16 and the caches of that dtype or float8_e4m3fn, got {dtypes}"


def _scale(scale: Tensor | None) -> tuple[int, int]:
    """Return a cache's scale's address, 0 for none, and how far a head's is from the next one's."""
    return (0, 0) if scale is None else (scale.data_ptr(), int(len(scale) > 1))


def _refuses_attention(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, sinks_H: Tensor | None,
    alibi_slopes_H: Tensor | None,
) -> str | None:  # fmt: skip
    if alibi_slopes_H is not None:
        return "it serves no ALiBi slopes"
    if sinks_H is not None and sinks_H.dtype not in _SINKS:
        return f"sinks must be float32 or bfloat16, got {sinks_H.dtype}"
    if wrong := _wrong_dtypes("q", q_THD.dtype, k_cache.dtype, v_cache.dtype):
        return wrong
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
    return _attend(
        "attention", q_THD, (k_cache, v_cache), q_THD.shape[2], (block_table_RB, seq_lens_R, query_starts_S), scale,
        (k_scale, v_scale), window, softcap, sinks_H,
    )  # fmt: skip


def _attend(
    op: str, q_THD: Tensor, caches: tuple[Tensor, Tensor], value_dim: int, index: tuple[Tensor, Tensor, Tensor],
    scale: float, scales: tuple[Tensor | None, Tensor | None], window: int = 0, softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Call the kernel; caches (blocks, kv_heads, block_size, …), index: block table, lengths, where queries start."""
    (tokens, heads, dim), (num_blocks, kv_heads, block_size, _) = q_THD.shape, caches[0].shape
    out, counter = empty((tokens, heads, value_dim), q_THD.dtype), _cascade.counter
    (k_at, k_step), (v_at, v_step) = map(_scale, scales)
    error = launch(
        _ATTENTION, _DTYPES[q_THD.dtype] + _FLOAT8 * (caches[0].dtype == torch.float8_e4m3fn),
        *(t.data_ptr() for t in (out, q_THD, *caches, *index)), tokens, heads, kv_heads, num_blocks, block_size, dim,
        value_dim, *index[0].shape, index[0].stride(0), *(s for t in (q_THD, *caches) for s in t.stride()[:2]),
        window, *struct.unpack("i", struct.pack("f", softcap)), 0 if sinks is None else sinks.data_ptr(),
        k_at, v_at, k_step + 2 * v_step + 4 * (sinks is not None and sinks.dtype == torch.bfloat16), scale,
        torch.get_num_threads(), 0 if counter is None else counter.data_ptr(),
    )  # fmt: skip
    if error:
        raise _error(op, error, tokens, num_blocks, block_size, index)
    return out


def _refuses_mla_decode(q_THE: Tensor, cache: Tensor, scale: float, latent: int) -> str | None:
    if wrong := _wrong_dtypes("q", q_THE.dtype, cache.dtype):
        return wrong
    if q_THE.shape[2] % 16 or latent % 16:
        return f"it needs columns and latents that are multiples of 16, got q {tuple(q_THE.shape)}, latent {latent}"
    if cache.stride(1) != cache.shape[2]:
        return f"it needs blocks whose rows lie together, got strides {cache.stride()} of {tuple(cache.shape)}"
    return _refuses_system() if scale > 0 else f"scale must be positive, got {scale}"


@mla_decode.provider("cpp", devices=("cpu",), refuses=_refuses_mla_decode, launches=True)
def mla_decode_cpp(
    q_THE: Tensor, cache: Tensor, block_table_RB: Tensor, seq_lens_R: Tensor, query_starts_S: Tensor, scale: float,
    latent: int, cache_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Compute latent attention in C++: one KV head, whose values are the first columns of its keys."""
    caches, index = (cache.unsqueeze(1),) * 2, (block_table_RB, seq_lens_R, query_starts_S)
    return _attend("mla_decode", q_THE, caches, latent, index, scale, (cache_scale,) * 2)


def _error(
    op: str, error: int, tokens: int, num_blocks: int, block_size: int, index: tuple[Tensor, Tensor, Tensor]
) -> Exception:
    block_table_RB, seq_lens_R, query_starts_S = index
    if error < 0:
        return RuntimeError(f"{op}: this CPU has no float16 conversion; load the model with dtype=torch.float32")
    kind, r = divmod(error, 1 << 32)
    first, last = query_starts_S[r : r + 2].tolist()
    if kind == 1:
        wanted = f"query_starts must begin at 0, never fall and stay within the {tokens} rows of q"
        return ValueError(f"{op}: {wanted}, got {first}, {last} for request {r}")
    if kind == 2:
        room = block_table_RB.shape[1] * block_size
        wanted = f"it must lie between its {last - first} queries and the {room} tokens of its blocks"
        return ValueError(f"{op}: seq_lens[{r}] is {int(seq_lens_R[r])}, {wanted}")
    row = block_table_RB[r].tolist()
    return ValueError(f"{op}: block_table[{r}] names blocks outside 0..{num_blocks - 1} of the cache: {row}")


def _refuses_kv_append(
    k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> str | None:
    dtypes = (k_TKD.dtype, v_TKD.dtype, k_cache.dtype, v_cache.dtype)
    if k_cache.dtype == torch.float8_e4m3fn:
        if k_TKD.dtype != v_TKD.dtype or (wrong := _wrong_dtypes("k and v", *dtypes[1:])):
            return wrong if k_TKD.dtype == v_TKD.dtype else f"k and v must share a dtype, got {dtypes[:2]}"
        if k_TKD.shape[2] % 16:
            return f"it needs a head dim that is a multiple of 16 to make float8, got k {tuple(k_TKD.shape)}"
    elif k_scale is not None or v_scale is not None:
        return f"it copies bytes into caches of {k_cache.dtype}, and serves no scales there"
    elif len(set(dtypes)) > 1:
        return f"k, v and the caches must share a dtype, or the caches be float8_e4m3fn, got {dtypes}"
    return _refuses_system()


@kv_append.provider("cpp", devices=("cpu",), refuses=_refuses_kv_append, launches=True)
def kv_append_cpp(
    k_TKD: Tensor, v_TKD: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping_T: Tensor,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Scatter in C++. Raises ValueError when a slot lies beyond the cache."""
    tokens, kv_heads, dim = k_TKD.shape
    num_blocks, _, block_size, _ = k_cache.shape
    size, cached = k_TKD.element_size(), k_cache.element_size()
    number = _DTYPES[k_TKD.dtype] if k_cache.dtype == torch.float8_e4m3fn else -1
    error = launch(
        _KV_APPEND, number, *(t.data_ptr() for t in (k_TKD, v_TKD, k_cache, v_cache, slot_mapping_T)), tokens, kv_heads,
        dim * cached, num_blocks, block_size, *(s * size for s in (*k_TKD.stride()[:2], *v_TKD.stride()[:2])),
        *(s * cached for s in (*k_cache.stride()[:2], *v_cache.stride()[:2])), *_scale(k_scale), *_scale(v_scale),
        torch.get_num_threads(),
    )  # fmt: skip
    if error < 0:
        raise RuntimeError("kv_append: this CPU has no float16 conversion; load the model with dtype=torch.float32")
    if error:
        slot, slots = int(slot_mapping_T[error - 1]), num_blocks * block_size
        raise ValueError(f"kv_append: slot_mapping[{error - 1}] is {slot}, the cache has slots 0..{slots - 1}")
