"""Every decoder of transformers that Seamwise does not define, beside transformers' own logits."""
