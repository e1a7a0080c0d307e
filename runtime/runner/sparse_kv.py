"""Sparse attention by a function of one's own: it picks, for each layer and step, the pages that attention reads.

page     0 1 2 3 4 5 6 7       of a request: its blocks, in order
picked   0 . . 3 . . 6 7       those that hold the step's own tokens are always among them (here 7)
attends  to the tokens of 0, 3, 6 and 7, as if the request had no others

Attention is a seam, called between what is compiled or recorded, so the function acts there and nothing is built again.
Keys hold their positions already (RoPE); what reads distances from the cache's order (windows, ALiBi) is refused.
Source: choosing pages by query and keys is Quest's, Tang et al. 2024, https://arxiv.org/abs/2406.10774.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seamwise.compile.codegen import calls_of
from seamwise.compile.program import Program
from seamwise.runtime.build.runner_config import RunnerConfig

_READERS = ("attention", "attention_quant")  # contracts that begin with q, k_cache, v_cache and the batch


@dataclass(frozen=True, slots=True, kw_only=True)
class KVView:
    """What one layer's attention is about to read in a step; the step's own keys and values are in the caches.

    layer          its index, from 0
    query_THD      queries, rotated, of all requests; rows of padding may follow
    k_cache, v_cache  (N, K, P, D): N blocks of P tokens, of K heads
    block_table    (R, B) int32: the block that each page of each request lies in
    seq_lens       (R,) int32: tokens of each request, the step's among them
    query_starts   (R + 1,) int32: request r owns rows query_starts[r] : query_starts[r + 1]
    """

    layer: int
    query_THD: Tensor
    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_starts: Tensor

    @property
    def block_size(self) -> int:
        return self.k_cache.shape[2]

    @property
    def num_pages(self) -> Tensor:
        """(R,): pages that each request has."""
        return (self.seq_lens + self.block_size - 1) // self.block_size

    @property
    def first_own(self) -> Tensor:
        """(R,): the page of each request's first token of this step; it and those behind it must be picked."""
        new = self.query_starts[1:] - self.query_starts[:-1]
        own = (self.seq_lens - new).clamp(min=0) // self.block_size
        return torch.where(new > 0, own, self.num_pages)


# Returns (R, K) int32 or int64: the pages that each request attends to, rising, -1 behind them; None: all.
Pick = Callable[[KVView], Tensor | None]


def check_sparse_kv(program: Program, options: RunnerConfig) -> None:
    """Raise ValueError, naming what, for a model or options that picked pages do not work with."""
    if options.num_ranks > 1:
        raise ValueError(f"sparse_kv on {options.num_ranks} ranks: a function is one process's; leave one out")
    if "full" in options.recorded_modes:
        raise ValueError(
            f"sparse_kv with cudagraph_mode={options.cudagraph_mode!r}: decode steps are recorded with attention in"
            " them; use 'piecewise' or 'none'"
        )
    calls = calls_of(program.source, _READERS)
    if not calls:
        raise ValueError("sparse_kv: this model attends to latents (MLA), which have no keys to pick by; leave it out")
    for call in calls:
        if window := call.get("window"):
            raise ValueError(
                f"sparse_kv: attention over {call['k_cache']} has a window of {abs(window)} tokens, whose place would"
                " move with the pages that are left out; leave sparse_kv out"
            )
        if call.get("alibi_slopes_H") is not None:
            raise ValueError("sparse_kv: this model adds ALiBi's slopes by distance in the cache; leave sparse_kv out")


class SparseKV:
    """Calls attention on picked pages: `around` is what Executable.around takes."""

    def __init__(self, pick: Pick, kv_caches: Sequence[Sequence[Tensor]]) -> None:
        self._pick = pick
        self._layers = {caches[0].data_ptr(): layer for layer, caches in enumerate(kv_caches)}

    def around(self, contract: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return what is called in a provider's place."""
        if contract not in _READERS:
            return call

        def attend(
            q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, table_RB: Tensor, seq_lens_R: Tensor, starts: Tensor,
            *rest: Any,
        ) -> Any:  # fmt: skip
            view = KVView(
                layer=self._layers[k_cache.data_ptr()], query_THD=q_THD, k_cache=k_cache, v_cache=v_cache,
                block_table=table_RB, seq_lens=seq_lens_R, query_starts=starts,
            )  # fmt: skip
            picked = self._pick(view)
            if picked is not None:
                table_RB, seq_lens_R = _only(view, picked)
            return call(q_THD, k_cache, v_cache, table_RB, seq_lens_R, starts, *rest)

        return attend


def _only(view: KVView, picked: Tensor) -> tuple[Tensor, Tensor]:
    """Return block tables and lengths of requests that have the picked pages alone. Raises ValueError for wrong ones.

    Picks are read on the host: on a GPU every call waits for it.
    """
    requests, device = view.seq_lens.shape[0], view.block_table.device
    fits = isinstance(picked, Tensor) and picked.dtype in (torch.int32, torch.int64)
    if not fits or picked.dim() != 2 or picked.shape[0] != requests or not picked.shape[1]:
        got = f"{picked.dtype} {tuple(picked.shape)}" if isinstance(picked, Tensor) else repr(picked)
        raise ValueError(
            f"sparse_kv: for layer {view.layer} the function gave {got}, wanted pages (R, K) in int64 of the"
            f" {requests} requests, K at least 1, or None"
        )
    pages, counts, own = picked.cpu().long(), view.num_pages.cpu().long(), view.first_own.cpu().long()
    there = pages >= 0
    before, after = pages[:, :-1], pages[:, 1:]
    for wrong, wanted in (
        (((pages < -1) | (pages >= counts[:, None])).any(1), "pages from 0 to {last}, or -1"),
        (((after >= 0) & (after <= before)).any(1), "rising pages, none twice"),
        ((there[:, 1:] & ~there[:, :-1]).any(1), "-1 behind all pages only"),
        ((pages >= own[:, None]).sum(1) != counts - own, "all of pages {own} to {last}, which hold the step's tokens"),
    ):
        if wrong.any():
            r = int(wrong.nonzero()[0])
            what = wanted.format(last=int(counts[r]) - 1, own=int(own[r]))
            raise ValueError(
                f"sparse_kv: for layer {view.layer} the function picked pages {pages[r].tolist()} of request {r}, which"
                f" has {int(counts[r])}: wanted {what}"
            )
    tokens = (view.seq_lens.cpu().long()[:, None] - pages * view.block_size).clamp(max=view.block_size)
    lengths = torch.where(there, tokens, 0).sum(1).int()
    blocks = view.block_table.gather(1, pages.clamp(min=0).to(device))
    return torch.where(there.to(device), blocks, 0), lengths.to(device)
