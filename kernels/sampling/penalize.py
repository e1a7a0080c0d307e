"""What sequences ask of their logits before sampling: allowed tokens, biases and penalties of tokens seen before.

A row's edits are a short list of its own, so that the logits are read once and written once.
Source: repetition: Keskar et al. 2019, https://arxiv.org/abs/1909.05858, section 4.1; presence and frequency:
https://platform.openai.com/docs/api-reference/completions; their order is vLLM's,
https://docs.vllm.ai/en/latest/api/vllm/v1/sample/sampler; the bitmask is xgrammar's,
https://xgrammar.mlc.ai/docs/api/python/bitmask_ops.html.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton


def _limits(logits_RV: Tensor, allowed_RW: Tensor | None) -> str | None:
    if allowed_RW is None or allowed_RW.shape[1] * 32 >= logits_RV.shape[1]:
        return None
    vocab, words = logits_RV.shape[1], allowed_RW.shape[1]
    return f"the mask has {words} words of 32 bits a row, logits have {vocab} columns; wanted {-(-vocab // 32)} words"


_EDITS = {"edited_N": "int64", "counts_N": "int64", "biases_N": "float32", "starts_R1": "R+1 int64"}


@contract(
    args={**_EDITS, "penalties_R3": "[R 3] float32", "allowed_RW": "[R W] int32!"}, limits=_limits,
    flops=lambda edited_N: 6 * edited_N.numel(),
)  # fmt: skip
def penalize(
    logits_RV: Tensor, edited_N: Tensor, counts_N: Tensor, biases_N: Tensor, starts_R1: Tensor, penalties_R3: Tensor,
    allowed_RW: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return edited logits, (R, V) float32 or wider.

    edited_N      (N,) int64 token ids; row r edits those of starts[r] : starts[r + 1], each of them once
    counts_N      (N,) int64: -1 when the sequence does not have the token, else how often its output has it
    biases_N      (N,) float32, added first; -inf forbids the token
    starts_R1     (R + 1,) int64, from 0 to N
    penalties_R3  (R, 3) float32: repetition divides what is positive and multiplies what is negative of the tokens
                  that the sequence has; then frequency times the count, and presence where the output has the token,
                  are subtracted
    allowed_RW    (R, ⌈V/32⌉) int32 or None: bit t % 32 of word t // 32 says whether token t may be chosen
    Moves R·V elements, writes R·V float32. Raises ValueError when the mask is too narrow.
    """
    vocab = logits_RV.shape[1]
    out_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32), copy=True)
    row_N = torch.repeat_interleave(starts_R1.diff(), output_size=len(edited_N))
    value_N = out_RV[row_N, edited_N] + biases_N
    repetition_N, frequency_N, presence_N = (column_R[row_N] for column_R in penalties_R3.unbind(-1))
    known_N = torch.where(value_N > 0, value_N / repetition_N, value_N * repetition_N)
    value_N = torch.where(counts_N >= 0, known_N, value_N)
    output_N = counts_N.clamp(min=0).to(out_RV.dtype)
    value_N = value_N - (frequency_N * output_N + presence_N * output_N.clamp(max=1))
    out_RV[row_N, edited_N] = value_N.to(out_RV.dtype)
    if allowed_RW is not None:
        bit_32 = torch.arange(32, dtype=torch.int32, device=allowed_RW.device)
        bits_RV = ((allowed_RW.unsqueeze(-1) >> bit_32) & 1).flatten(1)[:, :vocab]
        out_RV.masked_fill_(bits_RV == 0, float("-inf"))
    return out_RV


