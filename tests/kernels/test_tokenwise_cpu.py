"""The row-wise ops in C++: their meanings are the truth, in float64 for values and at the dtype for bits."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import check_budget, magnitudes, on_instruction_sets
from torch import Tensor

from seamwise.kernels import add_rms_norm, gather_rows, quantize, rms_norm, rope, rope_table, silu_mul
from seamwise.kernels.contract import Contract

drawn = settings(max_examples=30)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds, paddings, scales = st.integers(0, 2**31 - 1), st.sampled_from([0, 5]), st.sampled_from([1e-3, 1.0, 30.0])
tokens_, widths = st.integers(0, 20), st.integers(1, 300)


code = on_instruction_sets("avx2", "baseline")


@pytest.fixture(autouse=True)
def keep_thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(count: int, width: int, dtype: torch.dtype, seed: int, padding: int = 0, scale: float = 1.0) -> Tensor:
    """Draw (count, width), a view of a wider matrix whose other columns are NaN."""
    matrix = torch.full((count, width + padding), torch.nan)
    matrix[:, :width] = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * scale
    return matrix.to(dtype)[:, :width]


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def check(contract: Contract, *args: Any, threads: int = 2) -> list[Tensor]:
    """Hold laws.check_budget against float64, and the same bits for any number of threads."""
    torch.set_num_threads(1)
    got = tensors(contract.run("cpp", *args))
    torch.set_num_threads(threads)
    again = tensors(contract.run("cpp", *args))
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    near, far = tensors(contract.meaning(*args)), tensors(contract.meaning(*wide))
    for i, (kernel, other, same, exact) in enumerate(zip(got, again, near, far, strict=True)):
        assert torch.equal(kernel, other)
        assert kernel.shape == exact.shape and kernel.dtype == same.dtype and kernel.is_contiguous()
        if exact.numel():
            check_budget(
                kernel.double(), same.double(), exact, torch.finfo(kernel.dtype).eps,
                lambda i=i: magnitudes(contract, args)[i],
            )  # fmt: skip
    return got


@drawn
@given(tokens_, widths, dtypes, paddings, scales, seeds)
def test_norms(tokens: int, width: int, dtype: torch.dtype, padding: int, scale: float, seed: int) -> None:
    x, residual = (rows(tokens, width, dtype, seed + i, padding, scale) for i in range(2))
    weight = rows(1, width, dtype, seed + 2)[0]
    (normed,) = check(rms_norm, x, weight, 1e-5)
    of_sum, total = check(add_rms_norm, x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(of_sum, rms_norm.run("cpp", total, weight, 1e-5))
    for t in range(min(tokens, 2)):
        assert torch.equal(rms_norm.run("cpp", x[t : t + 1], weight, 1e-5), normed[t : t + 1])


@drawn
@given(
    tokens_, widths, dtypes, paddings, st.sampled_from([1e-12, 1e-3, 1.0, 3e4]), seeds, st.sampled_from([0, 16, 128]),
    st.sampled_from([torch.float8_e4m3fn, torch.int8]), st.booleans(), st.sampled_from([0.0, torch.nan, torch.inf]),
)  # fmt: skip
def test_quantize_has_the_bits_of_its_meaning(
    tokens: int, width: int, dtype: torch.dtype, padding: int, size: float, seed: int, group: int, to: torch.dtype,
    static: bool, odd: float,
) -> None:  # fmt: skip
    x = rows(tokens, width, dtype, seed, padding, size)
    x[: tokens // 2, seed % width] = odd
    given_ = (x, to, 0 if static else group, torch.tensor([0.01 * size]) if static else None)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        (q, scale), (wanted, of) = quantize.run("cpp", *given_), quantize.meaning(*given_)
        torch.testing.assert_close(scale, of, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(q.float(), wanted.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("to", [torch.float8_e4m3fn, torch.int8])
def test_quantize_rounds_every_tie_to_even(to: torch.dtype) -> None:
    """The middles between neighbours, by a scale of one, and what lies beyond the largest."""
    every = (
        torch.arange(-127, 128).float() if to == torch.int8 else torch.arange(127, dtype=torch.uint8).view(to).float()
    )
    x = torch.cat((every, (every[1:] + every[:-1]) / 2, torch.tensor([1e4, -1e4, -0.0])))[None]
    given_ = (torch.cat((x, -x)), to, 0, torch.ones(1))
    assert torch.equal(quantize.run("cpp", *given_)[0].float(), quantize.meaning(*given_)[0].float())


def test_norm_rounds_where_its_meaning_rounds() -> None:
    """The normalized row is rounded before the weight multiplies it: without that, one element in five differs."""
    x, weight = rows(200, 64, torch.bfloat16, 0), rows(1, 64, torch.bfloat16, 1)[0]
    assert (rms_norm.run("cpp", x, weight, 1e-5) != rms_norm.meaning(x, weight, 1e-5)).float().mean() < 1e-3


@drawn
@given(tokens_, st.integers(1, 9), st.sampled_from([2, 6, 16, 48, 64, 80, 128]), dtypes, paddings, seeds)
def test_rope_has_the_bits_of_its_meaning(
    tokens: int, heads: int, width: int, dtype: torch.dtype, padding: int, seed: int
) -> None:
    x = rows(tokens, (heads + 2) * width, dtype, seed)[:, : heads * width].unflatten(1, (heads, width))
    cos, sin = rows(tokens, width, dtype, seed + 1, padding), rows(tokens, width, dtype, seed + 2)
    (out,) = check(rope, x, cos, sin)
    assert torch.equal(out, rope.meaning(x, cos, sin))


@drawn
@given(tokens_, st.integers(1, 400), dtypes, paddings, scales, seeds)
def test_silu_mul(tokens: int, width: int, dtype: torch.dtype, padding: int, scale: float, seed: int) -> None:
    x = rows(tokens, 2 * width, dtype, seed, padding, scale)
    (out,) = check(silu_mul, x)
    if tokens:
        assert torch.equal(silu_mul.run("cpp", x[-1:]), out[-1:])


@pytest.mark.parametrize("low", [-95.0, -86.0, -20.0, -1e-3, 87.0])
def test_silu_of_every_magnitude(low: float) -> None:
    gate = torch.linspace(low, low + 3, 4099)
    for up in (1.0, 1e30):
        check(silu_mul, torch.cat((gate, torch.full_like(gate, up)))[None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_special_values_stay_in_their_row(dtype: torch.dtype) -> None:
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, -3e38])
    x = torch.ones(7, 40)
    x[:, 3] = special
    x, weight = x.to(dtype), torch.ones(20, dtype=dtype)
    for contract, args in [
        (silu_mul, (x,)), (rms_norm, (x[:, :20], weight, 1e-5)), (add_rms_norm, (x[:, :20], x[:, 20:], weight, 1e-5)),
        (rope, (x.view(7, 2, 20), torch.ones(7, 20, dtype=dtype), torch.ones(7, 20, dtype=dtype))),
    ]:  # fmt: skip
        for got, want in zip(tensors(contract.run("cpp", *args)), tensors(contract.meaning(*args)), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


@drawn
@given(st.integers(1, 20), tokens_, widths, st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), seeds)
def test_gather_rows(table_rows: int, tokens: int, width: int, dtype: torch.dtype, seed: int) -> None:
    index = torch.randint(table_rows, (tokens,), generator=torch.Generator().manual_seed(seed))
    table = rows(table_rows, width, dtype, seed, padding=1)
    assert torch.equal(gather_rows.run("cpp", table, index), table[index])
    assert torch.equal(gather_rows.run("cpp", table, index.view(1, -1)), table[index][None])


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_gather_rows_names_an_index_outside_the_table(wrong: int) -> None:
    with pytest.raises(ValueError, match=f"index {wrong}, wanted 0 to 4"):
        gather_rows.run("cpp", torch.zeros(5, 3), torch.tensor([1, 4, wrong, 0]))


@drawn
@given(st.lists(st.integers(0, 131071), max_size=20), st.integers(1, 80), dtypes, st.sampled_from([1.0, 1.19]))
def test_rope_table(positions: list[int], speeds: int, dtype: torch.dtype, scaling: float) -> None:
    speeds_F = 500000.0 ** (-torch.arange(speeds, dtype=torch.float32) / speeds)
    positions_T = torch.tensor(positions, dtype=torch.int64)
    args = (positions_T, speeds_F, scaling, dtype)
    got, want = rope_table.run("cpp", *args), rope_table.meaning(*args)
    # The angle is rounded to float32 in both; of that angle, cos and sin are within an ulp.
    angles = (positions_T[:, None].float() * speeds_F).double().repeat(1, 2)
    for kernel, same, exact in zip(got, want, (angles.cos() * scaling, angles.sin() * scaling), strict=True):
        assert kernel.shape == same.shape and kernel.dtype == dtype
        if exact.numel():
            assert (kernel - exact).abs().max() <= 2 * ((same - exact).abs().max() + torch.finfo(dtype).eps)


def test_rope_table_agrees_with_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    embedding = LlamaRotaryEmbedding(LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64))
    positions = torch.arange(2000)
    for dtype in (torch.float32, torch.bfloat16):
        theirs = embedding(torch.zeros(1, dtype=dtype), positions[None])
        ours = rope_table(positions, embedding.inv_freq, float(embedding.attention_scaling), dtype)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b[0])


def test_refusals_say_what_was_got() -> None:
    x, weight = torch.ones(3, 8), torch.ones(8)
    with pytest.raises(ValueError, match="float16"):
        rms_norm.run("cpp", x.half(), weight.half(), 1e-5)
    with pytest.raises(ValueError, match=r"strides are \(8, 2\)"):
        silu_mul.run("cpp", x[:, ::2])
    with pytest.raises(ValueError, match="int32"):
        rope_table.run("cpp", torch.zeros(3, dtype=torch.int32), weight, 1.0, torch.float32)
