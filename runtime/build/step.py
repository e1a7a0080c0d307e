"""What a step takes and gives, declared once: the runner's typed interface to any scheduler, version 3.

Each field of StepInput states its dtype, dimensions, padding and reader. From that follow the arguments of a model's
forward, the examples it is traced on, the runner's static buffers, the checks, and the bytes between processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

PROTOCOL_VERSION = 3  # of StepInput and StepOutput; it rises when a field changes its meaning

Reader = Literal["model", "seams", "adapters", "host"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One tensor of a step.

    dims      of each shape it may have, a letter or number a dimension: T tokens, R requests, S one more than these,
              B blocks of the request that has most, L wanted rows
    reader    "model": what is compiled, so it is padded with the step; "seams": attention alone, at its own size;
              "adapters": layers that an adapter changes; "host": what keeps account of requests
    grouped   each group of the KV cache has its own: of several, a dimension G stands before the others
    padding   what rows of padding hold
    optional  None stands for: every request has the first (adapter 0: none; position of text)
    """

    name: str
    dtype: torch.dtype
    dims: tuple[str, ...]
    reader: Reader
    grouped: bool = False
    padding: int = 0
    optional: bool = False

    @property
    def in_forward(self) -> bool:
        """Whether a model's forward takes it."""
        return self.reader in ("model", "seams")

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return its first shape at some sizes, of one group of the KV cache where these say nothing of G."""
        dims = f"G{self.dims[0]}" if self.grouped and sizes.get("G", 1) > 1 else self.dims[0]
        return tuple(sizes[d] for d in dims)

    def padded(self, sizes: Mapping[str, int], device: str) -> Tensor:
        """Return a tensor of its first shape that holds nothing but padding."""
        return torch.full(self.shape(sizes), self.padding, dtype=self.dtype, device=device)


def _declared(dtype: torch.dtype, *dims: str, reader: Reader, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "dims": dims, "reader": reader, **more}


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """One step's ragged batch: tokens of all requests concatenated, without padding. All tensors on the CPU.

    token_ids       (T,) int64; T may be 0: an empty step
    positions       (T,) int64, or (3, T) where the model rotates by three (time, height, width)
    slot_mapping    (T,) int64: block * block_size + offset where the token's key and value go; (G, T) where the KV
                    cache has several groups
    block_table     (R, B) int32, or (G, R, B): each request's blocks; unused entries are 0, the reserved null block
    seq_lens        (R,) int32: tokens of each request known to the cache after this step
    query_starts    (R + 1,) int32: request r owns rows query_starts[r] : query_starts[r + 1]
    logit_rows      (L,) int64: rows whose logits are wanted; any number of a request's (drafts to be verified)
    adapter_slots   (R,) int32: which adapter each request is computed with, 0: none
    token_adapters  (T,) int32: what the runner makes of adapter_slots for the model; leave it out
    request_slots   (R,) int32: each request's place in arrays that outlive the step, no place twice
    request_generations  (R,) int64: how often that place had been given away before, so that a late answer to its
                    former holder is known as such; the output carries both back
    hidden_states   whether the output shall have them; the runner is loaded with return_hidden_states=True then, or its
                    model pools
    """

    token_ids: Tensor = field(metadata=_declared(torch.int64, "T", reader="model"))
    positions: Tensor = field(metadata=_declared(torch.int64, "T", "3T", reader="model"))
    slot_mapping: Tensor = field(metadata=_declared(torch.int64, "T", reader="model", padding=-1, grouped=True))
    block_table: Tensor = field(metadata=_declared(torch.int32, "RB", reader="seams", grouped=True))
    seq_lens: Tensor = field(metadata=_declared(torch.int32, "R", reader="seams"))
    query_starts: Tensor = field(metadata=_declared(torch.int32, "S", reader="seams"))
    logit_rows: Tensor = field(metadata=_declared(torch.int64, "L", reader="model"))
    adapter_slots: Tensor | None = field(
        default=None, metadata=_declared(torch.int32, "R", reader="host", optional=True)
    )
    token_adapters: Tensor | None = field(
        default=None, metadata=_declared(torch.int32, "T", reader="adapters", padding=-1, optional=True)
    )
    request_slots: Tensor | None = field(
        default=None, metadata=_declared(torch.int32, "R", reader="host", optional=True)
    )
    request_generations: Tensor | None = field(
        default=None, metadata=_declared(torch.int64, "R", reader="host", optional=True)
    )
    hidden_states: bool = False

    @property
    def num_tokens(self) -> int:
        return self.token_ids.shape[0]

    @property
    def num_requests(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def num_groups(self) -> int:
        """Groups of the KV cache that it has tables for."""
        return self.slot_mapping.shape[0] if self.slot_mapping.dim() > 1 else 1

    @property
    def groups(self) -> list[tuple[Tensor, Tensor]]:
        """The slot mapping and the block table of each group of the KV cache."""
        own = self.slot_mapping, self.block_table
        return [own] if self.num_groups == 1 else list(zip(*own, strict=True))

    def check(self) -> None:
        """Raise ValueError when shapes or dtypes do not fit together, or two requests claim one slot."""
        requests = self.seq_lens.shape[0]
        sizes = {"T": self.token_ids.shape[0], "R": requests, "S": requests + 1}
        sizes |= {"B": self.block_table.shape[-1], "L": self.logit_rows.numel(), "3": 3}
        of, groups = sizes.__getitem__, (self.num_groups,) if self.num_groups > 1 else ()
        for name, declared in FIELDS.items():
            tensor = getattr(self, name)
            if tensor is None and declared.optional:
                continue
            shape = tensor.shape  # in every step, so it is compared as fast as can be
            head = groups if declared.grouped else ()
            fits = shape == (*head, *map(of, declared.dims[0])) or shape == (*head, *map(of, declared.dims[-1]))
            if tensor.dtype is not declared.dtype or not fits:
                wanted = " or ".join(str((*head, *map(of, dims))) for dims in declared.dims)
                raise ValueError(
                    f"StepInput.{name} is {tensor.dtype} {tuple(shape)}, wanted {declared.dtype} {wanted}"
                    f" ({sizes['T']} tokens of {requests} requests)"
                )
            if not tensor.is_contiguous():
                raise ValueError(f"StepInput.{name} has strides {tensor.stride()}, wanted contiguous ones")
        if (slots := self.request_slots) is not None and len(set(held := slots.tolist())) < len(held):
            twice = next(slot for slot in held if held.count(slot) > 1)
            raise ValueError(f"StepInput.request_slots names slot {twice} twice; wanted each request's own")


FIELDS: dict[str, Field] = {f.name: Field(name=f.name, **f.metadata) for f in fields(StepInput) if "dims" in f.metadata}
# Arguments of every model's forward, in order; kv_caches is a list of each layer's caches, the rest are tensors.
_FORWARD = [name for name, declared in FIELDS.items() if declared.in_forward]
STEP_ARGUMENTS = (*_FORWARD[:2], "kv_caches", *_FORWARD[2:])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What a step gives, on the runner's device, until the runner's next step.

    logits          (L, vocab_size) of the wanted rows, in the model's dtype; (L, 0) of a model that pools
    hidden_states   (L, hidden_size) that these logits are the head's of, where the step asked for them: normed; what a
                    text's vector is pooled from
    request_slots, request_generations  as the step had them
    """

    logits: Tensor
    hidden_states: Tensor | None = None
    request_slots: Tensor | None = None
    request_generations: Tensor | None = None


