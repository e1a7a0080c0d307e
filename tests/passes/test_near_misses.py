"""For every fusion, a graph that is almost the one it wants: it must stay as it is, and the miss say why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fusions import D, H, K, T, flat, joint, tables, traced
from torch import Tensor

from seamwise import passes
from seamwise.compile.pipeline import FUSE, FUSE_QUANT, RAISE
from seamwise.kernels import (
    add_rms_norm,
    attention,
    dequantize_weight,
    grouped_linear,
    kv_append,
    moe_align,
    quantize,
    rms_norm,
    rope,
    silu_mul,
)  # fmt: skip
from seamwise.passes import Pass, Structure, canonicalize

aten = torch.ops.aten
x, w, square = torch.randn(T, D), torch.rand(D) + 0.5, torch.randn(D, D)
stored, scales = torch.randint(-9, 9, (D, D), dtype=torch.int8), torch.rand(D, 1)
heads, caches = torch.randn(T, K, D), [torch.zeros(3, K, 4, D) for _ in range(2)]
slots = torch.tensor([4, 5, -1, 7, 8])
spans = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([T]).int(), torch.tensor([0, T]).int()
ELSEWHERE = {
    "fuse_allreduce_rms_norm": "test_shard", "sequence_parallel": "test_sequence_parallel", "cse": "test_fusions",
    "async_tp": "test_sequence_parallel", "cancel_views": "test_fusions", "fuse_moe_route_quant": "test_moe_quant",
    "fuse_moe_silu_mul_quant": "test_moe_quant", "fuse_allreduce_rms_norm_quant": "its two parts are this file's",
    "add_adapters": "test_adapters", "begin_exchanges": "test_expert_parallel",
    "quantize_dispatch": "test_expert_parallel",
}  # fmt: skip


def norm(x: Tensor, w: Tensor, eps: float = 1e-5, power: float = 2.0) -> Tensor:
    wide = x.float()
    return w * (wide * torch.rsqrt(wide.pow(power).mean(-1, keepdim=True) + eps)).to(x.dtype)


def neighbours(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def quantized(x: Tensor, more: Tensor) -> tuple[Tensor, ...]:
    """Quantize what is read again."""
    return *quantize(x, torch.int8), more


def experts(x: Tensor, stored: Tensor, scales: Tensor) -> Tensor:
    plain = dequantize_weight(stored.flatten(0, 1), scales.flatten(0, 1), None, "int8", 1, 8, D, x.dtype)
    order, starts = moe_align(torch.zeros(T, 1, dtype=torch.int32), 2)
    return grouped_linear(x, plain.reshape(2, D, D), order, starts, 1)


def dense(stored: Tensor, scales: Tensor, zero: Tensor | None = None) -> Tensor:
    return dequantize_weight(stored, scales, zero, "int8", 1, 0, D, torch.float32)


MISSES: list[tuple[Pass, Callable[..., Any], tuple[Tensor, ...], str]] = [
    (passes.RAISE_RMS_NORM, lambda x, w: norm(x, w, power=4.0), (x, w), "has 4"),
    (passes.RAISE_RMS_NORM, lambda x, w: norm(x, w), (x, torch.rand(T, 1)), "weight has shape"),
    (passes.RAISE_LAYER_NORM, lambda x, w: F.layer_norm(x, (D,)) * w, (x, w), "it has no weight"),
    (passes.RAISE_ROPE, lambda x, c, s: x * c[:, None] + neighbours(x) * s[:, None], (heads, *tables()), "pattern has"),
    (passes.RAISE_SWIGLU, lambda x, w: F.silu(x) * w + F.silu(x).sum(), (x, torch.rand(1, D)), "wanted equal shapes"),
    (passes.RAISE_MOE, lambda x, w: torch.topk(torch.sigmoid(x) * w, 2)[0], (x, w), "indices are not read"),
    (passes.RAISE_MOE, lambda x, w: [*torch.topk(F.softmax(x * w, -1), 2, 0)], (x, w), "the largest of dimension 0"),
    (passes.RAISE_GATHER, lambda x, w: w.index_select(1, x), (torch.tensor([1, 0]), square), "dimension 1"),
    (passes.RAISE_GATHER, lambda x, w: F.embedding(x, w), (torch.tensor([1, 0]).int(), square), "index torch.int32"),
    (passes.FUSE_ADD_RMS_NORM, lambda x, w: rms_norm(x + w, w, 1e-5), (x, w), "wanted the same"),
    (passes.FUSE_ADD_RMS_NORM, lambda x, w: rms_norm(x * w, w, 1e-5), (x, w), "the pattern has aten.add"),
    (
        passes.FUSE_GATE_UP, lambda x, w: silu_mul(torch.cat([F.linear(x, w * x.sum()), F.linear(x, w)], -1)),
        (x, square), "is computed in the step",
    ),
    (
        passes.FUSE_GATE_UP, lambda x, w: silu_mul(torch.cat([x @ w, x @ w.T], -1)), (x, square),
        "the pattern has aten.linear",
    ),
    (
        passes.FUSE_QKV, lambda x, w: (F.linear(x, w), F.linear(x, w * x.sum())), (x, square),
        "is computed in the step",
    ),
    (
        passes.FUSE_QK_NORM_ROPE,
        lambda y, wq, wk, c, s: [
            rope(rms_norm(y[:, a * D : (a + n) * D].reshape(T, n, D), w, 1e-6), c, s, True)
            for a, n, w in ((0, H, wq), (H, K, wk))
        ],
        joint(), "or in interleaved pairs",
    ),
    (
        passes.FUSE_ROPE_KV_WRITE, lambda k, *to: (kv_append(k, k, *to), to[0].clone())[1], (heads, *caches, slots),
        "its keys are not rope's result",
    ),
    (
        passes.QUANTIZE_LINEAR, lambda x, q, s: F.linear(x.expand(2, T, D), dense(q, s)), (x, stored, scales),
        "its input is (2, ",
    ),
    (
        passes.QUANTIZE_LINEAR, lambda x, q, s, w: F.linear(x, torch.cat([dense(q, s), w])),
        (x, stored, scales, square), "which is not quantized",
    ),
    (
        passes.QUANTIZE_LINEAR, lambda x, q, s: F.linear(x, dense(q, s, q[:, :1])), (x, stored, scales),
        "with zero points have no kernel",
    ),
    (
        passes.QUANTIZE_EXPERTS, experts, (x, stored.expand(2, D, D).clone(), torch.rand(2, D, 2)),
        "blocks of (1, 8) have no kernel",
    ),
    (passes.FUSE_RMS_NORM_QUANT, lambda x, w: quantized(y := rms_norm(x, w, 1e-5), y * 2), (x, w), "an extra user mul"),
    (
        passes.FUSE_ADD_RMS_NORM_QUANT,
        lambda x, w: quantized(y := add_rms_norm(x, x, w, 1e-5)[0], y * 2), (x, w), "an extra user mul",
    ),
    (
        passes.FUSE_RMS_NORM_QUANT, lambda x, w: [*quantize(rms_norm(x, w, 1e-5).reshape(T, K * D), torch.int8)],
        (heads, w), "makes rows",
    ),
    (
        passes.FUSE_SILU_MUL_QUANT, lambda x, w: [*quantize(silu_mul(x).reshape(T * 4, 2), torch.int8), w.sum()],
        (x, w), "makes rows",
    ),
    (passes.FUSE_SILU_MUL_QUANT, lambda x, w: quantized(y := silu_mul(x), y * w[:8]), (x, w), "an extra user mul"),
    (
        passes.FUSE_ATTENTION_QUANT,
        lambda *of: quantized((y := attention(*of, 0.25)).reshape(T, -1), y * 2), (heads, *caches, *spans),
        "an extra user mul",
    ),
]  # fmt: skip


@pytest.mark.parametrize("row", MISSES, ids=[f"{i} {row[0].name}" for i, row in enumerate(MISSES)])
def test_it_stays_and_the_miss_says_why(row: Any) -> None:
    entry, function, args, reason = row
    module = traced(function, *args)
    for node in module.graph.find_nodes(op="placeholder"):
        if node.meta["val"].dtype == torch.int8:
            node.meta["quantizes_input"] = True
    if entry in RAISE:  # which reads a model's own spelling
        canonicalize(module)
    report = entry.apply(module, Structure())
    assert report.matched == 0 and report.misses, report
    assert any(reason in miss.reason for miss in report.misses), report.misses
    module.recompile()
    for was, now in zip(flat(function(*args)), flat(module(*args)), strict=True):
        torch.testing.assert_close(now, was)


def test_every_fusion_has_a_near_miss() -> None:
    assert {p.name for p in (*RAISE, *FUSE, *FUSE_QUANT)} == {row[0].name for row in MISSES} | ELSEWHERE.keys()
