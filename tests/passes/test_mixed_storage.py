"""Weights of one attention or MLP that are stored in different forms: each form keeps its kernels, nothing is lost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_fusions import applied, flat, traced
from torch import Tensor

from seamwise import passes
from seamwise.kernels import dequantize_weight, quantize, rms_norm, rope, scaled_linear, silu_mul
from seamwise.passes import Structure

T, K, N = 5, 256, 256
x = torch.randn(T, K)
plain = torch.randn(N, K)
stored, scale = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(N, 1) + 0.1


def dense(stored: Tensor, scale: Tensor, rows: int = 1, columns: int = 0) -> Tensor:
    return dequantize_weight(stored, scale, None, "int8", rows, columns, K, torch.float32)


def chain(function: object, *args: Tensor, **structure: int) -> tuple[dict[str, passes.Report], list[object]]:
    """Run the joins and then the quantized kernels; hold that the result stays within the rounding of inputs."""
    module = traced(function, *args)  # type: ignore[arg-type]
    reports = {}
    for entry in (passes.FUSE_GATE_UP, passes.FUSE_QKV, passes.QUANTIZE_LINEAR):
        reports[entry.name] = entry.apply(module, Structure(**structure))
    module.recompile()
    for was, now in zip(flat(function(*args)), flat(module(*args)), strict=True):  # type: ignore[operator]
        torch.testing.assert_close(now, was, rtol=0.02, atol=0.02 * float(was.abs().max()))
    return reports, [n.target for n in module.graph.nodes if n.op == "call_function"]


def test_keys_and_values_are_quantized_where_queries_are_not() -> None:
    def qkv(x: Tensor, q: Tensor, k: Tensor, ks: Tensor, v: Tensor, vs: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, q), F.linear(x, dense(k, ks)), F.linear(x, dense(v, vs))

    reports, targets = chain(qkv, x, plain, stored, scale, stored.flip(0), scale, attentions=1)
    assert (reports["fuse_qkv"].matched, reports["fuse_qkv"].expected) == (1, 1)
    assert reports["quantize_linear"].matched == 1 and not reports["quantize_linear"].misses
    assert targets.count(scaled_linear.op) == 1 and targets.count(quantize.op) == 1, "of keys and values together"
    assert targets.count(torch.ops.aten.linear.default) == 1, "the queries"


def test_forms_that_all_differ_are_not_joined_and_break_no_promise() -> None:
    def qkv(x: Tensor, q: Tensor, k: Tensor, ks: Tensor) -> tuple[Tensor, ...]:
        return F.linear(x, q), F.linear(x, dense(k, ks))

    reports, targets = chain(qkv, x, plain, stored, scale, attentions=1)
    assert (reports["fuse_qkv"].matched, reports["fuse_qkv"].expected) == (0, 0)
    assert "stored in different forms" in reports["fuse_qkv"].misses[0].reason
    assert targets.count(scaled_linear.op) == 1 and targets.count(torch.ops.aten.linear.default) == 1


def test_a_gate_that_is_not_quantized_leaves_up_its_kernel() -> None:
    def mlp(x: Tensor, gate: Tensor, up: Tensor, us: Tensor) -> Tensor:
        return silu_mul(torch.cat([F.linear(x, gate), F.linear(x, dense(up, us))], -1))

    reports, targets = chain(mlp, x, plain, stored, scale, gate_up_pairs=1)
    assert (reports["fuse_gate_up"].matched, reports["fuse_gate_up"].expected) == (0, 0)
    assert targets.count(scaled_linear.op) == 1


@pytest.mark.parametrize("mixed", [False, True])
def test_heads_that_are_normed_apart_are_excused_once_an_attention(mixed: bool) -> None:
    def heads(x: Tensor, q: Tensor, k: Tensor, ks: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        layers = F.linear(x, q), F.linear(x, dense(k, ks) if mixed else ks * q)
        return tuple(rope(rms_norm(y.reshape(T, 2, 128), w, 1e-6), cos, sin) for y in layers)

    tables = torch.rand(T, 128), torch.rand(T, 128)
    module = traced(heads, x, plain, stored, scale, torch.rand(128), *tables)
    report = passes.FUSE_QK_NORM_ROPE.apply(module, Structure(qk_norms=1))
    assert len(report.misses) == 2 and report.expected == (0 if mixed else 1)


def test_a_weight_that_is_computed_later_is_moved_ahead_of_the_join() -> None:
    """What a pass inserts reads only what stands before it."""
    report, targets = applied(passes.FUSE_QKV, lambda x, w: (F.linear(x, w), F.linear(x, w * 2)), x, plain)
    assert report.matched == 1 and targets.count(torch.ops.aten.linear.default) == 1
