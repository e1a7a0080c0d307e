"""One rank's decode step of DeepSeek-R1, as the model's definition and the passes make it for a wide group of ranks.

The other ranks are not there: what is sent to experts and back is a local copy of as many rows as a rank sends, which
come from random tokens for random experts of this rank. MTP's module is a program of its own, by its own definition and
the same passes, with the model's embedding and head, as where it guesses (runtime/speculation/further_tokens.py).

Shapes: T tokens, D hidden, K experts a token, R = T · K rows that come in, M = ranks · T rows that there is room for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from seamwise.compile.derive import parameters_of
from seamwise.compile.pipeline import PipelineConfig
from seamwise.kernels.cpu import tape
from seamwise.passes import Parallel
from seamwise.runtime.build.step import ragged_step
from seamwise.runtime.distributed.group import fake_group
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.runner.shared_weights import further_layer

from .models import model_directory

PAGE = 64
WIDE, TINY = 32, 8  # ranks, each with one expert more than its share
_KINDS = {  # the first part of a parameter's name that is here says what it is
    "norm": "router_and_norms", "gate.": "router_and_norms", "embed": "embedding_and_head", "lm_head":
    "embedding_and_head", "self_attn": "attention", ".experts.": "experts", "mlp": "mlp_and_shared_expert",
    "eh_proj": "mlp_and_shared_expert",
}  # fmt: skip


class Rank:
    """The first of the ranks: its runner of the model, and the one of MTP's module."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.ranks = device, TINY if tiny else WIDE
        with fake_group(self.ranks), model_directory("deepseek-r1", tiny) as directory:
            group = str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
            parallel = Parallel(
                size=self.ranks, rank=0, group=group, experts=True, data=True, redundant=self.ranks
            )  # fmt: skip
            # Whole exchanges, which a copy can stand for; nothing else travels meanwhile.
            pipeline = PipelineConfig(parallel=parallel, disabled=("begin_exchanges",))
            self.main = ModelRunner.load(
                directory, dtype="bfloat16", device=device, load_format="dummy", block_size=PAGE, pack_dir=None,
                return_hidden_states=True, pipeline=pipeline,
            )  # fmt: skip
            self.mtp = further_layer(self.main, guesses=1)
        self.raw = self.main.config.raw

    def ledger(self) -> dict[str, Any]:
        """Return the bytes of weights by kind, and of a cached token over all layers, MTP's included."""
        held, seen = dict[str, int](), set[int]()
        for runner in (self.main, self.mtp):
            for recipe, weight in zip(runner.program.recipes.values(), runner.executable.weights, strict=True):
                name = next(iter(parameters_of(recipe)), "")  # a table of experts' places is nobody's parameter
                kind = next((kind for part, kind in _KINDS.items() if part in name), "router_and_norms")
                held[kind] = held.get(kind, 0) + (weight.nbytes if weight.data_ptr() not in seen else 0)
                seen.add(weight.data_ptr())
        return {f"{k}_bytes": n for k, n in held.items()} | {
            "weights_bytes": sum(held.values()),
            "cache_bytes_per_token": self.main.kv_spec.bytes_per_token + self.mtp.kv_spec.bytes_per_token,
            "device_bytes": torch.cuda.get_device_properties(0).total_memory if self.device == "cuda" else 0,
        }  # fmt: skip


class Step:
    """A decode step over `sequences` of `length` cached tokens and `queries` new ones; calling it runs the step.

    With two queries (MTP) the step checks a drafted token beside the last one, and leaves the hidden states and next
    tokens where MTP's module reads them: `guess` drafts the tokens behind.
    Of the steps of one rank, only the last that was made may be called or recorded.
    """

    def __init__(self, rank: Rank, sequences: int, length: int, queries: int) -> None:
        self.tokens, self.mtp = sequences * queries, queries > 1
        draw, pages = np.random.default_rng(1), -(-(length + queries) // PAGE)
        table = 1 + draw.permutation(sequences * pages).reshape(sequences, pages).astype(np.int32)
        known, new = np.full(sequences, length), np.full(sequences, queries, dtype=np.int32)
        ids = draw.integers(rank.main.config.vocab_size, size=self.tokens)
        batch = ragged_step(ids, table, known, new, PAGE, logit_rows=np.arange(self.tokens))
        copies = local_copies(self.tokens, rank, draw)
        self.parts: list[tuple[ModelRunner, list[Tensor]]] = []
        self.caches: list[Tensor] = []
        self.moe_layers = -rank.raw["first_k_dense_replace"]
        for runner in (rank.main, rank.mtp)[: 1 + self.mtp]:
            runner.allocate_kv(sequences * pages + 1)
            self.caches += [cache.normal_() for layer in runner.kv_caches for cache in layer]
            self.parts.append((runner, runner._inputs(replace(batch, token_ids=batch.token_ids.clone()))))
            runner.use_kv([], 0)  # the memory is the step's
            self.moe_layers += runner.config.num_layers
            step, _ = runner.executable._steps[0]
            for name, call in copies.items():
                step.__globals__.update({f"{name}_{w}": partial(tape.call, call) for w in ("all_gather", "all_to_all")})
        slots = batch.slot_mapping.to(rank.device)
        self._at = slots // PAGE, slots % PAGE

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Run the model's step; return the next tokens (T,) and the hidden states (T, D)."""
        next_T, hidden_TD = self._run(*self.parts[0])
        if self.mtp:
            runner, inputs = self.parts[1]
            inputs[runner.program.inputs.index("token_ids")].copy_(next_T)
            self.caches[-1][self._at] = hidden_TD
        return next_T, hidden_TD

    def guess(self) -> tuple[Tensor, Tensor]:
        """Run MTP's module behind the step; return the tokens (T,) behind the next ones, and its hidden states."""
        return self._run(*self.parts[1])

    @staticmethod
    def _run(runner: ModelRunner, inputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits_TV, hidden_TD = runner.executable(*inputs)
        return logits_TV.argmax(-1), hidden_TD


def local_copies(tokens: int, rank: Rank, draw: np.random.Generator) -> dict[str, Callable[..., Any]]:
    """Return what stands for each exchange: R rows of random tokens, each for one random expert of this rank, come in
    at the first of M rows; each of this rank's R choices gets the row of one of them back."""
    wanted, experts = rank.raw["num_experts_per_tok"], rank.raw["n_routed_experts"] // rank.ranks + 1
    room, rows = tokens * rank.ranks, tokens * wanted
    coming = draw.permutation(rows)
    sender_R, back_R = (torch.tensor(i, device=rank.device) for i in (coming // wanted, coming.argsort() * wanted))
    local = torch.full((room, wanted), -1, dtype=torch.int32, device=rank.device)
    local[:rows, 0] = torch.tensor(draw.integers(experts, size=rows), device=rank.device)

    def dispatch(x_TD: Tensor, scale_TG: Tensor, *choices: Any) -> tuple[Tensor, Tensor, Tensor]:
        x_MD, scale_MG = x_TD.new_empty(room, x_TD.shape[1]), scale_TG.new_empty(room, scale_TG.shape[1])
        x_MD.view(torch.uint8)[:rows] = x_TD.view(torch.uint8).index_select(0, sender_R)
        scale_MG[:rows] = scale_TG.index_select(0, sender_R)
        return x_MD, scale_MG, local.clone()

    return {"ep_dispatch_quant": dispatch, "ep_combine": lambda y_SD, *choices: y_SD.index_select(0, back_R)}