@penalize.inputs(
    examples=(
        {"R": 1, "V": 8, "N": 3}, {"R": 3, "V": 33, "N": 20, "masked": True}, {"R": 0, "V": 16, "N": 0},
        {"R": 4, "V": 5000, "N": 0}, {"R": 2, "V": 4100, "N": 2500, "masked": True},
    ),
    shapes={
        "llama-3-8b decode": {"R": 64, "V": 128256, "N": 500},
        "qwen3-30b-a3b decode": {"R": 256, "V": 151936, "N": 500, "masked": True},
    },
    sizes={"R": (0, 5), "V": (1, 600), "N": (0, 40), "masked": [False, True]},
)  # fmt: skip
def make(draw: Draw, R: int, V: int, N: int, masked: bool = False) -> tuple[Any, ...]:
    """`N` is the greatest number of a row's edits; the last of several rows has none. One bias of each row forbids."""
    logits_RV = 3 * draw.normal(R, V)
    lengths_R = draw.integers(0, min(N, V) + 1, R)
    lengths_R[1:][-1:] = 0
    edits = [draw.permutation(V)[:n] for n in lengths_R.tolist()]
    edited_N = torch.cat([draw.permutation(0), *edits])
    counts_N = draw.integers(-1, 4, len(edited_N))
    biases_N = draw.normal(len(edited_N))
    starts_R1 = torch.nn.functional.pad(lengths_R.cumsum(0), (1, 0))
    biases_N[starts_R1[:-1][lengths_R > 0]] = float("-inf")
    penalties_R3 = draw.uniform(R, 3) + torch.tensor([0.5, -0.5, -0.5], device=draw.device)
    words = draw.integers(-(2**31), 2**31, R, -(-V // 32)).int() if masked else None
    return logits_RV.to(draw.dtype), edited_N, counts_N, biases_N, starts_R1, penalties_R3, words


@triton.jit
def _allowed(allowed_ptr, row, words, token, inside, MASKED: tl.constexpr):
    """Return whether the mask lets a row choose each token."""
    if MASKED:
        word = tl.load(allowed_ptr + row * words + token // 32, mask=inside, other=0)
        return ((word >> (token % 32)) & 1) != 0
    return inside


@triton.jit
def _mask_kernel(logits_ptr, allowed_ptr, out_ptr, row_stride, V, words, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = token < V
    logit = tl.load(logits_ptr + row * row_stride + token, mask=inside, other=0.0).to(tl.float32)
    logit = tl.where(_allowed(allowed_ptr, row, words, token, inside, MASKED), logit, float("-inf"))
    tl.store(out_ptr + row * V + token, logit, mask=inside)


@triton.jit
def _edit_kernel(
    logits_ptr, edited_ptr, counts_ptr, biases_ptr, starts_ptr, penalties_ptr, allowed_ptr, out_ptr, row_stride, V,
    words, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    repetition = tl.load(penalties_ptr + row * 3)
    frequency = tl.load(penalties_ptr + row * 3 + 1)
    presence = tl.load(penalties_ptr + row * 3 + 2)
    first, end = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
    for start in range(first, end, BLOCK):
        edit = start + tl.arange(0, BLOCK)  # [BLOCK]
        token = tl.load(edited_ptr + edit, mask=edit < end, other=-1)
        inside = (token >= 0) & (token < V)
        count = tl.load(counts_ptr + edit, mask=inside, other=0)
        logit = tl.load(logits_ptr + row * row_stride + token, mask=inside, other=0.0).to(tl.float32)
        logit += tl.load(biases_ptr + edit, mask=inside, other=0.0)
        known = tl.where(logit > 0, tl.math.div_rn(logit, tl.zeros_like(logit) + repetition), logit * repetition)
        logit = tl.where(count >= 0, known, logit)
        output = tl.maximum(count, 0)
        logit -= frequency * output.to(tl.float32) + presence * tl.minimum(output, 1).to(tl.float32)
        logit = tl.where(_allowed(allowed_ptr, row, words, token, inside, MASKED), logit, float("-inf"))
        tl.store(out_ptr + row * V + token, logit, mask=inside)


def config(V: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: 1024 columns a program, 16-byte loads with 4 warps of bfloat16."""
    return {"BLOCK": min(triton.next_power_of_2(V), 1024), "num_warps": 4}


_TYPES = {"allowed_ptr": "*i32", "out_ptr": "*fp32", "biases_ptr": "*fp32", "penalties_ptr": "*fp32"}
_TYPES |= dict.fromkeys(("edited_ptr", "counts_ptr", "starts_ptr"), "*i64")
penalize.builds(
    Build(kernel, {"MASKED": masked, **config(151936)}, _TYPES)
    for masked in (False, True) for kernel in (_mask_kernel, _edit_kernel)
)  # fmt: skip


@penalize.provider("triton", devices=("cuda",), triton=True)
def penalize_triton(
    logits_RV: Tensor, edited_N: Tensor, counts_N: Tensor, biases_N: Tensor, starts_R1: Tensor, penalties_R3: Tensor,
    allowed_RW: Tensor | None,
) -> Tensor:  # fmt: skip
    """Write all logits, then the edited ones once more, read from the argument again."""
    rows, vocab = logits_RV.shape
    out_RV = torch.empty(rows, vocab, dtype=torch.float32, device=logits_RV.device)
    if rows:
        chosen = {"MASKED": allowed_RW is not None, **config(vocab)}
        words = 0 if allowed_RW is None else allowed_RW.shape[1]
        _mask_kernel[(rows, triton.cdiv(vocab, chosen["BLOCK"]))](
            logits_RV, allowed_RW, out_RV, logits_RV.stride(0), vocab, words, **chosen
        )
        _edit_kernel[(rows,)](
            logits_RV, edited_N, counts_N, biases_N, starts_R1, penalties_R3, allowed_RW, out_RV, logits_RV.stride(0),
            vocab, words, **chosen,
        )  # fmt: skip
    return out_RV
