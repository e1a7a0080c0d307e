"""Sampling parameters, and from logits to tokens by them."""
