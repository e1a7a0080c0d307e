"""Expert parallelism: tokens' rows go to the ranks that own their experts, and what experts make of them comes back.

A row goes once to a rank, however many of its experts live there; each expert's row comes back by itself, so that the
token's own rank adds them up in the order in which one rank alone would: results are the same in bits, however many
ranks there are. Shapes are static: a rank has room for all rows of all ranks, and what is not there is zero.
Source: Lepikhin et al. 2020 (GShard), https://arxiv.org/abs/2006.16668, section 3.2; DeepEP's layouts,
https://github.com/deepseek-ai/DeepEP.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seamwise.kernels.contract import Contract, contract
from seamwise.kernels.draw import Draw
from seamwise.kernels.quant.quantize import quantize

from . import exchange
from .collectives import group_size


def limits_experts(num_experts: int, group_name: str) -> str | None:
    """Return why experts are not shared out, or None."""
    ranks = group_size(group_name)
    return f"{num_experts} experts do not divide among {ranks} ranks" if num_experts % ranks else None


def _room(x_TX: Tensor, group_name: str) -> Tensor:
    return x_TX.new_empty((x_TX.shape[0] * group_size(group_name), x_TX.shape[1]))


def _dispatched(x_TD: Tensor, experts_TK: Tensor, group_name: str) -> tuple[Tensor, Tensor]:
    return _room(x_TD, group_name), _room(experts_TK, group_name)


def _dispatched_quant(
    x_TD: Tensor, scale_TG: Tensor, experts_TK: Tensor, group_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    return _room(x_TD, group_name), _room(scale_TG, group_name), _room(experts_TK, group_name)


def _combined(y_SD: Tensor, experts_TK: Tensor) -> Tensor:
    return y_SD.new_empty((experts_TK.shape[0] * experts_TK.shape[1], y_SD.shape[1]))


_CHOSEN = {"experts_TK": "[T K] int32"}


@contract(args=_CHOSEN, limits=limits_experts, fake=_dispatched, reads_values=True)
def ep_dispatch(x_TD: Tensor, experts_TK: Tensor, num_experts: int, group_name: str) -> tuple[Tensor, Tensor]:
    """Return (rows (M, D), experts (M, K) int32), M = ranks · T: row r · T + t is rank r's token t.

    Rank r owns the experts from r · E / ranks on. A row that chose none of this rank's is zero; experts are counted
    from this rank's first, -1 for other ranks' and for a choice of -1. Every rank has the same T. Sends a row to each
    rank that owns one of its experts ("all_to_all"), or to all ("all_gather"), and K numbers a row to all. Raises
    ValueError where experts do not divide.
    """
    rows_MD, local_MK = exchange.begin_dispatch((x_TD,), experts_TK, num_experts, group_name, "all_gather")()
    return rows_MD, local_MK


@contract(args={**_CHOSEN, "scale_TG": "float32"}, limits=limits_experts, fake=_dispatched_quant, reads_values=True)
def ep_dispatch_quant(
    x_TD: Tensor, scale_TG: Tensor, experts_TK: Tensor, num_experts: int, group_name: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (rows (M, D), scales (M, G) float32, experts (M, K)) as `ep_dispatch`, of rows that `quantize` made.

    Row and scales travel as one: D bytes and 4·G, about half of what bfloat16 takes.
    """
    parts = (x_TD, scale_TG)
    rows_MD, scale_MG, local_MK = exchange.begin_dispatch(parts, experts_TK, num_experts, group_name, "all_gather")()
    return rows_MD, scale_MG, local_MK