def check_plain(batch: StepInput, num_groups: int = 1, adapters: int = 0) -> None:
    """Raise ValueError for what a step may ask for and few models have: three positions, adapters; and for other KV
    groups than the model has.

    adapters  slots that the model has for them
    """
    if batch.token_adapters is not None:
        raise ValueError("StepInput.token_adapters is made by the runner of adapter_slots; leave it out")
    if batch.positions.dim() > 1:
        raise ValueError("StepInput.positions is (3, T), this model rotates by one position a token: wanted (T,)")
    if batch.num_groups != num_groups:
        raise ValueError(f"StepInput has {batch.num_groups} KV cache groups, this model has {num_groups}")
    if adapters == 0 and batch.adapter_slots is not None and batch.adapter_slots.any():
        raise ValueError(f"StepInput.adapter_slots is {batch.adapter_slots.tolist()}, no adapter is loaded: wanted 0")


def capture_dims(layers: Iterable[Iterable[tuple[int, ...]]]) -> dict[str, Any]:
    """Return what may change of each argument of a forward, by letter; caches (N, …) may have any number N of blocks.

    S is said to be R+1, so that it is known in the graph: what is not known to fit a kernel is not given to it.

    layers  of the KV cache: the shapes of its tensors in one block
    """
    caches = [[("N", *[None] * len(shape)) for shape in layer] for layer in layers]
    letters = {n: tuple("R+1" if d == "S" else d for d in FIELDS[n].dims[0]) for n in STEP_ARGUMENTS if n in FIELDS}
    return {n: caches if n == "kv_caches" else letters[n] for n in STEP_ARGUMENTS}


