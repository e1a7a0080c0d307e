"""Stage 3 of `seamwise bench gpu`: every contract at real shapes, and the winners among providers by rows.

The winners are written beside the results, as tuned-DEVICE.json; kernels/tuned/DEVICE.json is where they take effect.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import seamwise.kernels  # noqa: F401  (registers every contract)
from seamwise.bench.kernels import measure, measure_torch, provider_times
from seamwise.bench.peers import Call, peer
from seamwise.kernels import tuned
from seamwise.kernels.contract import CONTRACTS, Contract

from .goals import NotMeasured, Rows, need
from .rows import Context, Row

# What a goal reads: taken in the first round, beside every "prefill" shape, which are those of 64 MB or more.
FIRST = ("attention", "attention_quant", "mla_decode", "scaled_linear", "grouped_scaled_linear", "grouped_linear")
LADDER = (1, 8, 16, 32, 64, 128, 256, 1024, 4096)
# Linear layers (N, K) of Llama-3-8B: qkv, o, up, down; of DeepSeek-V3 with all heads: q and kv down, q up, o, shared.
LLAMA = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
DEEPSEEK = ((2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048))
_BLOCKS = {"x_group": 128, "rows": 128, "columns": 128}
TUNED: dict[str, list[dict[str, Any]]] = {
    "scaled_linear": [
        *({"N": n, "K": k, "rows": 1} for n, k in LLAMA), *({"N": n, "K": k, **_BLOCKS} for n, k in DEEPSEEK),
    ],
    "w4a16_linear": [{"N": n, "K": k, "group": 128} for n, k in LLAMA],
    "mxfp4_linear": [{"N": 5760, "K": 2880}, {"N": 2880, "K": 2880}],
    "grouped_linear": [
        {"top_k": 8, "E": 128, "N": 1536, "K": 2048}, {"top_k": 1, "E": 128, "N": 2048, "K": 768},
    ],
    "grouped_scaled_linear": [{"top_k": 2, "E": 8, "N": 28672, "K": 4096, "rows": 1}],
}  # fmt: skip


def rows(context: Context) -> Iterator[Row]:
    """Yield every contract's shapes, first those that a goal reads, then winners, then ratios to torch."""
    for name, contract in sorted(CONTRACTS.items()):
        for label, sizes in shapes_of(contract, context.tiny).items():
            key, extra = f"kernels/{name}/{label}", name not in FIRST and "prefill" not in label
            yield from context.take(key, 6, partial(measure_predicted, context, contract, sizes), extra=extra)
    for name, contract in sorted(CONTRACTS.items()):
        if contract._key is None:
            continue
        for sizes in [_without_rows(contract)] if context.tiny else TUNED[name]:
            key = f"kernels/tuned/{name}/{' '.join(f'{k}={v}' for k, v in sizes.items())}"
            ladder = LADDER[:2] if context.tiny else LADDER
            find = partial(measure_winners, contract, sizes, ladder, context.device)
            yield from context.take(key, 20, find, extra=True)
    write_winners(context)
    for name, contract in sorted(CONTRACTS.items()):
        for label, sizes in shapes_of(contract, context.tiny).items():
            compare = partial(measure_torch, contract, sizes, device=context.device, compiled=not context.tiny)
            yield from context.take(f"kernels/{name}/{label}/torch", 15, compare, extra=True)


def measure_predicted(context: Context, contract: Contract, sizes: Mapping[str, Any]) -> Row:
    """Measure a kernel; `predicted_us` is what was to be expected of it, and the row's place in a first table."""
    row = measure(contract, sizes, device=context.device)
    return {"predicted_us": predict_us(context.results.rows, row)} | row


def predict_us(rows: Rows, row: Row) -> float | None:
    """Return the time of a perfect kernel by what this run's device was seen to do, or None where that is not known.

    One launch, and then the longer of a copy of as many bytes and as many flops in a matrix product: of float8 where
    numbers of 8 bits are multiplied (Hopper multiplies int8 as fast), else of bfloat16.
    """
    try:
        launch, copy = need(rows, "environment/launch"), need(rows, "environment/copy")
        product = need(rows, f"environment/{'fp8' if 'scaled_linear' in row['contract'] else 'bf16'}")
    except NotMeasured:
        return None
    moved_us, product_us = row["bytes"] / copy["gb_per_s"] / 1e3, row["flops"] / product["tflop_per_s"] / 1e6
    return float(launch["us"] + max(moved_us, product_us))


