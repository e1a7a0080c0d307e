"""Draw a token from each row's softmax: the argmax of the logits with Gumbel noise.

Source: the Gumbel-max trick, Maddison et al. 2014, https://arxiv.org/abs/1411.0030.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Build, contract
from seamwise.kernels.cpu.tokenwise_cpu import argmax_rows
from seamwise.kernels.draw import Draw
from seamwise.kernels.lazy_triton import tl, triton

from .sampling_noise import draw_key, draw_keys, gumbel, gumbel_noise

_OPTIONS = {"temperature_R": "float32", "seeds_R": "int64", "positions_R": "int64"}


@contract(args=_OPTIONS, flops=lambda logits_RV: 40 * logits_RV.numel())
def gumbel_sample(logits_RV: Tensor, temperature_R: Tensor, seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    """Return token ids (R,) int64: argmax(logits / temperature + noise), at temperature 0 argmax(logits).

    The lowest id wins among equals. The noise is a function of (seed, position, token id) alone, both int64 (R,), so a
    row's token does not depend on its batch; temperature is float32 (R,), finite and not negative.
    Moves R·V elements and takes about 40·R·V flops.
    """
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    hot_R1 = temperature_R.unsqueeze(-1)
    noise_RV = gumbel_noise(draw_keys(seeds_R, positions_R), logits_RV.shape[1])
    return torch.where(hot_R1 > 0, wide_RV / hot_R1 + noise_RV, wide_RV).argmax(-1)


@gumbel_sample.inputs(
    examples=({"R": 1, "V": 8}, {"R": 3, "V": 33}, {"R": 0, "V": 16}, {"R": 4, "V": 4500}),
    shapes={"llama-3-8b decode": {"R": 64, "V": 128256}, "qwen3-30b-a3b decode": {"R": 256, "V": 151936}},
    sizes={"R": (0, 6), "V": (1, 600)},
    rows=(0, 1, 2, 3),
)
def make(draw: Draw, R: int, V: int) -> tuple[Any, ...]:
    """Every other row is greedy."""
    logits_RV = 3 * draw(R, V)
    temperature_R = draw.uniform(R) * (torch.arange(R, device=draw.device) % 2 == 0)
    seeds_R = draw.integers(-(2**63), 2**63 - 1, R)
    return logits_RV, temperature_R, seeds_R, torch.arange(R, device=draw.device)


@gumbel_sample.provider("cpp", devices=("cpu",), strided=True)
def gumbel_sample_cpp(logits_RV: Tensor, temperature_R: Tensor, seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    """Make noise for drawn rows only."""
    drawn = (temperature_R > 0).nonzero().squeeze(-1)
    if len(drawn) < len(logits_RV):
        tokens_R = argmax_rows(logits_RV)
        if len(drawn):
            options = (t[drawn] for t in (temperature_R, seeds_R, positions_R))
            tokens_R[drawn] = gumbel_sample_cpp(logits_RV[drawn], *options)
        return tokens_R
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    noise_RV = gumbel_noise(draw_keys(seeds_R, positions_R), logits_RV.shape[1]).to(wide_RV.dtype)
    return argmax_rows(torch.addcdiv(noise_RV, wide_RV, temperature_R.unsqueeze(-1).to(wide_RV.dtype), out=noise_RV))


@triton.jit
def _score_kernel(
    logits_ptr, temperature_ptr, seeds_ptr, positions_ptr, scores_ptr, tokens_ptr, row_stride, V, splits,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the best score of one row's block of columns, and its token."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = split * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    score = tl.load(logits_ptr + row * row_stride + token, mask=token < V, other=float("-inf")).to(tl.float32)
    temperature = tl.load(temperature_ptr + row)
    if temperature > 0:
        key = draw_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
        score = tl.math.div_rn(score, tl.zeros_like(score) + temperature) + gumbel(key, token)
    best, index = tl.max(score, 0, return_indices=True)
    tl.store(scores_ptr + row * splits + split, best)
    tl.store(tokens_ptr + row * splits + split, split * BLOCK + index)


@triton.jit
def _best_kernel(scores_ptr, tokens_ptr, out_ptr, splits, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)  # [SPLITS]
    score = tl.load(scores_ptr + row * splits + split, mask=split < splits, other=float("-inf"))
    tl.store(out_ptr + row, tl.load(tokens_ptr + row * splits + tl.argmax(score, 0)).to(tl.int64))


def config(V: int) -> dict[str, int]:
    """Launch configuration. Unmeasured: 4096 columns a program, so that one row of 152k alone fills 38 of them."""
    return {"BLOCK": min(triton.next_power_of_2(V), 4096), "num_warps": 8 if V > 1024 else 1}


_TYPES = {
    "temperature_ptr": "*fp32", "scores_ptr": "*fp32", "tokens_ptr": "*i32", "out_ptr": "*i64", "seeds_ptr": "*i64",
    "positions_ptr": "*i64",
}  # fmt: skip
gumbel_sample.builds(
    [Build(_score_kernel, config(151936), _TYPES), Build(_best_kernel, {"SPLITS": 64, "num_warps": 1}, _TYPES)]
)


@gumbel_sample.provider("triton", devices=("cuda",), triton=True)
def gumbel_sample_triton(logits_RV: Tensor, temperature_R: Tensor, seeds_R: Tensor, positions_R: Tensor) -> Tensor:
    rows, vocab = logits_RV.shape
    chosen, device = config(vocab), logits_RV.device
    splits = triton.cdiv(vocab, chosen["BLOCK"])
    out_R = torch.empty(rows, dtype=torch.int64, device=device)
    if rows:
        scores = torch.empty(rows, splits, dtype=torch.float32, device=device)
        tokens = torch.empty(rows, splits, dtype=torch.int32, device=device)
        _score_kernel[(rows, splits)](
            logits_RV, temperature_R, seeds_R, positions_R, scores, tokens, logits_RV.stride(0), vocab, splits,
            **chosen,
        )  # fmt: skip
        _best_kernel[(rows,)](scores, tokens, out_R, splits, triton.next_power_of_2(splits), num_warps=1)
    return out_R
