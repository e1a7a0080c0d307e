"""The equations that families share: a family's file puts them together and adds what is its own.

T tokens of all requests, D model width, H query heads, K key/value heads, E head width, R ≤ E rotated columns,
I MLP width, V vocabulary. Parameter names are those of Hugging Face checkpoints.
Source: Touvron et al. 2023, https://arxiv.org/abs/2307.09288.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seamwise.kernels import attention, kv_append, rope_table

from .hf_config import Reader
from .rope import Rope

Table = tuple[Tensor, Tensor]  # cosines and sines, each (T, R)
Cache = Sequence[Tensor]  # keys and values of one layer
Where = Sequence[Tensor]  # slot_mapping, block_table, seq_lens, query_starts


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What every family has, by the letters above."""

    D: int
    H: int
    K: int
    E: int
    I: int
    V: int
    num_layers: int
    eps: float
    tied: bool

    @classmethod
    def from_hf(cls, read: Reader, *, tied: bool = False) -> Sizes:
        """Read a config.json; `tied` is what the family means where tie_word_embeddings is not there."""
        D, H = read.size("hidden_size"), read.size("num_attention_heads")
        return cls(
            D=D, H=H, K=read.size("num_key_value_heads", H), E=read.size("head_dim", D // H),
            I=read.size("intermediate_size"), V=read.size("vocab_size"), num_layers=read.size("num_hidden_layers"),
            eps=read.positive("rms_norm_eps", 1e-6), tied=read.flag("tie_word_embeddings", tied),
        )  # fmt: skip


def activation(read: Reader, name: str = "hidden_act") -> Callable[[Tensor], Tensor]:
    """Return the activation of gated MLPs that a configuration names, by transformers' names."""
    return _ACTIVATIONS[read.choice(name, tuple(_ACTIVATIONS), "silu")]


_TANH = partial(F.gelu, approximate="tanh")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "swish": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": _TANH, "gelu_new": _TANH,
}  # fmt: skip


class RMSNorm(nn.Module):
    def __init__(self, D: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(D))
        self.eps = eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.rms_norm(x_TD, self.weight.shape, self.weight, self.eps)


class RopeTable(nn.Module):
    speeds_F: Tensor

    def __init__(self, rope: Rope) -> None:
        super().__init__()
        self.scaling = rope.scaling
        # Real also where modules are built on meta: no checkpoint holds it.
        speeds_F = torch.tensor(rope.speeds, dtype=torch.float32, device="cpu")
        self.register_buffer("speeds_F", speeds_F, persistent=False)

    def forward(self, positions_T: Tensor, dtype: torch.dtype) -> Table:
        return rope_table(positions_T, self.speeds_F, self.scaling, dtype)


