"""Quantized weights and the linear layers over them, against others' implementations and written-out sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from laws import arguments, check, refusal
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from seamwise.compile.derive import evaluate
from seamwise.kernels import (
    dequantize_weight,
    mxfp4_linear,
    quantize,
    quantize_weight,
    scaled_linear,
    w4a16_linear,
    weight_scale,
)
from seamwise.kernels.linear.mxfp4_linear import dequantize_mxfp4
from seamwise.kernels.quant.quantize_weight import FORMATS, expand_blocks, pack_int4, unpack_int4

FLOAT8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=60)
@given(data=st.data())
def test_torch_keeps_the_contract(data: Any) -> None:
    """torch._scaled_mm and torch._int_mm, where they accept; int8 sums are exact, so that only scaling rounds."""
    args, _ = data.draw(arguments(scaled_linear, DTYPES, "cpu"))
    assume(refusal(scaled_linear, "torch_scaled_mm", args) is None)
    check(scaled_linear, "torch_scaled_mm", args)


def test_torch_serves_rows_on_a_cpu() -> None:
    for sizes in ({"T": 3, "N": 5, "K": 70}, {"T": 3, "N": 5, "K": 70, "format": "int8", "rows": 1, "bias": True}):
        args = scaled_linear.make_inputs(sizes, dtype=torch.bfloat16, device="cpu")
        assert refusal(scaled_linear, "torch_scaled_mm", args) is None


def test_torch_is_not_asked_for_products_of_one_int8_column() -> None:
    """torch 2.13 leaves what memory held in the sums of torch._int_mm; found by the test above, poisoned."""
    args = scaled_linear.make_inputs({"T": 3, "N": 5, "K": 1, "format": "int8"}, dtype=torch.float32, device="cpu")
    assert "K = 1" in (refusal(scaled_linear, "torch_scaled_mm", args) or "")
    check(scaled_linear, scaled_linear.choose(args).name, args)


def test_block_scales_are_promoted_sums() -> None:
    """DeepSeek-V3's rule, written out: each 128 columns are summed, then scaled by row and block, then added."""
    T, N, K = 4, 200, 300
    x, x_scale, w, w_scale, *_ = scaled_linear.make_inputs(
        {"T": T, "N": N, "K": K, "x_group": 128, "rows": 128, "columns": 128}, dtype=torch.float32, device="cpu"
    )
    assert x_scale.shape == (T, 3) and w_scale.shape == (2, 3)
    exact = torch.zeros(T, N, dtype=torch.float64)
    for n in range(N):
        for g in range(3):
            part = slice(128 * g, 128 * (g + 1))
            exact[:, n] += (x[:, part].double() @ w[n, part].double()) * x_scale[:, g] * w_scale[n // 128, g]
    got = scaled_linear.meaning(x, x_scale, w, w_scale, torch.float32)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-4)


@given(
    st.integers(1, 140), st.integers(1, 300), st.sampled_from(sorted(FORMATS)), st.sampled_from([0, 1, 128]),
    st.sampled_from([0, 32, 128]), st.sampled_from([1e-3, 1.0, 1e3]),
)  # fmt: skip
def test_a_weight_is_at_most_half_a_step_off(N: int, K: int, format: str, rows: int, columns: int, size: float) -> None:
    weight = torch.randn(N, K, generator=torch.Generator().manual_seed(N)) * size
    weight[0] = 0
    scale = weight_scale(weight, format, rows, columns)
    stored = quantize_weight(weight, scale, format, rows, columns)
    values = (unpack_int4(stored, K) if format == "int4" else stored).float()
    steps = expand_blocks(scale, (N, K), rows, columns)
    half = (values.abs() / 16).clamp(min=2.0**-10) if format == "float8_e4m3fn" else torch.full_like(values, 0.5)
    assert ((values * steps - weight).abs() <= half * steps * 1.0001).all()
    assert not values[0].any()


def test_rows_are_quantized_as_activations_are() -> None:
    weight = torch.randn(7, 300, generator=torch.Generator().manual_seed(0))
    for dtype, format in ((FLOAT8, "float8_e4m3fn"), (torch.int8, "int8")):
        for group in (0, 128):
            q, scale = quantize(weight, dtype, group)
            torch.testing.assert_close(weight_scale(weight, format, 1, group), scale, rtol=0, atol=0)
            assert torch.equal(quantize_weight(weight, scale, format, 1, group).view(torch.uint8), q.view(torch.uint8))


