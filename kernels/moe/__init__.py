"""Mixtures of experts: the router, the order of tokens by expert, grouped products, and the weighted sum."""