def rotate(x_THE: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
    R = cos_TR.shape[-1]
    x_THR, kept = x_THE[..., :R], x_THE[..., R:]
    low, high = x_THR.chunk(2, -1)
    x_THR = x_THR * cos_TR.unsqueeze(-2) + torch.cat((-high, low), -1) * sin_TR.unsqueeze(-2)
    return torch.cat((x_THR, kept), -1) if kept.shape[-1] else x_THR


class Attention(nn.Module):
    """Grouped-query attention; `norm(E)` makes the norms of query and key heads, scale is E^-0.5 where it is None.

    sinks: each head has a score that takes its share of the softmax and gives nothing.
    """

    def __init__(
        self, c: Sizes, *, bias: bool = False, out_bias: bool = False, norm: Callable[[int], nn.Module] | None = None,
        window: int = 0, softcap: float = 0.0, scale: float | None = None, sinks: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.c, self.window, self.softcap = c, window, softcap
        self.scale = c.E**-0.5 if scale is None else scale
        self.q_proj = nn.Linear(c.D, c.H * c.E, bias=bias)
        self.k_proj = nn.Linear(c.D, c.K * c.E, bias=bias)
        self.v_proj = nn.Linear(c.D, c.K * c.E, bias=bias)
        self.o_proj = nn.Linear(c.H * c.E, c.D, bias=out_bias)
        self.sinks = nn.Parameter(torch.empty(c.H)) if sinks else None
        self.q_norm, self.k_norm = (norm(c.E) if norm else nn.Identity() for _ in "qk")

    def forward(self, x_TD: Tensor, table: Table, cache: Cache, where: Where) -> Tensor:
        slot_mapping_T, *spans = where
        q_THE = rotate(self.q_norm(self.q_proj(x_TD).view(-1, self.c.H, self.c.E)), *table)
        k_TKE = rotate(self.k_norm(self.k_proj(x_TD).view(-1, self.c.K, self.c.E)), *table)
        v_TKE = self.v_proj(x_TD).view(-1, self.c.K, self.c.E)
        kv_append(k_TKE, v_TKE, *cache, slot_mapping_T)
        limits = (self.scale, self.window, self.softcap, self.sinks)
        return self.o_proj(attention(q_THE, *cache, *spans, *limits).flatten(1))


class MLP(nn.Module):
    def __init__(self, c: Sizes, *, bias: bool = False, act: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.act = act
        self.gate_proj = nn.Linear(c.D, c.I, bias=bias)
        self.up_proj = nn.Linear(c.D, c.I, bias=bias)
        self.down_proj = nn.Linear(c.I, c.D, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(self.act(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class Block(nn.Module):
    def __init__(self, c: Sizes, attn: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.D, c.eps)
        self.self_attn = attn
        self.post_attention_layernorm = RMSNorm(c.D, c.eps)
        self.mlp = mlp

    def forward(self, x_TD: Tensor, *step: Any) -> Tensor:
        x_TD = x_TD + self.self_attn(self.input_layernorm(x_TD), *step)
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))


class Decoder(nn.Module):
    """Embedding, layers and final norm; `ropes` has each layer's, and equal ones share a table."""

    def __init__(self, embed: nn.Module, layers: Sequence[nn.Module], norm: nn.Module, ropes: Sequence[Rope]) -> None:
        super().__init__()
        distinct = list(dict.fromkeys(ropes))
        self.embed_tokens = embed
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.tables = nn.ModuleList(RopeTable(rope) for rope in distinct)
        self.table_of_layer = [distinct.index(rope) for rope in ropes]

    def forward(self, token_ids_T: Tensor, positions_T: Tensor, kv_caches: Sequence[Cache], where: Where) -> Tensor:
        x_TD = self.embed_tokens(token_ids_T)
        tables = [table(positions_T, x_TD.dtype) for table in self.tables]
        for layer, table, cache in zip(self.layers, self.table_of_layer, kv_caches, strict=True):
            x_TD = layer(x_TD, tables[table], cache, where)
        return self.norm(x_TD)

    def kinds(self) -> list[Hashable]:
        """Return each layer's kind: equal ones compute the same, of other weights."""
        return [(table, _kind(layer)) for layer, table in zip(self.layers, self.table_of_layer, strict=True)]

    @contextmanager
    def only(self, chosen: Sequence[int]) -> Iterator[None]:
        """Be the decoder of these layers alone for a while."""
        layers, tables = self.layers, self.table_of_layer
        self.layers, self.table_of_layer = nn.ModuleList(layers[i] for i in chosen), [tables[i] for i in chosen]
        try:
            yield
        finally:
            self.layers, self.table_of_layer = layers, tables


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _kind(module: nn.Module) -> Hashable:
    """Describe a module without its weights' values; what cannot be compared, and hooks, make it one of its own."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    hooks = any(value for name, value in vars(module).items() if name.endswith("_hooks"))
    given = {**module._parameters, **module._buffers}
    return (
        type(module),
        id(module) if hooks else None,
        tuple((name, type(value), value if isinstance(value, Hashable) else id(value)) for name, value in own.items()),
        tuple((name, None if t is None else (t.shape, t.dtype)) for name, t in given.items()),
        tuple((name, None if child is None else _kind(child)) for name, child in module._modules.items()),
    )


class CausalLM(nn.Module):
    """The whole model; `forward` takes one ragged step and returns logits (L, V) of the wanted rows."""

    def __init__(self, c: Sizes, model: Decoder, *, softcap: float = 0.0) -> None:
        super().__init__()
        self.model, self.softcap = model, softcap
        self.lm_head = nn.Linear(c.D, c.V, bias=False)
        if c.tied:
            self.lm_head.weight = model.embed_tokens.weight  # type: ignore[assignment]

    def forward(
        self, token_ids: Tensor, positions: Tensor, kv_caches: Sequence[Cache], slot_mapping: Tensor,
        block_table: Tensor, seq_lens: Tensor, query_starts: Tensor, logit_rows: Tensor,
    ) -> Tensor:  # fmt: skip
        x_TD = self.model(token_ids, positions, kv_caches, (slot_mapping, block_table, seq_lens, query_starts))
        logits_LV = self.lm_head(x_TD[logit_rows])
        return torch.tanh(logits_LV / self.softcap) * self.softcap if self.softcap else logits_LV


def pre_norm_lm(c: Sizes, blocks: Sequence[nn.Module], ropes: Sequence[Rope]) -> CausalLM:
    """Return the model that Llama and its descendants are: plain embedding, these blocks, RMSNorm, plain head."""
    return CausalLM(c, Decoder(nn.Embedding(c.V, c.D), blocks, RMSNorm(c.D, c.eps), ropes))
