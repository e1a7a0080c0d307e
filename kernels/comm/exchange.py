"""Rows of tokens on their way to the ranks that own their experts, and back: what is begun, and ended later.

Two ways, the same in bits. "all_gather" (and "torch"): every rank gets all rows, and of the results a sum of one row
and zeros; shapes are static and no value is read, so a CUDA graph holds it. "all_to_all": only the rows that are wanted
travel; how many, each rank knows from all ranks' choices, which it gets first and waits for.
Between begin and end anything may be computed. A begun exchange is known by a ticket, an int64 on the CPU: a tape that
replays the beginning gives the end the ticket of that replay.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .collectives import all_gather_rows, group_rank, group_size

Finish = Callable[[], tuple[Tensor, ...]]
_OPS = torch.ops._c10d_functional
_LIBRARY = torch.library.Library("seamwise_exchange", "DEF")
_begun: dict[int, Finish] = {}
_numbers = itertools.count()


def local_experts(experts_MK: Tensor, num_experts: int, group_name: str) -> Tensor:
    """Return experts counted from this rank's first, -1 for those of other ranks and for none."""
    share = num_experts // group_size(group_name)
    local_MK = experts_MK - group_rank(group_name) * share
    return local_MK.where((local_MK >= 0) & (local_MK < share), -1)


def begin_dispatch(parts: Sequence[Tensor], experts_TK: Tensor, num_experts: int, group_name: str, way: str) -> Finish:
    """Begin to send each token's row of all `parts`, and its choices; see `ep_dispatch`."""
    ranks, (tokens, _) = group_size(group_name), experts_TK.shape
    rows_TB = torch.cat([_bytes(part) for part in parts], 1)
    if way != "all_to_all":
        sent = _gather(rows_TB, group_name)
        local_MK = local_experts(all_gather_rows(experts_TK, group_name), num_experts, group_name)

        def finish() -> tuple[Tensor, ...]:
            rows_MB = sent().masked_fill((local_MK < 0).all(1, keepdim=True), 0)
            return *_parts(rows_MB, parts), local_MK
    else:
        local_MK = local_experts(all_gather_rows(experts_TK, group_name), num_experts, group_name)
        owner_TK = _owners(experts_TK, num_experts, ranks)
        wanted_RT = (owner_TK == torch.arange(ranks, device=owner_TK.device).view(-1, 1, 1)).any(-1)
        coming_M = (local_MK >= 0).any(1)
        sent = _send(
            rows_TB[wanted_RT.nonzero()[:, 1]], coming_M.view(ranks, tokens).sum(1), wanted_RT.sum(1), group_name
        )

        def finish() -> tuple[Tensor, ...]:
            rows_MB = rows_TB.new_zeros(ranks * tokens, rows_TB.shape[1])
            rows_MB[coming_M] = sent()
            return *_parts(rows_MB, parts), local_MK

    return finish


def begin_combine(
    y_SD: Tensor, local_MK: Tensor, experts_TK: Tensor, num_experts: int, group_name: str, way: str
) -> Finish:
    """Begin to send what this rank's experts made back to the tokens' ranks; see `ep_combine`."""
    ranks, own_S = group_size(group_name), local_MK.flatten() >= 0
    if way != "all_to_all":
        given_SD = y_SD.masked_fill(~own_S.unsqueeze(1), 0)
        if not group_name:
            return lambda: (given_SD,)
        summed = _OPS.reduce_scatter_tensor(given_SD, "sum", ranks, group_name)
        return lambda: (_OPS.wait_tensor(summed),)
    owner_S = _owners(experts_TK, num_experts, ranks).flatten()
    order_S = owner_S.sort(stable=True).indices[(owner_S < 0).sum() :]
    counts_R = torch.bincount(owner_S[order_S], minlength=ranks)
    sent = _send(_bytes(y_SD[own_S]), counts_R, own_S.view(ranks, -1).sum(1), group_name)

    def finish() -> tuple[Tensor, ...]:
        out_SD = y_SD.new_zeros(owner_S.shape[0], y_SD.shape[1])
        out_SD[order_S] = sent().view(y_SD.dtype)
        return (out_SD,)

    return finish


def _owners(experts_TK: Tensor, num_experts: int, ranks: int) -> Tensor:
    """Return the rank of each expert, -1 for none."""
    known_TK = (experts_TK >= 0) & (experts_TK < num_experts)
    return torch.where(known_TK, experts_TK // (num_experts // ranks), -1)


def _bytes(x: Tensor) -> Tensor:
    """Return rows as bytes: gloo knows no float8. (A dimension of size 0 or 1 may have any stride, and no view.)"""
    return x.contiguous().as_strided(x.shape, (x.shape[1], 1)).view(torch.uint8)


def _parts(rows_MB: Tensor, parts: Sequence[Tensor]) -> list[Tensor]:
    found = rows_MB.split([part.shape[1] * part.element_size() for part in parts], 1)
    return [
        rows.clone(memory_format=torch.contiguous_format).view(p.dtype) for rows, p in zip(found, parts, strict=True)
    ]


def _gather(rows_TB: Tensor, group_name: str) -> Callable[[], Tensor]:
    if not group_name:
        return rows_TB.clone
    begun = _OPS.all_gather_into_tensor(rows_TB, group_size(group_name), group_name)
    return lambda: _OPS.wait_tensor(begun)


def _send(rows_XB: Tensor, coming_R: Tensor, going_R: Tensor, group_name: str) -> Callable[[], Tensor]:
    """Begin to send rows, those for rank 0 first: going[r] to rank r; coming[r] come from it."""
    if not group_name:
        return lambda: rows_XB
    begun = _OPS.all_to_all_single(rows_XB, coming_R.tolist(), going_R.tolist(), group_name)
    return lambda: _OPS.wait_tensor(begun)


def _ticket(finish: Finish) -> Tensor:
    number = next(_numbers)
    _begun[number] = finish
    return torch.tensor([number])


def _end(ticket_1: Tensor) -> tuple[Tensor, ...]:
    return _begun.pop(int(ticket_1))()


def forget() -> None:
    """Drop what was begun and will not be ended, as a step's that failed."""
    _begun.clear()


def define(name: str, arguments: str, results: str, begin: Callable[..., Finish], fake: Callable[..., object]) -> None:
    """Define the ops `name`_begin(arguments, way) and `name`_end(ticket, arguments) of a contract's two halves.

    The end takes the arguments for its results' shapes; they are not read again.
    """
    _LIBRARY.define(f"{name}_begin({arguments}, str way) -> Tensor")
    _LIBRARY.define(f"{name}_end(Tensor ticket, {arguments}) -> {results}")

    def end(ticket_1: Tensor, *given: object) -> object:
        made = _end(ticket_1)
        return made if len(made) > 1 else made[0]

    for half, call in (("begin", lambda *given: _ticket(begin(*given))), ("end", end)):
        _LIBRARY.impl(f"{name}_{half}", call, "CompositeExplicitAutograd")
    no_ticket = lambda *given: torch.empty(1, dtype=torch.int64, device="cpu")  # noqa: E731
    torch.library.register_fake(f"seamwise_exchange::{name}_begin", no_ticket, lib=_LIBRARY)
    torch.library.register_fake(f"seamwise_exchange::{name}_end", lambda _, *given: fake(*given), lib=_LIBRARY)