@contract(
    args={**_CHOSEN, "y_SD": "M*K D", "local_MK": "int32"}, limits=limits_experts, fake=_combined, reads_values=True
)
def ep_combine(y_SD: Tensor, local_MK: Tensor, experts_TK: Tensor, num_experts: int, group_name: str) -> Tensor:
    """Return what its expert made of each token, slot t·K + k for the k-th: (T·K, D); zero where a choice is -1.

    y (M·K, D): slot by slot what this rank's experts made of what came in; only slots with an expert are read. local
    (M, K) are the experts that `ep_dispatch` gave, experts (T, K) those that it took. Sends a row a choice, to the
    token's rank ("all_to_all"); as a sum of zeros and one row, ranks · T · K rows ("all_gather").
    """
    (back_SD,) = exchange.begin_combine(y_SD, local_MK, experts_TK, num_experts, group_name, "all_gather")()
    return back_SD


_CHOICES = "Tensor experts, int num_experts, str group_name"


def _halves(record: Contract, arguments: str, results: str, begin: Any, fake: Any) -> None:
    """Define a contract's halves, and its providers: of the halves one after the other.

    On a GPU, what a CUDA graph holds stands first; on a CPU, what sends least.
    """
    exchange.define(record.name, arguments, results, begin, fake)
    for way, devices in (("all_gather", ("cuda",)), ("all_to_all", None)):

        def call(*given: Any, way: str = way) -> Any:
            made = begin(*given, way)()
            return made if len(made) > 1 else made[0]

        record.provider(way, devices=devices, strided=True)(call)


_halves(
    ep_dispatch, f"Tensor x, {_CHOICES}", "(Tensor, Tensor)",
    lambda x, *rest: exchange.begin_dispatch((x,), *rest), lambda x, e, n, group: _dispatched(x, e, group),
)  # fmt: skip
_halves(
    ep_dispatch_quant, f"Tensor x, Tensor scale, {_CHOICES}", "(Tensor, Tensor, Tensor)",
    lambda x, scale, *rest: exchange.begin_dispatch((x, scale), *rest),
    lambda x, s, e, n, group: _dispatched_quant(x, s, e, group),
)  # fmt: skip
_halves(
    ep_combine, f"Tensor y, Tensor local, {_CHOICES}", "Tensor", exchange.begin_combine,
    lambda y, local, e, n, group: _combined(y, e),
)  # fmt: skip


_SIZES: dict[str, Any] = {"T": (0, 9), "K": (1, 4), "E": [4, 16], "D": [8, 33]}
_EXAMPLES = ({"T": 1, "K": 1, "E": 1, "D": 8}, {"T": 7, "K": 2, "E": 8, "D": 33}, {"T": 0, "K": 2, "E": 4, "D": 8})
_SHAPES = {"deepseek-v3 decode": {"T": 64, "K": 8, "E": 256, "D": 7168}}


@ep_dispatch.inputs(examples=_EXAMPLES, shapes=_SHAPES, sizes=_SIZES)
def make_dispatch(draw: Draw, T: int, K: int, E: int, D: int) -> tuple[Any, ...]:
    """One rank's inputs: K different experts a token, every third token being padding."""
    return draw(T, D), _choices(draw, T, K, E), E, ""


def _choices(draw: Draw, T: int, K: int, E: int) -> Tensor:
    experts_TK = draw.uniform(T, E).argsort(-1)[:, :K].int()
    experts_TK[2::3] = -1
    return experts_TK


@ep_dispatch_quant.inputs(examples=_EXAMPLES, shapes=_SHAPES, sizes=_SIZES)
def make_dispatch_quant(draw: Draw, T: int, K: int, E: int, D: int) -> tuple[Any, ...]:
    x_TD, scale_TG = quantize.meaning(draw(T, D), torch.float8_e4m3fn, 16)
    return x_TD, scale_TG, _choices(draw, T, K, E), E, ""


@ep_combine.inputs(examples=_EXAMPLES, shapes=_SHAPES, sizes=_SIZES)
def make_combine(draw: Draw, T: int, K: int, E: int, D: int) -> tuple[Any, ...]:
    experts_TK = _choices(draw, T, K, E)
    return draw(T * K, D), experts_TK, experts_TK, E, ""
