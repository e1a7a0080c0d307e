"""The packed linear layer in C++: its meaning in float64 is the truth, laws hold in bits."""

import itertools
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from laws import check_budget, on_instruction_sets, widen
from torch import Tensor

from seamwise.kernels import linear_int, linear_packed, pack_group_values, pack_int_panels, pack_linear, w4a16_linear
from seamwise.kernels.contract import CONTRACTS
from seamwise.kernels.cpu import huge_pages, linear_cpu
from seamwise.kernels.linear.linear_int import FORMATS


@pytest.fixture(autouse=True)
def keep_thread_count() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


code = on_instruction_sets("avx512", "avx2", "baseline")


def rows(
    count: int, width: int, seed: int, padding: int = 0, size: float = 1.0, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Draw (count, width), a view of a wider matrix whose other columns are NaN."""
    matrix = torch.full((count, width + padding), torch.nan)
    matrix[:, :width] = torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * size
    return matrix.to(dtype)[:, :width]


def check(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    """Hold laws.check_budget, where nothing cancels in the sum of the products' magnitudes; return the result."""
    packed = pack_linear.run("cpp", weight_NK)
    out = linear_packed.run("cpp", x_TK, packed, weight_NK.shape[0], bias_N)
    assert out.shape == (*x_TK.shape[:-1], weight_NK.shape[0]) and out.dtype == x_TK.dtype
    if out.numel():
        linear = torch.nn.functional.linear
        x, weight, bias = widen((x_TK, weight_NK, bias_N))
        near, far = linear(x_TK, weight_NK, bias_N).double(), linear(x, weight, bias)
        terms = linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
        check_budget(out.double(), near, far, torch.finfo(out.dtype).eps, lambda: terms)
    return out


def test_the_law_leaves_room_where_terms_cancel_and_no_more() -> None:
    far, rounding = torch.tensor([1e-3], dtype=torch.float64), torch.finfo(torch.float32).eps * 1e4
    for error, holds in ((3, True), (6, False)):
        with nullcontext() if holds else pytest.raises(AssertionError):
            check_budget(far + error * rounding, far, far, rounding / 1e4, lambda: torch.tensor([1e4]).double())


sizes, dtypes = st.integers(1, 200), st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=40)
@given(
    st.integers(0, 40), sizes, sizes, dtypes, st.booleans(), st.sampled_from([0, 3]), st.sampled_from([1, 2, 3]), sizes
)
@example(1, 576, 576, torch.bfloat16, False, 0, 2, 0)
@example(33, 97, 1535, torch.bfloat16, True, 1, 2, 0)
@example(33, 97, 1535, torch.float32, True, 1, 2, 0)
@example(3, 64, 8192, torch.float32, False, 0, 2, 0)
def test_agrees_with_its_meaning(
    tokens: int, out_features: int, depth: int, dtype: torch.dtype, biased: bool, padding: int, threads: int, seed: int
) -> None:
    torch.set_num_threads(threads)
    x = rows(tokens, depth, seed, padding, dtype=dtype)
    weight = rows(out_features, depth, seed + 1, padding, size=depth**-0.5, dtype=dtype)
    check(x, weight, rows(1, out_features, seed + 2, dtype=dtype)[0] if biased else None)


@settings(max_examples=30)
@given(sizes, sizes, st.sampled_from([0, 1]), dtypes)
def test_packing_is_its_meaning_and_loses_nothing(
    out_features: int, depth: int, padding: int, dtype: torch.dtype
) -> None:
    weight = rows(out_features, depth, 0, padding, dtype=dtype)
    packed = pack_linear.run("cpp", weight)
    assert torch.equal(packed, pack_linear.meaning(weight))
    unpacked = packed.permute(0, 2, 1, 3).flatten(2).flatten(0, 1)
    assert torch.equal(unpacked[:out_features, :depth], weight)
    assert not unpacked[out_features:].any() and not unpacked[:, depth:].any()


