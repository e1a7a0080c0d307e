"""Count what a model is made of, on its modules: what the passes promise follows from this, not from the graph."""

from __future__ import annotations

from torch import nn

from seamwise.passes import Structure


def structure_of(model: nn.Module) -> Structure:
    """Return the counts of a decoder whose modules carry the names transformers' models use.

    A block is a module with an `input_layernorm`; each of its norms but the model's first reads a residual sum, and
    so does the final norm. Norms inside an attention (query and key norms) read no residual.
    """
    norms = attentions = gated = rotations = in_attention = 0
    for _, module in model.named_modules():
        children = dict(module.named_children())
        norms += "RMSNorm" in type(module).__name__
        if {"q_proj", "k_proj", "v_proj"} <= children.keys():
            attentions += 1
            rotations += 2
            in_attention += sum("RMSNorm" in type(c).__name__ for c in children.values())
        gated += {"gate_proj", "up_proj", "down_proj"} <= children.keys()
    return Structure(
        norms=norms,
        residual_norms=max(norms - in_attention - 1, 0),
        rotations=rotations,
        gated_mlps=gated,
        attentions=attentions,
    )
