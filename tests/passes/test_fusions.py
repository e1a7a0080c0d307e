"""Fusions around attention, layer norms and cleanup: they fire as promised, keep the result, explain near misses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from seamwise.kernels import kv_append, layer_norm, qk_norm_rope, rms_norm, rope, rope_kv_write
from seamwise.passes import (
    CANCEL_VIEWS,
    CSE,
    FUSE_QK_NORM_ROPE,
    FUSE_ROPE_KV_WRITE,
    RAISE_LAYER_NORM,
    Pass,
    Report,
    Structure,
)  # fmt: skip

T, H, K, D = 5, 4, 2, 16
STRUCTURE = Structure(qk_norms=1, rotations=2, layer_norms=1)


def traced(function: Callable[..., Any], *args: Tensor) -> GraphModule:
    """Trace with real values; every tensor after the first is a weight."""
    module = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*args)
    for i, node in enumerate(module.graph.find_nodes(op="placeholder")):
        node.meta["weight"] = i > 0
    return module


def applied(entry: Pass, function: Callable[..., Any], *args: Tensor) -> tuple[Report, list[Any]]:
    """Apply a pass to a traced function, hold that the result stays, and that a second run finds nothing."""
    module = traced(function, *args)
    report = entry.apply(module, STRUCTURE)
    module.recompile()
    before, after = function(*[a.clone() for a in args]), module(*[a.clone() for a in args])
    for was, now in zip(flat(before), flat(after), strict=True):
        torch.testing.assert_close(now, was)
    assert entry.apply(module, STRUCTURE).matched == 0
    return report, [n.target for n in module.graph.nodes if n.op == "call_function"]


def flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def tables() -> tuple[Tensor, Tensor]:
    angles = torch.rand(T, D)
    return angles.cos(), angles.sin()


def branches(y: Tensor, wq: Tensor, wk: Tensor, cos: Tensor, sin: Tensor, **odd: Any) -> tuple[Tensor, Tensor]:
    """Query and key of a joint projection; `odd` spoils one condition."""
    first = odd.get("first", H * D)
    q = rms_norm(y[:, : H * D].reshape(T, H, D), wq, 1e-6)
    k = rms_norm(y[:, first : first + K * D].reshape(T, K, D), wk, odd.get("eps", 1e-6))
    return rope(q, cos, sin), rope(k, sin if odd.get("tables") else cos, sin)


def joint() -> tuple[Tensor, ...]:
    return torch.randn(T, (H + 2 * K) * D), torch.rand(D), torch.rand(D), *tables()


def test_qk_norm_rope() -> None:
    report, targets = applied(FUSE_QK_NORM_ROPE, lambda *args: branches(*args), *joint())
    assert report.matched == report.expected == 1 and qk_norm_rope.op in targets and rms_norm.op not in targets


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"eps": 1e-5}, "queries are normed with eps 1e-06, keys with 1e-05"),
        ({"first": (H + K) * D}, "do not adjoin"),
        ({"tables": True}, "different tables"),
    ],
)
def test_qk_norm_rope_near_misses(odd: dict[str, Any], reason: str) -> None:
    report, _ = applied(FUSE_QK_NORM_ROPE, lambda *args: branches(*args, **odd), *joint())
    assert report.matched == 0 and reason in report.misses[0].reason


def stored(again: bool) -> Callable[..., Any]:
    def write(k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> Any:
        rotated = rope(k, cos, sin)
        kv_append(rotated, v, k_cache, v_cache, slots)
        return (k_cache.clone(), v_cache.clone(), rotated + 0) if again else (k_cache.clone(), v_cache.clone())

    return write


@pytest.mark.parametrize("again", [False, True])
def test_rope_kv_write(again: bool) -> None:
    caches = [torch.zeros(3, K, 4, D) for _ in range(2)]
    args = torch.randn(T, K, D), torch.randn(T, K, D), *tables(), *caches, torch.tensor([4, 5, -1, 7, 8])
    report, targets = applied(FUSE_ROPE_KV_WRITE, stored(again), *args)
    assert report.matched == (not again) and (rope_kv_write.op in targets) == (not again)
    assert not again or "has an extra user" in report.misses[0].reason


def test_layer_norm() -> None:
    norm = torch.nn.functional.layer_norm
    x, weight, bias = torch.randn(T, D), torch.rand(D), torch.rand(D)
    report, targets = applied(RAISE_LAYER_NORM, lambda x, w, b: norm(x, (D,), w, b, 1e-6), x, weight, bias)
    assert report.matched == report.expected == 1 and layer_norm.op in targets
    report, _ = applied(RAISE_LAYER_NORM, lambda x, w: norm(x, (D,), w, None, 1e-6), x, weight)
    assert report.matched == 1
    report, _ = applied(RAISE_LAYER_NORM, lambda x, w: norm(x, (T, D), w), x, torch.rand(T, D))
    assert report.matched == 0 and "normalizes 2 dimensions" in report.misses[0].reason


def test_views_that_undo_each_other_go() -> None:
    def views(x: Tensor, w: Tensor) -> Tensor:
        heads = x.transpose(0, 1).unsqueeze(0)
        return heads.select(0, 0).transpose(1, 0) * w

    report, targets = applied(CANCEL_VIEWS, views, torch.randn(3, 4), torch.rand(4))
    assert report.matched == 2 and targets == [torch.ops.aten.mul.Tensor]
    report, _ = applied(CANCEL_VIEWS, lambda x, w: x.select(0, 0).unsqueeze(0) * w, torch.randn(2, 4), torch.rand(4))
    assert report.matched == 0, "of two rows the first is taken"


def test_equal_ops_are_computed_once() -> None:
    report, targets = applied(CSE, lambda x, w: x.cos() * w + x.cos() + x.sin(), torch.randn(3), torch.rand(3))
    assert report.matched == 1 and targets.count(torch.ops.aten.cos.default) == 1
    report, _ = applied(CSE, lambda x, w: (x + 1) * w + (x + True), torch.randn(3), torch.rand(3))
    assert report.matched == 0, "1 and True are different arguments"
    module = traced(lambda x, w: torch.bernoulli(x) + torch.bernoulli(x) + w, torch.rand(3), torch.rand(3))
    assert CSE.apply(module, STRUCTURE).matched == 0, "two draws are two"