@settings(max_examples=15)
@given(st.integers(1, 70), sizes, sizes, dtypes, st.data())
def test_a_row_has_the_same_bits_in_any_batch_and_for_any_threads(
    tokens: int, out_features: int, depth: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    x, weight = rows(tokens, depth, 0, dtype=dtype), rows(out_features, depth, 1, dtype=dtype)
    torch.set_num_threads(2)
    whole = check(x, weight, None)
    packed = pack_linear.run("cpp", weight)
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(linear_packed.run("cpp", x, packed, out_features), whole)
    first = data.draw(st.integers(0, tokens - 1))
    last = data.draw(st.integers(first + 1, tokens))
    assert torch.equal(linear_packed.run("cpp", x[first:last], packed, out_features), whole[first:last])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize(("tokens", "out_features", "depth"), [(700, 96, 700), (300, 32, 1536), (9, 608, 576)])
def test_rows_beyond_the_cache_and_few_panels(tokens: int, out_features: int, depth: int, threads: int) -> None:
    torch.set_num_threads(threads)
    out = check(rows(tokens, depth, 0), rows(out_features, depth, 1, size=depth**-0.5), None)
    torch.set_num_threads(1)
    packed = pack_linear.run("cpp", rows(out_features, depth, 1, size=depth**-0.5))
    assert torch.equal(linear_packed.run("cpp", rows(tokens, depth, 0)[-1:], packed, out_features), out[-1:])


def test_nothing_but_the_result_is_written_and_nothing_else_read() -> None:
    x, weight, out = rows(5, 33, 0), rows(40, 33, 1), torch.full((7, 41), torch.nan, dtype=torch.bfloat16)
    packed = pack_linear.run("cpp", weight)
    into = out[1:6, :40]
    assert linear_cpu.launch_linear(x, packed, into) is into
    assert torch.equal(into, linear_packed.run("cpp", x, packed, 40))
    assert out[0].isnan().all() and out[6].isnan().all() and out[:, 40].isnan().all()


def test_special_values() -> None:
    x, weight = torch.ones(3, 9, dtype=torch.bfloat16), torch.ones(33, 9, dtype=torch.bfloat16)
    x[1, 2], x[2, 8] = torch.nan, torch.inf  # column 8 shares its pair with padding
    out = linear_packed.run("cpp", x, pack_linear.run("cpp", weight), 33)
    assert (out[0] == 9).all() and out[1].isnan().all() and out[2].isinf().all()


def test_leading_dimensions_and_refusals() -> None:
    x, weight = rows(6, 16, 0), rows(32, 16, 1)
    packed = pack_linear.run("cpp", weight)
    assert torch.equal(linear_packed(x.view(2, 3, 16), packed, 32), linear_packed(x, packed, 32).view(2, 3, 32))
    with pytest.raises(ValueError, match="float16"):
        pack_linear.run("cpp", weight.half())
    with pytest.raises(ValueError, match=r"\(2, 8, 32, 2\) for a weight \(33, 16\)"):
        linear_packed.run("cpp", x, packed, 33)
    with pytest.raises(ValueError, match=r"for a weight \(32, 18\)"):
        linear_packed.run("cpp", rows(6, 18, 0), packed, 32)
    with pytest.raises(ValueError, match="contiguous"):
        linear_packed.run("cpp", rows(6, 32, 0)[:, ::2], packed, 32)


def test_other_dtypes_take_the_meaning() -> None:
    for dtype in (torch.float64, torch.float16):
        x, weight = torch.randn(3, 7).to(dtype), torch.randn(5, 7).to(dtype)
        torch.testing.assert_close(linear_packed(x, pack_linear(weight), 5), torch.nn.functional.linear(x, weight))


def test_huge_pages_never_overlap_and_are_freed_with_their_tensors() -> None:
    shapes = [(3, 5), (1,), (1000, 1000), (0, 4), (5 << 20,)]
    kept = [huge_pages.empty(shape, torch.float32).fill_(i) for i, shape in enumerate(shapes)]
    assert all(bool((t == i).all()) for i, t in enumerate(kept)) and kept[3].shape == (0, 4)
    assert all(t.data_ptr() % 64 == 0 for t in kept)
    view = kept[2][1:2]
    del kept
    assert bool((view == 2).all())


@settings(max_examples=20)
@given(
    st.integers(0, 20), st.integers(1, 100), st.sampled_from([8, 33, 64, 200]), st.sampled_from([0, 2, 32]),
    st.booleans(), st.sampled_from(["int4", "int8"]), st.integers(0, 9),
)  # fmt: skip
@example(9, 70, 200, 32, True, "int4", 0)
@example(9, 70, 200, 32, True, "int8", 0)
def test_panels_are_w4a16_linear(T: int, N: int, K: int, group: int, zero: bool, format: str, seed: int) -> None:
    sizes = {"T": T, "N": N, "K": K, "group": group, "zero": zero, "bias": zero, "format": format}
    args = CONTRACTS["w4a16_linear"].make_inputs(sizes, dtype=torch.bfloat16, device="cpu", seed=seed)
    x, packed, scale, zero_NG, _, bias = args
    offset = None if zero_NG is None else pack_group_values(-(zero_NG * scale).float())
    given_ = (x, pack_int_panels(packed, K), pack_group_values(scale), offset, group, N, bias)
    exact = w4a16_linear.meaning(*widen(args))
    torch.testing.assert_close(linear_int.run("cpp", *given_).double(), exact, rtol=0.01, atol=0.01 * K**0.5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_of_scaled_words_has_the_same_bits_in_any_batch(format: str) -> None:
    """Of 35 groups: a product that is fused with its sum in some blocks and not in others changes a bit in 20,000."""
    sizes = {"T": 300, "N": 256, "K": 1100, "group": 32, "offset": True, "bias": True, "format": format}
    x, *rest, x_scale, dtype = linear_int.make_inputs(sizes, dtype=torch.bfloat16, device="cpu")
    whole = linear_int.run("cpp", x, *rest, x_scale, dtype)
    for count in (1, 7):
        scales = itertools.repeat(None) if x_scale is None else x_scale.split(count)
        parts = zip(x.split(count), scales, strict=False)
        alone = [linear_int.run("cpp", part, *rest, scale, dtype) for part, scale in parts]
        assert torch.equal(torch.cat(alone), whole), count


@pytest.mark.parametrize("count", [1, 5, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_float8_is_read_exactly(count: int, dtype: torch.dtype) -> None:
    """All 256 bytes, as weights in both places of a word and as inputs: bfloat16 holds each of them."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    wanted, one = every.to(dtype), torch.ones(1, 1)
    for width, place in ((1, 0), (2, 1), (3, 2)):
        w, x = torch.zeros(256, width, dtype=torch.float8_e4m3fn), torch.zeros(count, width, dtype=torch.float8_e4m3fn)
        w[:, place], x[:, place] = every, one.to(every.dtype)
        scales = None, 0, 256, None, one.expand(count, 1).contiguous(), dtype
        out = linear_int.run("cpp", x, pack_int_panels(w, width), pack_group_values(one.expand(256, 1)), *scales)
        torch.testing.assert_close(out, wanted.expand(count, 256), rtol=0, atol=0, equal_nan=True)
        w, x = torch.zeros(count, width, dtype=every.dtype), w
        w[:, place] = one.to(every.dtype)
        scales = None, 0, count, None, one.expand(256, 1).contiguous(), dtype
        out = linear_int.run("cpp", x, pack_int_panels(w, width), pack_group_values(one.expand(count, 1)), *scales)
        torch.testing.assert_close(out, wanted[:, None].expand(256, count), rtol=0, atol=0, equal_nan=True)


def test_float8_panels_are_scaled_linear() -> None:
    """Blocks of 128 × 128 that end inside a panel and a word, from the same bytes in float64."""
    for T, bias in itertools.product((1, 6, 40), (False, True)):
        sizes = {"T": T, "N": 333, "K": 397, "x_group": 128, "rows": 128, "columns": 128, "bias": bias}
        for dtype in (torch.float32, torch.bfloat16):
            args = CONTRACTS["scaled_linear"].make_inputs(sizes, dtype=dtype, device="cpu")
            x, x_scale, w, w_scale, _, bias_N = args
            scales = pack_group_values(w_scale.repeat_interleave(128, 0)[:333])
            out = linear_int.run("cpp", x, pack_int_panels(w, 397), scales, None, 128, 333, bias_N, x_scale, dtype)
            scales = w_scale.repeat_interleave(4, 0)[:11, :, None].contiguous()  # a panel's
            same = linear_int.run("cpp", x, pack_int_panels(w, 397), scales, None, 128, 333, bias_N, x_scale, dtype)
            assert torch.equal(out, same)
            exact = CONTRACTS["scaled_linear"].meaning(*widen(args))
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(out.double(), exact, rtol=eps, atol=4 * eps * float(exact.abs().max()))


def test_what_scaled_words_do_not_take_is_named() -> None:
    sizes = {"T": 3, "N": 33, "K": 40, "group": 8, "bias": True}
    ints = linear_int.make_inputs(sizes, dtype=torch.bfloat16, device="cpu")
    floats = linear_int.make_inputs(sizes | {"format": "float8_e4m3fn"}, dtype=torch.bfloat16, device="cpu")
    offset = ints[3] if ints[3] is not None else ints[2]
    for args, message in (
        ((ints[0].float(), *ints[1:]), "x must be bfloat16 of some columns, got torch.float32"),
        ((floats[0].bfloat16(), *floats[1:]), "x must be float8_e4m3fn of some columns, got torch.bfloat16"),
        ((*floats[:7], None, floats[8]), "float8 weights, and no others, have scales of x, and no offset"),
        ((*floats[:3], offset, *floats[4:]), "float8 weights, and no others, have scales of x, and no offset"),
        ((*ints[:7], floats[7], None), "got torch.uint8"),
        ((*floats[:8], torch.float16), "the result must be float32 or bfloat16, got torch.float16"),
        ((*floats[:8], torch.float32), "bias must be torch.float32, got torch.bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_int.run("cpp", *args)
    with pytest.raises(ValueError, match=r"x_scale has 1 columns, wanted blocks\(K,group\) = 5"):
        linear_int(*floats[:7], floats[7][:, :1].contiguous(), floats[8])


@pytest.mark.parametrize("columns", [7, 32])
def test_int8_panels_of_any_view(columns: int) -> None:
    matrix = torch.randint(-128, 127, (65, 33), dtype=torch.int8)
    views = (matrix[:64, :columns], matrix[1:34, 1 : 1 + columns], matrix.t()[1:33, :columns])
    for stored in (*views, matrix.flatten()[1 : 1 + 32 * columns].view(32, columns)):
        packed = pack_int_panels.run("huge_pages", stored, columns)
        assert torch.equal(packed, pack_int_panels.meaning(stored, columns))
