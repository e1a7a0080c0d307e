"""LoRA: low-rank updates of a linear layer by adapters, of which every token has its own or none.

A program takes 16 neighbouring tokens and the adapters among them one after another: tokens of one request, or rows
sorted by expert, mostly share one, and each adapter's weights are then read once a tile. Nothing needs to be sorted,
and no row's sums depend on its neighbours.

Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685; batches of adapters: Chen et al. 2023 (Punica),
https://arxiv.org/abs/2310.18547, section 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seamwise.kernels.contract import Build, Cost, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton

_CHUNK = 512  # columns of x a program; fixed, so that the order of the sums is


_ADAPTER = {"adapter_T": "T or 0 int32|int64!"}


@contract(args={**_ADAPTER, "a_LRD": "[L R D]"})
def lora_shrink(x_TD: Tensor, a_LRD: Tensor, adapter_T: Tensor) -> Tensor:
    """Return x[t] · a[adapter[t]]ᵀ: (T, R) in x's dtype, sums in float32 or wider; zeros where the adapter is -1.

    Adapters of no rows say that no row has one: there is nothing to compute then, (0, R).
    x is (T, D), a (L, R, D) in x's dtype, adapter_T int32 or int64 (T,) below L, in any order. Experts with adapters of
    their own are the same op: L adapters of E experts as a (L·E, R, D), adapter · E + expert as index, -1 kept.
    Moves T·D + T·R elements and the adapters in use.
    """
    x_TD, wide = x_TD[: adapter_T.shape[0]], torch.promote_types(x_TD.dtype, torch.float32)
    a_TRD = a_LRD[adapter_T.clamp(min=0).long()].to(wide)
    s_TR = torch.bmm(a_TRD, x_TD.to(wide).unsqueeze(-1)).squeeze(-1)
    return s_TR.masked_fill((adapter_T < 0).unsqueeze(-1), 0).to(x_TD.dtype)


@contract(
    args={
        **_ADAPTER, "s_TS": "T len(widths)*R or 0 len(widths)*R", "b_LRN": "[L R N]", "scaling_LP": "[L P] float32",
    },
    limits=lambda b_LRN, scaling_LP, widths: limits_slices(b_LRN, scaling_LP, widths),
)  # fmt: skip
def lora_expand(
    y_TN: Tensor, s_TS: Tensor, b_LRN: Tensor, adapter_T: Tensor, scaling_LP: Tensor, widths: list[int]
) -> Tensor:
    """Return y[t] + scaling[l, p] · (s[t] b[l]), l = adapter[t]: (T, N) in y's dtype; y, in bits, where l is -1.

    Adapters of no rows say that no row has one: the result is y, by a provider y itself.
    The N columns are P slices of `widths`, layers that were joined: slice p reads columns pR to pR + R of s (T, PR).
    y is (T, N) and b (L, R, N) in y's dtype, scaling (L, P) float32, adapter_T and experts as for `lora_shrink`;
    float32 or wider until the one rounding. Moves 2·T·N + T·P·R elements and the adapters in use.
    """
    wide = torch.promote_types(y_TN.dtype, torch.float32)
    missing = y_TN.shape[0] - adapter_T.shape[0]
    adapter_T, s_TS = F.pad(adapter_T, (0, missing), value=-1), F.pad(s_TS, (0, 0, 0, missing))
    index_T = adapter_T.clamp(min=0).long()
    rank, parts, start = b_LRN.shape[1], [], 0
    for p, width in enumerate(widths):
        b_TRN = b_LRN[:, :, start : start + width][index_T].to(wide)
        s_T1R = s_TS[:, p * rank : (p + 1) * rank].to(wide).unsqueeze(1)
        parts.append(torch.bmm(s_T1R, b_TRN).squeeze(1) * scaling_LP[index_T, p].unsqueeze(-1))
        start += width
    changed_TN = (y_TN.to(wide) + torch.cat(parts, -1)).to(y_TN.dtype)
    return torch.where((adapter_T < 0).unsqueeze(-1), y_TN, changed_TN)


def limits_slices(b_LRN: Tensor, scaling_LP: Tensor, widths: list[int]) -> str | None:
    """Return why slices of columns do not fit the other arguments, or None."""
    if sum(widths) != b_LRN.shape[2]:
        return f"widths {list(widths)} are {sum(widths)} columns, b has {b_LRN.shape[2]}"
    if scaling_LP.shape[1] != len(widths):
        return f"scaling has {scaling_LP.shape[1]} columns, wanted one for each of {len(widths)} slices"
    return None


@lora_shrink.costs
def shrink_cost(x_TD: Tensor, a_LRD: Tensor) -> Cost:
    return _cost(x_TD, a_LRD.shape[1], a_LRD, x_TD.nbytes)


@lora_expand.costs
def expand_cost(y_TN: Tensor, s_TS: Tensor, b_LRN: Tensor) -> Cost:
    return _cost(y_TN, b_LRN.shape[1], b_LRN, 2 * y_TN.nbytes + s_TS.nbytes)


def _cost(wide_TD: Tensor, rank: int, weight: Tensor, moved: int) -> Cost:
    """Count one adapter at least, or none without tokens: which are in use is a matter of values."""
    adapters = min(wide_TD.shape[0], 1) * weight.shape[1] * weight.shape[2] * weight.element_size()
    narrow = wide_TD.shape[0] * rank * wide_TD.element_size()
    return Cost(bytes=moved + narrow + adapters, flops=2 * wide_TD.numel() * rank)


@lora_shrink.inputs(
    examples=(
        {"T": 1, "D": 16, "R": 8, "L": 1}, {"T": 3, "D": 33, "R": 4, "L": 2}, {"T": 0, "D": 8, "R": 8, "L": 1},
        {"T": 40, "D": 700, "R": 16, "L": 3},
    ),
    shapes={
        "llama-3-8b prefill": {"T": 4096, "D": 4096, "R": 16, "L": 4},
        "llama-3-70b decode": {"T": 64, "D": 8192, "R": 16, "L": 16},
    },
    sizes={"T": (0, 40), "D": (1, 600), "R": [4, 8, 16, 64], "L": (1, 5)},
    rows=(0, 2),
)  # fmt: skip
def make_shrink(draw: Draw, T: int, D: int, R: int, L: int) -> tuple[Any, ...]:
    x_TD = draw(T, D)
    a_LRD = (draw.normal(L, R, D) / D**0.5).to(draw.dtype)
    return x_TD, a_LRD, draw.integers(-1, L, T, dtype=torch.int32)


@lora_expand.inputs(examples=lora_shrink.examples, shapes=lora_shrink.shapes, sizes=lora_shrink.sizes, rows=(0, 1, 3))
def make_expand(draw: Draw, T: int, D: int, R: int, L: int) -> tuple[Any, ...]:
    """Columns are two slices of about a third and two thirds where there are three or more."""
    widths = [D // 3, D - D // 3] if D >= 3 else [D]
    y_TN, s_TS = (draw(T, n) for n in (D, len(widths) * R))
    b_LRN = (draw.normal(L, R, D) / R**0.5).to(draw.dtype)
    adapter_T = draw.integers(-1, L, T, dtype=torch.int32)
    return y_TN, s_TS, b_LRN, adapter_T, draw.uniform(L, len(widths)) + 0.5, widths


@triton.jit
def _next_adapter(adapters, last):
    """Return the least adapter of a tile above the last, or 2^31 - 1."""
    return tl.min(tl.where(adapters > last, adapters, 2147483647), 0)


@triton.jit
def _shrink_kernel(
    x_ptr, a_ptr, adapter_ptr, part_ptr, x_stride, T, D, R, TOKENS: tl.constexpr, RANK: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write x · aᵀ over one chunk of the columns, at part (chunk, T, R)."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    rank = tl.arange(0, RANK)  # [RANK]
    start = tl.program_id(1) * CHUNK
    adapters = tl.load(adapter_ptr + token, mask=token < T, other=-1).to(tl.int32)
    sums = tl.zeros([TOKENS, RANK], tl.float32)
    adapter = _next_adapter(adapters, -1)
    while adapter < 2147483647:
        mine = (adapters == adapter)[:, None]
        for offset in range(0, CHUNK, BLOCK):
            column = start + offset + tl.arange(0, BLOCK)  # [BLOCK]
            x_at = x_ptr + token[:, None].to(tl.int64) * x_stride + column[None, :]
            x = tl.load(x_at, mask=mine & (column < D)[None, :], other=0.0)
            a_at = a_ptr + (adapter.to(tl.int64) * R + rank[None, :]) * D + column[:, None]  # [BLOCK, RANK]
            a = tl.load(a_at, mask=(rank < R)[None, :] & (column < D)[:, None], other=0.0)
            sums = tl.dot(x, a, sums, input_precision="ieee")
        adapter = _next_adapter(adapters, adapter)
    row = (tl.program_id(1).to(tl.int64) * T + token)[:, None]
    tl.store(part_ptr + row * R + rank[None, :], sums, mask=(token < T)[:, None] & (rank < R)[None, :])


@triton.jit
def _sum_kernel(part_ptr, out_ptr, chunks, count, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(chunks):
        total += tl.load(part_ptr + index, mask=index < count, other=0.0)
        part_ptr += count
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=index < count)


@triton.jit
def _expand_kernel(
    y_ptr, s_ptr, b_ptr, adapter_ptr, scaling_ptr, out_ptr, y_stride, s_stride, T, N, R, slices, slice, first, width,
    TOKENS: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the columns first : first + width of one slice."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    column = first + within
    rank = tl.arange(0, RANK)  # [RANK]
    inside = (token < T)[:, None] & (within < width)[None, :]
    row = token[:, None].to(tl.int64)
    adapters = tl.load(adapter_ptr + token, mask=token < T, other=-1).to(tl.int32)
    y = tl.load(y_ptr + row * y_stride + column[None, :], mask=inside, other=0.0)
    total = y.to(tl.float32)
    adapter = _next_adapter(adapters, -1)
    while adapter < 2147483647:
        mine = (adapters == adapter)[:, None]
        s_at = s_ptr + row * s_stride + slice * R + rank[None, :]
        s = tl.load(s_at, mask=mine & (rank < R)[None, :], other=0.0)
        b_at = b_ptr + (adapter.to(tl.int64) * R + rank[:, None]) * N + column[None, :]  # [RANK, BLOCK]
        b = tl.load(b_at, mask=(rank < R)[:, None] & (within < width)[None, :], other=0.0)
        scaling = tl.load(scaling_ptr + adapter * slices + slice)
        total = tl.where(mine, total + tl.dot(s, b, input_precision="ieee") * scaling, total)
        adapter = _next_adapter(adapters, adapter)
    result = tl.where((adapters < 0)[:, None], y, total.to(y.dtype))
    tl.store(out_ptr + row * N + column[None, :], result, mask=inside)


def config(R: int, itemsize: int) -> dict[str, int]:
    """Launch configuration of both kernels: the largest tile of an adapter that spills on no architecture."""
    rank = max(triton.next_power_of_2(R), 16)
    block = min(max((8192 if itemsize == 2 else 4096) // rank, 16), 128)
    return {"TOKENS": 16, "RANK": rank, "BLOCK": block, "num_warps": 4}


def _builds(kernel: object, constants: dict[str, int], types: dict[str, str], dtype: str) -> Iterator[Build]:
    for rank in (16, 64, 256):
        chosen = config(rank, 2 if dtype == "bf16" else 4)
        yield Build(kernel, {**constants, **chosen}, {"adapter_ptr": "*i32", **types})


@lora_shrink.builds
def shrink_builds(dtype: str) -> Iterator[Build]:
    yield from _builds(_shrink_kernel, {"CHUNK": _CHUNK}, {"part_ptr": "*fp32"}, dtype)
    yield Build(_sum_kernel, {"BLOCK": 256, "num_warps": 4}, {"part_ptr": "*fp32"})


@lora_expand.builds
def expand_builds(dtype: str) -> Iterator[Build]:
    yield from _builds(_expand_kernel, {}, {"scaling_ptr": "*fp32"}, dtype)


def refuses_dtypes(*rows: Tensor) -> str | None:
    """Return why kernels do not take rows and adapters of these dtypes, or None."""
    if rows[0].dtype == torch.float64 or len({r.dtype for r in rows}) > 1:
        return f"rows and adapters must share a dtype of at most 32 bits, got {[r.dtype for r in rows]}"
    return None


@lora_shrink.provider("triton", devices=("cuda",), refuses=lambda x_TD, a_LRD: refuses_dtypes(x_TD, a_LRD), triton=True)
def lora_shrink_triton(x_TD: Tensor, a_LRD: Tensor, adapter_T: Tensor) -> Tensor:
    (tokens, width), rank = x_TD[: adapter_T.shape[0]].shape, a_LRD.shape[1]
    chunks = triton.cdiv(width, _CHUNK)
    out = torch.empty((tokens, rank), dtype=x_TD.dtype, device=x_TD.device)
    parts = torch.empty((chunks, tokens, rank), dtype=torch.float32, device=x_TD.device)
    if tokens:
        chosen = config(rank, x_TD.element_size())
        _shrink_kernel[(triton.cdiv(tokens, chosen["TOKENS"]), chunks)](
            x_TD, a_LRD, adapter_T, parts, x_TD.stride(0), tokens, width, rank, CHUNK=_CHUNK, **chosen
        )
        _sum_kernel[(triton.cdiv(out.numel(), 256),)](parts, out, chunks, out.numel(), BLOCK=256, num_warps=4)
    return out


@lora_expand.provider(
    "triton", devices=("cuda",), triton=True, refuses=lambda y_TN, s_TS, b_LRN: refuses_dtypes(y_TN, s_TS, b_LRN)
)
def lora_expand_triton(
    y_TN: Tensor, s_TS: Tensor, b_LRN: Tensor, adapter_T: Tensor, scaling_LP: Tensor, widths: list[int]
) -> Tensor:
    if not adapter_T.shape[0]:
        return y_TN
    (tokens, columns), rank, first = y_TN.shape, b_LRN.shape[1], 0
    out = torch.empty((tokens, columns), dtype=y_TN.dtype, device=y_TN.device)
    chosen = config(rank, y_TN.element_size())
    for p, width in enumerate(widths):
        _expand_kernel[(triton.cdiv(tokens, chosen["TOKENS"]), triton.cdiv(width, chosen["BLOCK"]))](
            y_TN, s_TS, b_LRN, adapter_T, scaling_LP, out, y_TN.stride(0), s_TS.stride(0), tokens, columns, rank,
            len(widths), p, first, width, **chosen,
        )  # fmt: skip
        first += width
    return out
