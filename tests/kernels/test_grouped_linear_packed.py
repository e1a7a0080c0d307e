"""Experts' packed linear layers, integers too: each expert's rows have the bits of that expert's own packed layer."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from laws import on_instruction_sets

from seamwise.kernels import (
    grouped_linear_int,
    grouped_linear_packed,
    linear_int,
    linear_packed,
    moe_align,
    pack_linear,
)
from seamwise.kernels.linear.linear_int import FORMATS

code = on_instruction_sets("avx2")


@settings(max_examples=25)
@given(
    st.integers(0, 60), st.sampled_from([1, 2, 5]), st.integers(1, 9), st.integers(1, 4), st.integers(1, 150),
    st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.sampled_from([1, 2, 3]), st.integers(0, 99),
)  # fmt: skip
@example(600, 2, 2, 2, 1100, torch.bfloat16, True, 2, 0)  # rows of an expert do not fit the cache at once
@example(7, 1, 4, 1, 33, torch.bfloat16, False, 2, 1)
def test_each_expert_is_its_own_layer(
    tokens: int, top_k: int, experts: int, panels: int, depth: int, dtype: torch.dtype, bias: bool, threads: int,
    seed: int,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    width = 32 * panels
    x = torch.full((tokens, depth + 3), torch.nan, dtype=dtype)[:, :depth]
    x.copy_(torch.randn(tokens, depth, generator=generator))
    weight = (torch.randn(experts, width, depth, generator=generator) * depth**-0.5).to(dtype)
    bias_EN = torch.randn(experts, width, generator=generator).to(dtype) if bias else None
    chosen = torch.randint(-1, experts, (tokens, top_k), generator=generator, dtype=torch.int32)
    order, starts = moe_align(chosen, experts)
    packed = pack_linear.run("cpp", weight.flatten(0, 1))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = grouped_linear_packed.run("cpp", x, packed, width, order, starts, top_k, bias_EN)
    finally:
        torch.set_num_threads(before)
    wanted = torch.zeros(tokens * top_k, width, dtype=dtype)
    for e in range(experts):
        slots = (chosen.flatten() == e).nonzero().flatten()
        own = pack_linear.run("cpp", weight[e])
        of_expert = None if bias_EN is None else bias_EN[e]
        wanted[slots] = linear_packed.run("cpp", x[slots // top_k].contiguous(), own, width, of_expert)
    assert torch.equal(out, wanted)


@settings(max_examples=25)
@given(
    st.integers(0, 30), st.sampled_from([1, 2]), st.integers(1, 5), st.integers(1, 3), st.sampled_from([7, 64, 150]),
    st.sampled_from([0, 2, 32]), st.booleans(), st.sampled_from(FORMATS), st.sampled_from([1, 2, 3]),
    st.sampled_from([torch.bfloat16, torch.float32]), st.integers(0, 99),
)  # fmt: skip
@example(400, 2, 2, 2, 1100, 32, True, "int4", 2, torch.bfloat16, 0)  # rows of an expert do not fit the cache at once
@example(400, 2, 2, 2, 1100, 32, True, "int8", 1, torch.bfloat16, 0)
@example(400, 2, 2, 2, 1100, 128, True, "float8_e4m3fn", 2, torch.float32, 0)
def test_each_experts_integers_are_its_own_layer(
    tokens: int, top_k: int, experts: int, panels: int, depth: int, group: int, offset: bool, format: str,
    threads: int, dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    dtype = dtype if format == "float8_e4m3fn" else torch.bfloat16
    sizes = {"R": tokens, "top_k": top_k, "E": experts, "P": panels, "K": depth, "group": group, "format": format}
    sizes |= {"offset": offset, "bias": True}
    args = grouped_linear_int.make_inputs(sizes, dtype=dtype, device="cpu", seed=seed)
    x, packed, scale, offsets, _, width, order, starts, _, bias, x_scale, _ = args
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = grouped_linear_int.run("cpp", *args)
    finally:
        torch.set_num_threads(before)
    wanted = torch.zeros(tokens * top_k, width, dtype=dtype)
    for e, (first, last) in enumerate(pairwise(starts.tolist())):
        slots = order[first:last].long()
        rows = None if x_scale is None else x_scale[slots // top_k]
        own = [None if t is None else t[e * panels : (e + 1) * panels] for t in (packed, scale, offsets)]
        wanted[slots] = linear_int.run("cpp", x[slots // top_k].contiguous(), *own, group, width, bias[e], rows, dtype)
    assert torch.equal(out, wanted)


def test_integers_that_it_does_not_take_are_named() -> None:
    sizes = {"R": 3, "top_k": 2, "E": 4, "P": 1, "K": 8, "bias": True}
    args = list(grouped_linear_int.make_inputs(sizes, dtype=torch.bfloat16, device="cpu"))
    with pytest.raises(ValueError, match=r"out_features must be a multiple of 32, for whole panels .*, got 24"):
        grouped_linear_int(*args[:5], 24, *args[6:9])
    with pytest.raises(ValueError, match=r"bias has 3 rows, starts are of 4 experts"):
        grouped_linear_int(*args[:9], args[9][:3])
    with pytest.raises(ValueError, match=r"there are 3 panels, wanted 4 for 4 experts of 32 rows"):
        grouped_linear_int(args[0], args[1][:3], args[2][:3], *args[3:9])
    with pytest.raises(ValueError, match=r"panels of torch.uint8 have 64, wanted 32"):
        grouped_linear_int(args[0], torch.cat((args[1], args[1]), 2), *args[2:9])
    with pytest.raises(ValueError, match="x must be bfloat16"):
        grouped_linear_int.run("cpp", args[0].float(), *args[1:])


def test_what_it_does_not_take_is_named() -> None:
    args = list(grouped_linear_packed.make_inputs(
        {"R": 3, "top_k": 2, "E": 4, "P": 1, "K": 8, "bias": True}, dtype=torch.float32, device="cpu"
    ))  # fmt: skip
    with pytest.raises(ValueError, match=r"out_features must be a multiple of 32, for whole panels .*, got 24"):
        grouped_linear_packed(*args[:2], 24, *args[3:6])
    with pytest.raises(ValueError, match=r"bias has 3 rows, starts are of 4 experts"):
        grouped_linear_packed(*args[:6], args[6][:3])
    with pytest.raises(ValueError, match=r"packed is \(4, 8, 32, 1\), wanted \(3, 8, 32, 1\) for 3 experts of 32 rows"):
        grouped_linear_packed(*args[:4], args[4][:4], args[5])
    with pytest.raises(ValueError, match="must all be float32 or all bfloat16"):
        grouped_linear_packed.run("cpp", args[0].bfloat16(), *args[1:])
