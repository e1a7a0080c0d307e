"""Public implementations of the same ops, where they are installed: what `seamwise bench kernels` compares with.

An entry returns a call without arguments, or None where it does not serve these inputs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Call = Callable[[], Any] | None
PEERS: dict[str, dict[str, Callable[..., Call]]] = {}


def peer(contract: str, name: str) -> Callable[[Callable[..., Call]], Callable[..., Call]]:
    """Register the decorated function as a contract's public implementation."""

    def register(make: Callable[..., Call]) -> Callable[..., Call]:
        PEERS.setdefault(contract, {})[name] = make
        return make

    return register


@peer("rms_norm", "torch F.rms_norm")
def _rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Call:
    return lambda: F.rms_norm(x_TD, (x_TD.shape[-1],), weight_D, eps)


@peer("layer_norm", "torch F.layer_norm")
def _layer_norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float) -> Call:
    return lambda: F.layer_norm(x_TD, (x_TD.shape[-1],), weight_D, bias_D, eps)


@peer("rms_norm", "flashinfer rmsnorm")
def _rms_norm_flashinfer(x_TD: Tensor, weight_D: Tensor, eps: float) -> Call:
    if not x_TD.is_cuda or importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer  # type: ignore[import-not-found]

    return lambda: flashinfer.norm.rmsnorm(x_TD, weight_D, eps)


@peer("gather_rows", "torch F.embedding")
def _gather_rows(table_VD: Tensor, index_T: Tensor) -> Call:
    return lambda: F.embedding(index_T, table_VD)


@peer("linear_packed", "torch F.linear (cuBLAS, oneDNN)")
def _linear(x_TK: Tensor, packed: Tensor, out_features: int, bias_N: Tensor | None = None) -> Call:
    weight_NK = torch.randn(out_features, x_TK.shape[-1], device=x_TK.device).to(x_TK.dtype)
    return lambda: F.linear(x_TK, weight_NK, bias_N)


@peer("attention", "torch SDPA (contiguous keys)")
def _attention(
    q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: Tensor, starts: Tensor, scale: float,
    *options: Any,
) -> Call:  # fmt: skip
    """SDPA over keys already gathered and padded to the longest: less work than paging, so a hard peer."""
    if any(options) or len(set(lengths.tolist())) > lengths.numel() or k_cache.dtype != q_THD.dtype:
        return None
    requests, kv_heads = table.shape[0], k_cache.shape[1]
    queries, longest = q_THD.shape[0] // requests, int(lengths.max())
    q = q_THD.unflatten(0, (requests, queries)).transpose(1, 2).contiguous()
    k, v = (torch.randn(requests, kv_heads, longest, q.shape[-1], device=q.device).to(q.dtype) for _ in range(2))
    causal = queries > 1 and queries == longest
    if queries > 1 and not causal:
        return None
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=True)
