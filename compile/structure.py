"""Count what a model is made of, on its modules: what passes promise of it follows from this."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import torch
from torch import nn

from seamwise.passes import KEPT, Structure

# Norms of what attention or MLP gives, before it is added to the residual (Gemma, OLMo 2, GLM 4). Where a block has no
# post_feedforward_layernorm, its post_attention_layernorm is the MLP's norm, of the residual sum.
_AFTER = {"post_attention_layernorm", "post_feedforward_layernorm", "post_self_attn_layernorm", "post_mlp_layernorm"}


def structure_of(model: nn.Module, *, foreign: bool = False) -> Structure:
    """Return the counts of a decoder whose modules carry the names transformers' models use; foreign: of its classes.

    A block is a module with `self_attn` and `mlp`. Norms read the residual sum, but for those inside an attention
    (of queries and keys), those after attention and MLP, and the model's first, which reads the embedding.
    """
    count, no_sum, reads_embedding = Counter[str](), 0, False
    for _, module in model.named_modules():
        children = dict(module.named_children())
        own_norms = {name for name, child in children.items() if "RMSNorm" in type(child).__name__}
        count["norms"] += len(own_norms)
        count["layer_norms"] += isinstance(module, nn.LayerNorm) and module.weight is not None
        if {"self_attn", "mlp"} <= children.keys():
            reads_embedding |= "input_layernorm" in own_norms
            after = _AFTER if "post_feedforward_layernorm" in children else _AFTER - {"post_attention_layernorm"}
            no_sum += len(own_norms & after)
        no_sum += len(own_norms & {"enorm", "hnorm"})  # of a module that predicts a further token
        apart = {"q_proj", "k_proj", "v_proj"} <= children.keys()
        if apart or "qkv_proj" in children:
            count["attentions"] += apart
            count["rotations"] += 2 * _turns_halves(module)
            count["qk_norms"] += {"q_norm", "k_norm"} <= own_norms and _of_heads(module)
            no_sum += len(own_norms)
        if "kv_a_proj_with_mqa" in children:
            queries = children["q_a_proj" if "q_a_proj" in children else "q_proj"]
            count["latent_attentions"] += (queries.bias is None) == (children["kv_a_proj_with_mqa"].bias is None)
            no_sum += len(own_norms)
        count["sparse_mlps"] += "experts" in children and not children.keys().isdisjoint(("gate", "router"))
        pair = {"gate_proj", "up_proj"} <= children.keys()
        count["gated_mlps"] += pair or "gate_up_proj" in children
        count["gate_up_pairs"] += pair
    count["residual_norms"] = max(count["norms"] - no_sum - reads_embedding, 0)
    linears = sum(isinstance(m, nn.Linear) and n.rpartition(".")[2] not in KEPT for n, m in model.named_modules())
    counted: dict[str, Any] = {**count, "linears": linears}
    return Structure(**counted, foreign=foreign)


def _of_heads(attention: nn.Module) -> bool:
    """Return whether queries are normed head by head, not as whole rows (OLMo 2): the same where there is one head."""
    head_dim = getattr(attention, "head_dim", None) or getattr(getattr(attention, "c", None), "E", None)
    weight = dict(attention.named_parameters()).get("q_norm.weight")  # NanoChat's norms have none
    return weight is not None and bool(weight.shape[0] == head_dim)


def _turns_halves(attention: nn.Module) -> bool:
    """Return whether an attention rotates halves against each other: not in every layer, nor in every model.

    SmolLM3 has layers without; Cohere, GLM and others of transformers turn neighbouring columns, by their own
    `rotate_half`; transformers' gpt-oss has none, and other arithmetic.
    """
    defined_in = type(attention).__module__
    turn = getattr(sys.modules[defined_in], "rotate_half", None)
    if turn is None:
        halves = not defined_in.startswith("transformers.")
    else:
        halves = turn(torch.arange(4)).tolist() == [-2, -3, 0, 1]
    return bool(getattr(attention, "use_rope", True)) and halves
