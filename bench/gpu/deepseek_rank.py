"""One rank's decode step of DeepSeek-R1, as the model's definition and the passes make it for a wide group of ranks.

The other ranks are not there: what is sent to experts and back is a local copy of as many rows as a rank sends, which
come from random tokens for random experts of this rank. MTP's module is there as one more layer of the model, which
has the same kernels, and behind the head as what it has besides: two norms, the layer that joins, and a head.

Shapes: T tokens, D hidden, K experts a token, R = T · K rows that come in, M = ranks · T rows that there is room for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from seamwise import kernels
from seamwise.compile.derive import parameters_of
from seamwise.compile.pipeline import PipelineConfig
from seamwise.kernels.cpu import tape
from seamwise.passes import Parallel
from seamwise.runtime.build.step import ragged_step
from seamwise.runtime.distributed.group import fake_group
from seamwise.runtime.runner.runner import ModelRunner
from seamwise.runtime.runner.shared_weights import first_layers

from .models import model_directory

FLOAT8, GROUP, PAGE = torch.float8_e4m3fn, 128, 64
WIDE, TINY = 32, 8  # ranks, each with one expert more than its share
_KINDS = {  # the first part of a parameter's name that is here says what it is
    "norm": "router_and_norms", "gate.": "router_and_norms", "embed": "embedding_and_head", "lm_head":
    "embedding_and_head", "self_attn": "attention", ".experts.": "experts", "mlp": "mlp_and_shared_expert",
}  # fmt: skip


class Rank:
    """The first of the ranks: its runner of all layers, MTP's as the last, and one of the model's own alone."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.ranks = device, TINY if tiny else WIDE
        with fake_group(self.ranks), model_directory("deepseek-r1", tiny) as directory:
            group = str(dist.group.WORLD.group_name)  # type: ignore[union-attr]
            parallel = Parallel(
                size=self.ranks, rank=0, group=group, experts=True, data=True, redundant=self.ranks
            )  # fmt: skip
            # Whole exchanges, which a copy can stand for; nothing else travels meanwhile.
            pipeline = PipelineConfig(parallel=parallel, disabled=("begin_exchanges",))
            self.whole = ModelRunner.load(
                directory, dtype="bfloat16", device=device, load_format="dummy", block_size=PAGE, pack_dir=None,
                return_hidden_states=True, pipeline=pipeline,
            )  # fmt: skip
            self.plain = first_layers(self.whole, self.whole.config.num_layers - 1)
        self.raw = self.whole.config.raw
        held = zip(self.whole.program.recipes.values(), self.whole.executable.weights, strict=True)
        self.embedding_VD = next(w for r, w in held if "model.embed_tokens.weight" in parameters_of(r))
        width = self.whole.config.hidden_size
        self.norms_2D = torch.ones(2, width, dtype=torch.bfloat16, device=device)
        drawn = torch.empty(width, 2 * width, dtype=torch.bfloat16, device=device)
        scale = torch.full((width // GROUP, 2 * width // GROUP), (2 * width) ** -0.5, device=device)
        self.join = drawn.normal_(generator=torch.Generator(device).manual_seed(0)).to(FLOAT8), scale

    def ledger(self) -> dict[str, Any]:
        """Return the bytes of weights by kind, and of a cached token over all layers, MTP's included."""
        held = {"mlp_and_shared_expert": sum(part.nbytes for part in self.join)}
        for recipe, weight in zip(self.whole.program.recipes.values(), self.whole.executable.weights, strict=True):
            name = next(iter(parameters_of(recipe)), "")  # a table of experts' places is nobody's parameter
            kind = next((kind for part, kind in _KINDS.items() if part in name), "router_and_norms")
            held[kind] = held.get(kind, 0) + weight.nbytes
        return {f"{k}_bytes": n for k, n in held.items()} | {
            "weights_bytes": sum(held.values()), "cache_bytes_per_token": self.whole.kv_spec.bytes_per_token,
            "device_bytes": torch.cuda.get_device_properties(0).total_memory if self.device == "cuda" else 0,
        }  # fmt: skip


class Step:
    """A decode step over `sequences` of `length` cached tokens and `queries` new ones; calling it runs the step.

    With two queries (MTP) the step checks a drafted token beside the last one, and drafts the next with MTP's module.
    Of the steps of one rank and as many queries, only the last that was made may be called or recorded.
    """

    def __init__(self, rank: Rank, sequences: int, length: int, queries: int) -> None:
        self.rank, self.tokens, self.mtp = rank, sequences * queries, queries > 1
        self.runner = runner = rank.whole if self.mtp else rank.plain
        self.moe_layers = runner.config.num_layers - rank.raw["first_k_dense_replace"]
        draw, pages = np.random.default_rng(1), -(-(length + queries) // PAGE)
        table = 1 + draw.permutation(sequences * pages).reshape(sequences, pages).astype(np.int32)
        known, new = np.full(sequences, length), np.full(sequences, queries, dtype=np.int32)
        ids = draw.integers(runner.config.vocab_size, size=self.tokens)
        batch = ragged_step(ids, table, known, new, PAGE, logit_rows=np.arange(self.tokens))
        runner.allocate_kv(sequences * pages + 1)
        self.caches = [cache.normal_() for layer in runner.kv_caches for cache in layer]
        self.inputs = runner._inputs(batch)
        runner.use_kv([], 0)  # the memory is the step's
        self.ids_T = self.inputs[runner.program.inputs.index("token_ids")]
        step, _ = runner.executable._steps[0]
        for name, call in local_copies(self.tokens, rank, draw).items():
            step.__globals__.update({f"{name}_{way}": partial(tape.call, call) for way in ("all_gather", "all_to_all")})

    @property
    def cache_bytes(self) -> int:
        return sum(c.nbytes for c in self.caches)

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Run the step; return the next tokens (T,), drafted ones with MTP, and the hidden states (T, D)."""
        logits_TV, hidden_TD = self.runner.executable(*self.inputs)
        next_T = logits_TV.argmax(-1)
        if not self.mtp:
            return next_T, hidden_TD
        drawn_TD = kernels.gather_rows(self.rank.embedding_VD, next_T)
        both = zip((drawn_TD, hidden_TD), self.rank.norms_2D, strict=True)
        joined = kernels.quantize(torch.cat([kernels.rms_norm(x, w, 1e-6) for x, w in both], -1), FLOAT8, GROUP)
        draft_TD = kernels.scaled_linear(*joined, *self.rank.join, torch.bfloat16)
        return F.linear(draft_TD, self.rank.embedding_VD).argmax(-1), hidden_TD  # a head is as large


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