def example_arguments(
    layers: Iterable[Iterable[tuple[int, ...]]], kv_dtype: torch.dtype, device: str
) -> dict[str, Any]:
    """Return arguments to trace a forward on: their dtypes and sizes count, no size that may change is 0 or 1."""
    sizes = {"T": 7, "R": 3, "S": 4, "B": 4, "L": 2}
    caches = [[torch.empty((5, *shape), dtype=kv_dtype, device=device) for shape in layer] for layer in layers]
    return {n: caches if n == "kv_caches" else FIELDS[n].padded(sizes, device) for n in STEP_ARGUMENTS}


def ragged_step(
    token_ids: np.ndarray, table: np.ndarray, firsts: np.ndarray, counts: np.ndarray, block_size: int,
    logit_rows: np.ndarray | None = None, **more: Any,
) -> StepInput:  # fmt: skip
    """Return the step that computes counts[r] tokens of each request, after firsts[r] that are in its blocks table[r].

    table is (R, B), or (G, R, B) of G groups of the KV cache; token_ids are those of all requests concatenated. The
    logits wanted are of each request's last row by default. more: further fields of StepInput.
    """
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    request = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(starts[-1], dtype=np.int64) + np.repeat(firsts - starts[:-1], counts)
    index, offset = positions // block_size, positions % block_size
    if table.ndim == 3 and len(table) == 1:
        (table,) = table
    slots = np.ascontiguousarray(table[..., request, index]) * np.int64(block_size) + offset
    rows = starts[1:] - 1 if logit_rows is None else logit_rows
    return StepInput(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(slots),
        block_table=torch.from_numpy(table),
        seq_lens=torch.from_numpy((firsts + counts).astype(np.int32)),
        query_starts=torch.from_numpy(starts),
        logit_rows=torch.from_numpy(rows.astype(np.int64)),
        **more,
    )


def flattened(batch: StepInput, caches: Sequence[Tensor]) -> list[Tensor]:
    """Return a step's tensors, and those of the KV cache, in a program's order."""
    flat: list[Tensor] = [] if batch.token_adapters is None else [batch.token_adapters]
    first, *further = batch.groups
    of_first = dict(zip(("slot_mapping", "block_table"), first, strict=True))
    for name in STEP_ARGUMENTS:
        flat += caches if name == "kv_caches" else [of_first[name] if name in of_first else getattr(batch, name)]
    return flat + [tensor for group in further for tensor in group]


def empty_step(num_groups: int = 1) -> StepInput:
    """Return the step of no request: a rank without work gives it, so that the others' collectives do not wait."""
    none = np.empty(0, dtype=np.int64)
    return ragged_step(none, np.empty((num_groups, 0, 1), dtype=np.int32), none, none, 1)


def step_of_padding(num_groups: int = 1) -> StepInput:
    """Return the step of one row of padding, which no request owns and which stores nothing."""
    sizes = {"T": 1, "R": 1, "S": 2, "B": 1, "L": 1, "G": num_groups}
    parts: dict[str, Any] = {name: FIELDS[name].padded(sizes, "cpu") for name in STEP_ARGUMENTS if name in FIELDS}
    return StepInput(**parts)