def shapes_of(contract: Contract, tiny: bool) -> Mapping[str, Mapping[str, Any]]:
    """Return a contract's named shapes, or its first example alone."""
    return {"tiny": contract.examples[0]} if tiny else contract.shapes


def rows_name(contract: Contract) -> str:
    """Return the size that counts the rows of a linear layer: R where each has several slots."""
    return "R" if "R" in contract.examples[0] else "T"


def _without_rows(contract: Contract) -> dict[str, Any]:
    return {k: v for k, v in contract.examples[0].items() if k != rows_name(contract)}


def measure_winners(contract: Contract, sizes: Mapping[str, Any], ladder: Sequence[int], device: str) -> Row:
    """Time every accepting provider at each number of rows; `winners` are the lines of a table of kernels/tuned.py.

    A winner at T rows serves from the step below it up to T; the last one also what lies above.
    """
    assert contract._key is not None
    winners, times_us = [], {}
    for rows in ladder:
        args = contract.make_inputs({**sizes, rows_name(contract): rows}, dtype=torch.bfloat16, device=device)
        times = {n: t[0] for n, t in provider_times(contract, args, device).items()}
        _, *shape = contract._key(*args)
        winners.append([rows, *shape, min(times, key=times.__getitem__)])
        times_us[rows] = times
    winners[-1][0] = 1 << 30
    return {"contract": contract.name, "winners": winners, "times_us": times_us}


def write_winners(context: Context) -> None:
    """Write the table of all winners measured so far, beside the results."""
    table: dict[str, list[list[Any]]] = {}
    for row in context.results.rows.values():
        if row["status"] == "ok" and "winners" in row:
            table.setdefault(row["contract"], []).extend(row["winners"])
    if table:
        path = context.results.path.with_name(f"tuned-{tuned.device_name(context.device)}.json")
        path.write_text(json.dumps(table, indent=1) + "\n")


@peer("grouped_linear", "torch._grouped_mm (rows in order)")
def _grouped_mm(
    x_RK: Tensor, weight_ENK: Tensor, order_S: Tensor, starts_E: Tensor, top_k: int, bias_EN: Tensor | None = None
) -> Call:
    """torch's grouped GEMM over rows that were gathered before: less work than ours."""
    if not x_RK.is_cuda or torch.cuda.get_device_capability() < (9, 0) or x_RK.dtype != torch.bfloat16:
        return None
    x_SK, ends = x_RK[(order_S // top_k).long()], starts_E[1:].contiguous()
    return lambda: torch._grouped_mm(x_SK, weight_ENK.transpose(1, 2), offs=ends)


@peer("grouped_scaled_linear", "torch._scaled_grouped_mm (rows in order, scales by row)")
def _scaled_grouped_mm(
    x_RK: Tensor, x_scale_RG: Tensor, weight_ENK: Tensor, w_scale: Tensor, order_S: Tensor, starts_E: Tensor,
    top_k: int, dtype: torch.dtype, bias_EN: Tensor | None = None,
) -> Call:  # fmt: skip
    """torch's grouped float8 GEMM, which has no block scales: one scale a row and a channel, so less work than ours."""
    float8 = x_RK.dtype == torch.float8_e4m3fn and dtype == torch.bfloat16
    if not x_RK.is_cuda or torch.cuda.get_device_capability() != (9, 0) or not float8:
        return None
    x_SK, ends = x_RK.view(torch.uint8)[(order_S // top_k).long()].view(x_RK.dtype), starts_E[1:].contiguous()
    x_scale_S = torch.ones(x_SK.shape[0], device=x_RK.device)
    w_scale_EN = torch.ones(weight_ENK.shape[:2], device=x_RK.device)
    return lambda: torch._scaled_grouped_mm(
        x_SK, weight_ENK.transpose(1, 2), x_scale_S, w_scale_EN, offs=ends, out_dtype=dtype, use_fast_accum=True
    )