def test_a_quantized_weight_is_a_recipe() -> None:
    weight, scheme = torch.randn(9, 70), ["int4", 1, 32]
    scale = {"op": str(weight_scale.op), "args": [{"weight": "w"}, *scheme]}
    recipe = {"op": str(quantize_weight.op), "args": [{"weight": "w"}, scale, *scheme]}
    got = evaluate(recipe, {"w": weight}.__getitem__)
    assert torch.equal(got, quantize_weight(weight, weight_scale(weight, *scheme), *scheme))


def test_int4_is_laid_out_as_compressed_tensors_does() -> None:
    """What compressed-tensors 0.20's pack_to_int32 gives for these, the zero points packed along N."""
    values = torch.tensor(
        [[-8, 7, 0, -1, 1, 3, -5, 6, 2, -3, 4, -7], [5, -2, -6, 0, 7, -8, 1, -4, -1, 6, 3, -5]], dtype=torch.int8
    )
    packed = torch.tensor([[-474384144, 7258], [1225753197, 15335]], dtype=torch.int32)
    zero = torch.tensor([[1, -2], [3, -8]], dtype=torch.int8)
    assert torch.equal(pack_int4(values), packed) and torch.equal(unpack_int4(packed, 12), values)
    assert torch.equal(unpack_int4(torch.tensor([[185, 6]], dtype=torch.int32).T, 2).T, zero)
    scale = torch.tensor([[0.0123, 0.5], [0.3, 0.0077]]).bfloat16()
    weight = dequantize_weight(packed, scale, zero, "int4", 1, 8, 12, torch.bfloat16)
    for n in range(2):
        for k in range(12):
            assert weight[n, k] == (values[n, k].bfloat16() - zero[n, k // 8]) * scale[n, k // 8]


def test_mxfp4_is_read_as_transformers_does() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    packed, scale = every_mxfp4_weight()
    for dtype in (torch.bfloat16, torch.float32):
        theirs = convert_moe_packed_tensors(packed.view(1, -1, 16, 16), scale[None], dtype=dtype)  # (1, K, N)
        assert torch.equal(theirs[0].T, dequantize_mxfp4(packed, scale, dtype))


def every_mxfp4_weight() -> tuple[Tensor, Tensor]:
    """All 256 bytes, with every scale whose weights float32 holds: packed (255, 256), scales 0 … 252."""
    packed = torch.arange(256, dtype=torch.uint8).expand(253, 256).contiguous()
    return packed, torch.arange(253, dtype=torch.uint8)[:, None].expand(253, 16).contiguous()


def fake_args(T: Any, N: int, K: int, dtype: torch.dtype, *, group: int = 0, blocks: bool = False) -> tuple[Any, ...]:
    """Arguments on a GPU that need not be here; T may be symbolic."""
    x_scale = torch.empty(T, -(-K // group) if group else 1, device="cuda")
    w_scale = torch.empty(-(-N // 128), -(-K // 128), device="cuda") if blocks else torch.empty(N, 1, device="cuda")
    x, w = torch.empty(T, K, dtype=dtype, device="cuda"), torch.empty(N, K, dtype=dtype, device="cuda")
    return x, x_scale, w, w_scale, torch.bfloat16


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ((17, 24, 32, torch.int8), None), ((16, 24, 32, torch.int8), "more than 16 rows"),
        ((17, 20, 32, torch.int8), "multiples of 8"), ((1, 32, 64, FLOAT8), None),
        ((1, 24, 64, FLOAT8), "multiples of 16"), ((1, 32, 24, FLOAT8), "multiples of 16"),
        ((1, 0, 16, FLOAT8), "empty"),
    ],
)  # fmt: skip
def test_torch_refuses_on_a_gpu_what_it_cannot_serve(sizes: tuple[Any, ...], reason: str | None) -> None:
    with FakeTensorMode():
        assert_reason(refusal(scaled_linear, "torch_scaled_mm", fake_args(*sizes)), reason)


def assert_reason(got: str | None, wanted: str | None) -> None:
    assert (got is None) if wanted is None else (got is not None and wanted in got), got


def test_torch_refuses_what_other_dtypes_scales_and_strides_need() -> None:
    with FakeTensorMode():
        x, x_scale, w, w_scale, dtype = fake_args(32, 128, 512, FLOAT8)
        strided = torch.empty_strided((32, 512), (1024, 1), dtype=FLOAT8, device="cuda")
        bias, double = torch.empty(128, device="cuda"), torch.empty(32, 1, dtype=torch.float64, device="cuda")
        for args, reason in (
            ((x, x_scale, w, w_scale, torch.float16), "must be bfloat16, got torch.float16"),
            ((x, x_scale, w, w_scale, dtype, bias), "torch.float32"),
            ((strided, x_scale, w, w_scale, dtype), "contiguous"),
            ((x, double, w, w_scale, dtype), "must be torch.float32"),
            (fake_args(32, 128, 512, FLOAT8, group=128), "on both sides"),
            (fake_args(32, 128, 512, FLOAT8, blocks=True), "on both sides"),
            (fake_args(32, 128, 640, FLOAT8, group=128, blocks=True), "multiples of 512"),
            (fake_args(32, 128, 512, torch.int8, group=128), "one scale a row"),
        ):
            assert_reason(refusal(scaled_linear, "torch_scaled_mm", args), reason)


def test_rows_not_known_yet_are_not_taken_for_more_than_16() -> None:
    env = ShapeEnv()
    with FakeTensorMode(shape_env=env):
        args = fake_args(env.create_unbacked_symint(), 32, 64, torch.int8)
        assert_reason(refusal(scaled_linear, "torch_scaled_mm", args), "more than 16 rows")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 200, dtype=torch.int8)}, "x is torch.int8, w torch.float8_e4m3fn"),
        ({0: torch.zeros(2, 199).to(FLOAT8)}, "w has 200 columns but x has 199 columns"),
        ({1: torch.ones(2, 3)}, r"x_scale has 3 columns, wanted 1 or cdiv\(K,128\) = 2"),
        ({3: torch.ones(1, 2)}, r"w_scale has shape \(1, 2\), wanted \(130, 1\) or \(1, 1\) or \(2, 2\)"),
        ({5: torch.ones(129)}, "bias has 129 elements but w has 130 rows"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("provider", ["torch", "torch_scaled_mm"])
def test_wrong_scaled_arguments_are_named(provider: str, change: dict[int, Any], message: str) -> None:
    args = [torch.zeros(2, 200).to(FLOAT8), torch.ones(2, 1), torch.zeros(130, 200).to(FLOAT8), torch.ones(130, 1)]
    args = [*args, torch.float32, None]
    scaled_linear.run(provider, *args)
    for index, value in change.items():
        args[index] = value
    with pytest.raises(ValueError, match=message):
        scaled_linear.run(provider, *args)


def test_wrong_weights_are_named() -> None:
    x, packed, scale = torch.zeros(2, 64), torch.zeros(5, 8, dtype=torch.int32), torch.ones(5, 2)
    with pytest.raises(ValueError, match=r"scale has 2 columns, wanted blocks\(K,group\) = 1"):
        w4a16_linear(x, packed, scale, None, 0)
    with pytest.raises(ValueError, match="packed has 8 columns, wanted 9 for 65 of x"):
        w4a16_linear(torch.zeros(2, 65), packed, scale, None, 64)
    with pytest.raises(ValueError, match="packed has 8 columns, wanted 64 for 64 of x"):
        w4a16_linear(x, packed.to(torch.int8), scale, None, 32)
    with pytest.raises(ValueError, match=r"packed is torch\.int16"):
        w4a16_linear(x, packed.to(torch.int16), scale, None, 32)
    with pytest.raises(ValueError, match=r"zero is torch\.int32, wanted int8 or an offset"):
        w4a16_linear(x, packed, scale, torch.ones(5, 2, dtype=torch.int32), 32)
    with pytest.raises(ValueError, match="33 columns, wanted a multiple of 32"):
        mxfp4_linear(torch.zeros(2, 33), torch.zeros(5, 16, dtype=torch.uint8), torch.zeros(5, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="scale has 1 columns, wanted G = 2"):
        mxfp4_linear(x, torch.zeros(5, 32, dtype=torch.uint8), torch.zeros(5, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match="'int5' is not one of float8_e4m3fn, int8, int4"):
        weight_scale(x, "int5", 0, 0)
