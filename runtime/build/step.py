"""What a step takes and gives: the runner's typed interface to any scheduler."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Argument names of every model's forward, in order; kv_caches is a list of (k_cache, v_cache), the rest are tensors.
STEP_ARGUMENTS = (
    "token_ids", "positions", "kv_caches", "slot_mapping", "block_table", "seq_lens", "query_starts", "logit_rows",
)  # fmt: skip
# The tensors' dtypes and dimensions: T tokens, R requests, S one more than these, B blocks, L wanted rows.
FIELDS: dict[str, tuple[torch.dtype, str]] = {
    "token_ids": (torch.int64, "T"), "positions": (torch.int64, "T"), "slot_mapping": (torch.int64, "T"),
    "block_table": (torch.int32, "RB"), "seq_lens": (torch.int32, "R"), "query_starts": (torch.int32, "S"),
    "logit_rows": (torch.int64, "L"),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """One step's ragged batch: tokens of all requests concatenated, without padding. All tensors on the CPU.

    token_ids       (T,) int64
    positions       (T,) int64
    slot_mapping    (T,) int64: block * block_size + offset where the token's key and value go
    block_table     (R, B) int32: each request's blocks; unused entries are 0, the reserved null block
    seq_lens        (R,) int32: tokens of each request known to the cache after this step
    query_starts    (R + 1,) int32: request r owns rows query_starts[r] : query_starts[r + 1]
    logit_rows      (L,) int64: rows whose logits are wanted
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_starts: Tensor
    logit_rows: Tensor

    def check(self) -> None:
        """Raise ValueError when shapes or dtypes do not fit together."""
        tokens, requests = self.token_ids.shape[0], self.seq_lens.shape[0]
        sizes = {"T": tokens, "R": requests, "S": requests + 1}
        sizes |= {"B": self.block_table.shape[-1], "L": self.logit_rows.numel()}  # of which there may be any number
        for name, (dtype, dims) in FIELDS.items():
            tensor, shape = getattr(self, name), tuple(sizes[dim] for dim in dims)
            if not tensor.is_contiguous():
                raise ValueError(f"StepInput.{name} has strides {tensor.stride()}, wanted contiguous ones")
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise ValueError(
                    f"StepInput.{name} is {tensor.dtype} {tuple(tensor.shape)}, wanted {dtype} {shape}"
                    f" ({tokens} tokens of {requests} requests)"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """Logits of the wanted rows: (L, vocab_size) in the model's dtype, on the runner's device, until the next step."""

    logits: Tensor


def ragged_step(
    token_ids: np.ndarray, table: np.ndarray, firsts: np.ndarray, counts: np.ndarray, block_size: int,
    logit_rows: np.ndarray | None = None,
) -> StepInput:  # fmt: skip
    """Return the step that computes counts[r] tokens of each request, after firsts[r] that are in its blocks table[r].

    token_ids are those of all requests concatenated. The logits wanted are of each request's last row by default.
    """
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    request = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(starts[-1], dtype=np.int64) + np.repeat(firsts - starts[:-1], counts)
    slots = table[request, positions // block_size] * np.int64(block_size) + positions % block_size
    rows = starts[1:] - 1 if logit_rows is None else logit_rows
    return StepInput(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slots),
        block_table=torch.from_numpy(table),
        seq_lens=torch.from_numpy((firsts + counts).astype(np.int32)),
        query_starts=torch.from_numpy(starts),
        logit_rows=torch.from_numpy(rows.astype(np.int64)),
    )
